"""The executable spec: every operation in float64 NumPy, written to be read. Both backends are tested against it.

`import autograd.numpy as np` is NumPy with gradients (HIPS autograd), so the formula is written once and its gradient
follows from it. Parameters are a plain dict of canonical names; `inside` gives the view of one module.
"""

from collections.abc import Mapping
from typing import Any

Array = Any  # a float64 or integer NumPy array, or autograd's box around one
Parameters = Mapping[str, Array]
Record = dict[str, Array]


def inside(parameters: Parameters, prefix: str) -> dict[str, Array]:
    """The parameters whose name starts with `prefix.`, by the rest of their name."""
    return {name[len(prefix) + 1 :]: value for name, value in parameters.items() if name.startswith(prefix + ".")}
