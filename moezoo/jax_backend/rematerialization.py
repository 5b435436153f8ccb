"""Blocks that the way back computes again. Only here: MLX refuses `rematerialize: block`.

Spec: moezoo.core.config.TrainingConfig.
"""

from functools import partial
from typing import Any

import jax
from flax import nnx

from moezoo.jax_backend.transformer import Transformer

_FIXED = ("inference", "name")  # arguments that are no arrays


class _Recomputed(nnx.Module):
    """A block of which the way back keeps only what enters it. Its intermediates are not recorded."""

    def __init__(self, block: nnx.Module):
        self.block = block

    def __call__(self, *given: Any, record: Any = None, **named: Any) -> Any:
        fixed = {name: named.pop(name) for name in _FIXED if name in named}
        return jax.checkpoint(partial(self.block, **fixed))(*given, **named)


def recomputed(module: Transformer) -> Transformer:
    """The module with each attention, mixture and feed-forward so; it is changed in place."""
    for layer in module.layers:
        for name in ("attention", "moe", "feed_forward"):
            if hasattr(layer, name):
                setattr(layer, name, _Recomputed(getattr(layer, name)))
    return module


def compiler_options() -> dict[str, str]:
    """Of a training step.

    Trap: on the CPU, XLA drops optimization barriers before it merges and fuses computations. It would keep what
    `jax.checkpoint` asks to compute again, and compute again what a barrier asks to keep.
    """
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if jax.default_backend() == "cpu" else {}
