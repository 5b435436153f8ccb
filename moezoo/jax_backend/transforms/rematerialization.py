"""Recomputation of experts or blocks in the backward pass (activation checkpointing, remat).

Spec: moezoo.core.config.training.TrainingConfig.
"""

from functools import partial
from typing import Any, NamedTuple, assert_never

import jax
from flax import nnx
from jax import lax

from moezoo.core.config.training import Rematerialize
from moezoo.core.spec import MoESpec
from moezoo.jax_backend.dispatch import Dispatch
from moezoo.jax_backend.distributed.sharding import Placement, gather_blocks
from moezoo.jax_backend.experts import Experts
from moezoo.jax_backend.layer import WrapBlock
from moezoo.jax_backend.moe import Exchange, run_experts
from moezoo.jax_backend.routing import Routing
from moezoo.jax_backend.runtime.placement import active_placement
from moezoo.jax_backend.runtime.platform import platform
from moezoo.jax_backend.runtime.typed import GraphDef, State

_BLOCKS = ("attention", "moe", "feed_forward", "ngram_embeddings")


class Transforms(NamedTuple):
    """Transforms of a model's layers in a training step: arguments of Transformer."""

    exchange: Exchange | None
    wrap_block: WrapBlock | None


def transforms(what: Rematerialize, placement: Placement | None, exchange: Exchange | None) -> Transforms:
    """Return the transforms of a training step that recomputes the experts, or each block, in the backward pass.

    Blocks are each attention, MoE, feed-forward and n-gram embedding; those of scanned layers too. On a mesh, each
    block also all-gathers its parameters.
    """
    match what:
        case "none":
            return Transforms(exchange, None if placement is None else gather_blocks(placement))
        case "experts":
            wrap = None if placement is None else gather_blocks(placement)
            return Transforms(RecomputedExperts(exchange), wrap)
        case "block":
            wrap = None if placement is None else gather_blocks(placement, _BLOCKS)
            return Transforms(exchange, partial(_recomputed_block, wrap))
        case _:
            assert_never(what)


# --- blocks ----------------------------------------------------------------------------------------------------------


def _recomputed_block(wrap: WrapBlock | None, block: nnx.Module, name: str) -> Any:
    wrapped: Any = block if wrap is None else wrap(block, name)
    return _RecomputedBlock(wrapped) if name.rpartition(".")[2] in _BLOCKS else wrapped


class _RecomputedBlock:
    """A block of which the backward pass stores only the inputs. Its intermediates are not recorded."""

    def __init__(self, block: nnx.Module):
        self.block = block

    def __call__(self, *inputs: Any, record: Any = None, name: str = "", exchange: Any = None, **named: Any) -> Any:
        graph, state = nnx.split(self.block)
        return _computed(graph, state, inputs, named, exchange, active_placement())


@partial(jax.jit, static_argnames=("graph", "exchange", "placement"))
def _computed(graph: GraphDef, state: State, inputs: Any, named: dict[str, Any], exchange: Any, placement: Any) -> Any:
    """Compute a block. Blocks that are equal but for their numbers are traced once, and called as a function.

    `placement` is the active one: a block that was traced for another one may not be reused.
    """
    static = {} if exchange is None else {"exchange": exchange}

    def block(state: State, inputs: Any, named: dict[str, Any]) -> Any:
        return nnx.merge(graph, state)(*inputs, **named, **static)

    return jax.checkpoint(block)(state, inputs, named)


# --- experts ---------------------------------------------------------------------------------------------------------


class RecomputedExperts:
    """An exchange of which the backward pass stores only the inputs: it runs the all-to-all once more."""

    def __init__(self, exchange: Exchange | None):
        """`exchange`: the one to recompute; None: `run_experts` on one device."""
        self.exchange = exchange

    def __call__(
        self,
        spec: MoESpec,
        experts: Experts,
        x_PD: jax.Array,
        routing: Routing,
        dispatched: Dispatch,
        *,
        num_sequences: int,
        inference: bool,
    ) -> jax.Array:
        graph, state = nnx.split(experts)
        if self.exchange is not None:
            # Each device sorts the assignments of its own tokens. The order of all is not stored: it would be gathered.
            absent: dict[str, Any] = dict.fromkeys(("token_R", "expert_R", "weight_R", "size_E"))
            dispatched = dispatched._replace(**absent)
        call = _Call(self.exchange, spec, graph, num_sequences, inference)
        return _recomputed_experts(call, state, (x_PD, routing, dispatched))


class _Call(NamedTuple):
    """A call of an exchange, but for its arrays."""

    exchange: Exchange | None
    spec: MoESpec
    graph: GraphDef
    num_sequences: int
    inference: bool

    def __call__(self, state: State, inputs: tuple[jax.Array, Routing, Dispatch]) -> jax.Array:
        experts, (x_PD, routing, dispatched) = nnx.merge(self.graph, state), inputs
        if self.exchange is None:
            return run_experts(self.spec, experts, x_PD, dispatched)
        options = {"num_sequences": self.num_sequences, "inference": self.inference}
        return self.exchange(self.spec, experts, x_PD, routing, dispatched, **options)


# Trap: `jax.checkpoint` inside another one stores what the outer one's policy says. On a mesh there is an outer one.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed_experts(call: _Call, state: State, inputs: tuple[jax.Array, Routing, Dispatch]) -> jax.Array:
    return call(state, inputs)


def _experts_forward(call: _Call, state: State, inputs: Any) -> tuple[jax.Array, Any]:
    return call(state, inputs), (state, inputs)


@partial(jax.jit, static_argnames=("call",))
def _experts_backward(call: _Call, stored: Any, gradient_PD: jax.Array) -> Any:
    """Traced once for equal layers, for the reasons of `_computed`."""
    # Without the barrier, XLA would find that it was all computed before, and keep that.
    _, pull = jax.vjp(call.__call__, *lax.optimization_barrier(stored))
    return pull(gradient_PD)


_recomputed_experts.defvjp(_experts_forward, _experts_backward)


def compiler_options(*, rematerialize: bool) -> dict[str, str]:
    """Return XLA's options for a training step.

    Trap: on the CPU, XLA drops optimization barriers before it merges and fuses computations. It would recompute what a
    barrier asks to keep.

    Trap: it also copies called functions into the step, and then has the gradients of all layers at once before it adds
    those of the next micro-batch to them. A call that stays one returns its own before the next one begins, and what it
    recomputes is not merged with what was computed before.
    """
    if platform() != "cpu":
        return {}
    left_out = ["cse_barrier_expander", *(["call-inliner"] if rematerialize else [])]
    return {"xla_disable_hlo_passes": ",".join(left_out)}


def decoding_options() -> dict[str, str | bool]:
    """Return XLA's options for a decoding step.

    On the CPU most of its operations take a few microseconds, less than handing them to another thread; and it would
    compute the cosines of a rotation again for each head without barriers, as above.
    """
    options = compiler_options(rematerialize=False)
    return {**options, "xla_cpu_enable_concurrency_optimized_scheduler": False} if options else {}
