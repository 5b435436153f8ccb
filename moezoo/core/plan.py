from dataclasses import dataclass
from typing import Any
@dataclass(frozen=True)
class Collective:
    kind: Any
    axes: Any
    devices: int
    count: int
    payload: int
