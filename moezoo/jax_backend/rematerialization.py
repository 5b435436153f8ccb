"""Blocks that the way back computes again. Only here: MLX refuses `rematerialize: block`.

Spec: moezoo.core.config.TrainingConfig.
"""

from functools import partial
from typing import Any

import jax
from flax import nnx

from moezoo.jax_backend.platform import platform
from moezoo.jax_backend.sharding import Placement, active_placement
from moezoo.jax_backend.transformer import Transformer


@partial(jax.jit, static_argnames=("graph", "inference", "placement"))
def _computed(
    graph: nnx.GraphDef,
    state: nnx.State,
    given: Any,
    named: dict[str, Any],
    inference: bool | None,
    placement: Placement | None,
) -> Any:
    """What a block gives. Blocks that are equal but for their numbers are traced once, and called as a function.

    `placement` is the one that is active: what was traced for another may exchange tokens in another way.
    """

    def block(state: nnx.State, given: Any, named: dict[str, Any]) -> Any:
        fixed = {} if inference is None else {"inference": inference}
        return nnx.merge(graph, state)(*given, **named, **fixed)

    return jax.checkpoint(block)(state, given, named)


class _Recomputed(nnx.Module):
    """A block of which the way back keeps only what enters it. Its intermediates are not recorded."""

    def __init__(self, block: nnx.Module):
        self.block = block

    def __call__(
        self, *given: Any, record: Any = None, name: str = "", inference: bool | None = None, **named: Any
    ) -> Any:
        graph, state = nnx.split(self.block)
        return _computed(graph, state, given, named, inference, active_placement())


def recomputed(module: Transformer) -> Transformer:
    """The module with each attention, mixture and feed-forward so, those of scanned layers too; changed in place."""
    for layer in module.layers.values() if isinstance(module.layers, nnx.Dict) else module.layers:
        for name in ("attention", "moe", "feed_forward"):
            if hasattr(layer, name):
                setattr(layer, name, _Recomputed(getattr(layer, name)))
    return module


def compiler_options(*, rematerialize: bool) -> dict[str, str]:
    """Of a training step.

    Trap: on the CPU, XLA drops optimization barriers before it merges and fuses computations. It would compute again
    what a barrier asks to keep.

    Trap: it also copies called functions into the step, and then has the gradients of all layers at once before it adds
    those of the next micro-batch to them. A call that stays one gives its own before the next one begins, and what it
    computes again is not merged with what was computed before.
    """
    if platform() != "cpu":
        return {}
    left_out = ["cse_barrier_expander", *(["call-inliner"] if rematerialize else [])]
    return {"xla_disable_hlo_passes": ",".join(left_out)}
