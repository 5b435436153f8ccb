"""Experts or blocks that the way back computes again. Spec: moezoo.core.config.training.TrainingConfig."""

from functools import partial
from typing import Any, NamedTuple, assert_never

import jax
from flax import nnx
from jax import lax

from moezoo.core.config.training import Rematerialize
from moezoo.core.spec import MoESpec
from moezoo.jax_backend.dispatch import Dispatch
from moezoo.jax_backend.distributed.expert_parallel import Through, on_their_devices
from moezoo.jax_backend.distributed.sharding import Placement, gathered
from moezoo.jax_backend.experts import Experts
from moezoo.jax_backend.routing import Routing
from moezoo.jax_backend.runtime.placement import active_placement
from moezoo.jax_backend.runtime.platform import platform
from moezoo.jax_backend.transformer import Transformer


@partial(jax.jit, static_argnames=("graph", "placement"))
def _computed(
    graph: nnx.GraphDef,
    state: nnx.State,
    given: Any,
    named: dict[str, Any],
    placement: Placement | None,
) -> Any:
    """What a block gives. Blocks that are equal but for their numbers are traced once, and called as a function.

    `placement` is the one that is active: what was traced for another may exchange tokens in another way.
    """

    def block(state: nnx.State, given: Any, named: dict[str, Any]) -> Any:
        return nnx.merge(graph, state)(*given, **named)

    return jax.checkpoint(block)(state, given, named)


class _Recomputed(nnx.Module):
    """A block of which the way back keeps only what enters it. Its intermediates are not recorded."""

    def __init__(self, block: nnx.Module):
        self.block = block

    def __call__(self, *given: Any, record: Any = None, name: str = "", **named: Any) -> Any:
        graph, state = nnx.split(self.block)
        return _computed(graph, state, given, named, active_placement())


def _on_their_devices_again(
    through: Through, spec: MoESpec, experts: Experts, *given: Any, num_sequences: int, inference: bool
) -> jax.Array:
    """`on_their_devices`, of which the way back keeps what enters it; copies are exchanged once more."""
    graph, state = nnx.split(experts)
    x_PD, routing, dispatched = given
    if active_placement() is not None:
        # Each device sorts the copies of its own tokens. The order of all is not to be kept: it would be gathered.
        dispatched = dispatched._replace(**dict.fromkeys(("token_R", "expert_R", "weight_R", "size_E")))
    way = _Way(through, spec, graph, num_sequences, inference)
    return _through_experts(way, state, (x_PD, routing, dispatched))


class _Way(NamedTuple):
    """What `on_their_devices` is given beside arrays."""

    through: Through
    spec: MoESpec
    graph: nnx.GraphDef
    num_sequences: int
    inference: bool

    def __call__(self, state: nnx.State, given: tuple[jax.Array, Routing, Dispatch]) -> jax.Array:
        experts, options = nnx.merge(self.graph, state), {"inference": self.inference}
        return on_their_devices(self.through, self.spec, experts, *given, num_sequences=self.num_sequences, **options)


# Trap: `jax.checkpoint` inside another one keeps what the outer one's policy says. On a mesh there is an outer one.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through_experts(way: _Way, state: nnx.State, given: tuple[jax.Array, Routing, Dispatch]) -> jax.Array:
    return way(state, given)


def _experts_forward(way: _Way, state: nnx.State, given: Any) -> tuple[jax.Array, Any]:
    return way(state, given), (state, given)


def _experts_backward(way: _Way, entered: Any, gradient_PD: jax.Array) -> Any:
    return _experts_gradients(way, entered, gradient_PD, active_placement())


@partial(jax.jit, static_argnames=("way", "placement"))
def _experts_gradients(way: _Way, entered: Any, gradient_PD: jax.Array, placement: Placement | None) -> Any:
    """A function that is called, for the reasons of `_computed`."""
    # Without the barrier, XLA would find that it was all computed before, and keep that.
    _, pull = jax.vjp(way, *lax.optimization_barrier(entered))
    return pull(gradient_PD)


_through_experts.defvjp(_experts_forward, _experts_backward)


def recomputed(module: Transformer, what: Rematerialize) -> Transformer:
    """The module so that the way back computes that again; changed in place, for a mesh as well.

    Blocks are each attention, mixture and feed-forward; those of scanned layers too.
    """
    layers = list(module.layers.values() if isinstance(module.layers, nnx.Dict) else module.layers)
    match what:
        case "none":
            return gathered(module)
        case "experts":
            for layer in layers:
                if hasattr(layer, "moe"):
                    layer.moe.on_their_devices = _on_their_devices_again
            return gathered(module)
        case "block":
            blocks = ("attention", "moe", "feed_forward")
            module = gathered(module, blocks)
            for layer in layers:
                for name in blocks:
                    if hasattr(layer, name):
                        setattr(layer, name, _Recomputed(getattr(layer, name)))
            return module
        case _:
            assert_never(what)


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
