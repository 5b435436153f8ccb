"""Initial weights, the same for both backends: one NumPy Philox stream per parameter name."""

import hashlib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moezoo.core.parameters import Initializer, Parameter, parameter_table
from moezoo.core.spec import ModelSpec


def initial_weights(spec: ModelSpec, seed: int, *, active_adapters: bool = False) -> dict[str, NDArray[np.float32]]:
    """Canonical name -> float32 array. The same spec and seed give the same values on every backend.

    A parameter's stream depends on its name and the seed only, so adding a part leaves the others as they were.
    `active_adapters`: for checks of gradients, no factor of an adapter is zero, as the second ones are at first, and
    residual streams differ, which begin as copies.
    """
    table = parameter_table(spec)
    if active_adapters:
        table = tuple(replace(row, initializer=_active(row)) for row in table)
    return {row.name: initial_value(row, seed) for row in table}


_STREAMS = {
    **dict.fromkeys(("b_read", "b_write", "b_mix"), Initializer("uniform", value=1.0)),
    **dict.fromkeys(("read_scale", "write_scale", "mix_scale"), Initializer("constant", value=1.0)),
}
"""Of hyper-connections."""


def _active(row: Parameter) -> Initializer:
    if row.base is not None:
        return Initializer("uniform", value=0.2)
    return _STREAMS.get(row.name.rpartition(".")[2], row.initializer)


def initial_value(row: Parameter, seed: int) -> NDArray[np.float32]:
    """The initial value of one parameter."""
    value = row.initializer.value
    match row.initializer.kind:
        case "constant":
            return np.full(row.shape, value, np.float32)
        case "normal":
            return (row.initializer.std * _generator(row, seed).standard_normal(row.shape)).astype(np.float32)
        case "hash_table":
            return _hash_table(row, seed)
        case "uniform":
            return _generator(row, seed).uniform(-value, value, row.shape).astype(np.float32)
        case "log_rate":
            return np.log(_generator(row, seed).uniform(1.0, value, row.shape)).astype(np.float32)
        case "step_bias":
            step = np.exp(_generator(row, seed).uniform(np.log(value / 100), np.log(value), row.shape))
            return np.log(np.expm1(step)).astype(np.float32)


def _generator(row: Parameter, seed: int) -> np.random.Generator:
    key = int.from_bytes(hashlib.sha256(f"{seed}/{row.name}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def _hash_table(row: Parameter, seed: int) -> NDArray[np.float32]:
    """[V, K]: in each row K different experts; in the first column each expert equally often, but for the rest."""
    (rows, columns), experts = row.shape, int(row.initializer.value)
    generator = _generator(row, seed)
    first = generator.permutation(np.arange(rows) % experts)
    shifts = np.array([generator.permutation(np.arange(1, experts))[: columns - 1] for _ in range(rows)]).reshape(
        rows, -1
    )
    table = np.concatenate([first[:, None], (first[:, None] + shifts) % experts], axis=1)
    return table.astype(np.float32)
