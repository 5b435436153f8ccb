"""Recomputation of experts or blocks in the backward pass (activation checkpointing, remat).

Spec: moezoo.core.config.training.TrainingConfig.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, assert_never

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map, tree_unflatten

from moezoo.core.config.training import Rematerialize
from moezoo.core.spec import MoESpec
from moezoo.mlx_backend.dispatch import Dispatch
from moezoo.mlx_backend.experts import Experts
from moezoo.mlx_backend.kernels.segments import copied
from moezoo.mlx_backend.layer import WrapBlock
from moezoo.mlx_backend.moe import Exchange, run_experts
from moezoo.mlx_backend.routing import Routing
from moezoo.mlx_backend.runtime.typed import custom_function, flatten

_BLOCKS = ("attention", "moe", "feed_forward", "ngram_embeddings")


class Transforms(NamedTuple):
    """Transforms of a model's layers in a training step: arguments of Transformer."""

    exchange: Exchange | None
    wrap_block: WrapBlock | None


def transforms(what: Rematerialize) -> Transforms:
    """Return the transforms of a training step that recomputes the experts, or each block, in the backward pass.

    Blocks are each attention, MoE, feed-forward and n-gram embedding.
    """
    match what:
        case "none":
            return Transforms(None, None)
        case "experts":
            return Transforms(_recomputed_experts, None)
        case "block":
            return Transforms(None, _recomputed_block)
        case _:
            assert_never(what)


def _recomputed_block(block: nn.Module, name: str) -> Callable[..., Any]:
    """Return a block of which the backward pass stores only the inputs. Its intermediates are not recorded."""
    if name not in _BLOCKS:
        return block

    def call(*inputs: Any, record: Any = None, name: str = "", **named: Any) -> Any:
        return _recomputed(block, lambda inputs: block(*inputs[0], **inputs[1]), (inputs, named))

    return call


def _recomputed_experts(
    spec: MoESpec,
    experts: Experts,
    x_PD: mx.array,
    routing: Routing,
    dispatched: Dispatch,
    *,
    num_sequences: int,
    inference: bool,
) -> mx.array:
    """Run the experts; the backward pass stores only the inputs."""
    out_PD: mx.array = _recomputed(experts, lambda inputs: run_experts(spec, experts, *inputs), (x_PD, dispatched))
    return out_PD


def _recomputed(module: nn.Module, function: Callable[[Any], Any], inputs: Any) -> Any:
    """Return `function(inputs)`, a tree of arrays; nothing that it computes on the way is kept.

    Gradients are those of the floating arrays of `inputs`, and of the parameters that the module trains.

    Trap: while MLX traces, an array that was computed holds all that it was computed from. So what leaves here is
    computed and copied: with `mx.checkpoint`, what a kernel has to evaluate on the way would stay, in both passes.
    """
    own = module.trainable_parameters()
    paths, parameters = [path for path, _ in flatten(own)], [value for _, value in flatten(own)]
    left: list[Any] = []

    @custom_function
    def forward(*arrays: mx.array) -> list[mx.array]:
        results = function(inputs)
        left.append(_filled(results, iter(copied(_arrays(results))), _is_array))
        return [value for value in _arrays(left[0]) if _is_floating(value)]

    @forward.vjp
    def _(primals: Any, gradients: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        def again(*arrays: mx.array) -> list[mx.array]:
            given = iter(arrays)
            module.update(tree_unflatten(list(zip(paths, given, strict=False))))
            results = function(_filled(inputs, given, _is_floating))
            module.update(own)
            # Trap: MLX's vjp takes one gradient of an array that is returned twice. So each is made another one.
            return [value * 1 for value in _arrays(results) if _is_floating(value)]

        arrays = [primals] if isinstance(primals, mx.array) else list(primals)
        return copied(mx.vjp(again, arrays, gradients)[1])

    outputs = forward(*parameters, *(value for value in _arrays(inputs) if _is_floating(value)))
    return _filled(left.pop(), iter(outputs), _is_floating)


def _is_array(value: Any) -> bool:
    return isinstance(value, mx.array)


def _is_floating(value: Any) -> bool:
    return _is_array(value) and mx.issubdtype(value.dtype, mx.floating)


def _arrays(tree: Any) -> list[mx.array]:
    """Return the arrays of a tree, in order."""
    found: list[mx.array] = []
    tree_map(lambda value: found.append(value) if _is_array(value) else None, tree)
    return found


def _filled(tree: Any, values: Iterator[mx.array], replaces: Callable[[Any], bool]) -> Any:
    """Return the tree with other arrays in place of those that `replaces` is true of, in order."""
    return tree_map(lambda value: next(values) if replaces(value) else value, tree)
