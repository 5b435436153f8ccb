"""Executable spec: every operation in readable float64 NumPy. Both backends are tested against it.

`import autograd.numpy as np` is NumPy with automatic differentiation (HIPS autograd), so only the forward pass is
written. Parameters are a plain dict by canonical name; `inside` returns the view of one module.
"""

from collections.abc import Mapping
from typing import Any

Array = Any  # a float64 or integer NumPy array, or autograd's box around one
Parameters = Mapping[str, Array]
Record = dict[str, Array]


def inside(parameters: Parameters, prefix: str) -> dict[str, Array]:
    """Return the parameters whose name starts with `prefix.`, keyed by the rest of the name."""
    return {name[len(prefix) + 1 :]: value for name, value in parameters.items() if name.startswith(prefix + ".")}
