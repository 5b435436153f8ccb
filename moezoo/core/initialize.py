"""Initial weights, the same for both backends: one NumPy Philox stream per parameter name."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from moezoo.core.parameters import Parameter, parameter_table
from moezoo.core.spec import ModelSpec


def initial_weights(spec: ModelSpec, seed: int) -> dict[str, NDArray[np.float32]]:
    """Canonical name -> float32 array. The same spec and seed give the same values on every backend.

    A parameter's stream depends on its name and the seed only, so adding a part leaves the others as they were.
    """
    return {row.name: initial_value(row, seed) for row in parameter_table(spec)}


def initial_value(row: Parameter, seed: int) -> NDArray[np.float32]:
    """The initial value of one parameter."""
    match row.initializer.kind:
        case "ones":
            return np.ones(row.shape, np.float32)
        case "zeros":
            return np.zeros(row.shape, np.float32)
        case "normal":
            key = int.from_bytes(hashlib.sha256(f"{seed}/{row.name}".encode()).digest()[:16], "little")
            generator = np.random.Generator(np.random.Philox(key=key))
            return (row.initializer.std * generator.standard_normal(row.shape)).astype(np.float32)
