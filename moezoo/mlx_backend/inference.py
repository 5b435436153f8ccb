"""A built model in MLX, as far as nothing is trained: forward pass, scores and generation."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from moezoo.core.backend import Output, Scores
from moezoo.core.checkpoint.safetensors_file import shapes_of
from moezoo.core.checkpoint.store import check_names_and_shapes
from moezoo.core.interventions.masks import check_masks
from moezoo.core.layer_routing import LayerRouting, check_forced, layer_routing
from moezoo.core.parameters import parameter_table
from moezoo.core.random import Bits
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.core.reuse import NO_REUSE, Reuse
from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import ExpertMasks, check_documents, check_targets
from moezoo.mlx_backend.adapter import BASE, Adapted
from moezoo.mlx_backend.arrays import Weights, named, to_numpy
from moezoo.mlx_backend.dispatch import expert_counts, num_dropped
from moezoo.mlx_backend.distributed import data_parallel
from moezoo.mlx_backend.generation import Extend, Generation, Step, choose, prefilled
from moezoo.mlx_backend.kernels.codes import named_codes
from moezoo.mlx_backend.kernels.x86.token import token_step
from moezoo.mlx_backend.kv_cache import Caches
from moezoo.mlx_backend.losses import loss_terms, token_losses
from moezoo.mlx_backend.positions import packed_documents
from moezoo.mlx_backend.quantization import QuantizedArray, dequantize, is_surely_finite
from moezoo.mlx_backend.runtime.typed import to_float, to_int, to_ints
from moezoo.mlx_backend.sampling import Rule
from moezoo.mlx_backend.transformer import Forward, Transformer


class MlxInference:
    """A module that holds its parameters; the canonical name of a parameter is its path in the module."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, np.ndarray]):
        table = parameter_table(spec)
        check_names_and_shapes(shapes_of(weights), {row.name: row.shape for row in table}, "the model")
        self.spec = spec
        self._module = Transformer(spec, Weights(weights))
        self._state_names = [row.name for row in table if not row.trained]
        for name in self._state_names:
            path, _, leaf = name.rpartition(".")
            self._inside(path).freeze(keys=[leaf], recurse=False)
        mx.eval(self._module.parameters())

    def forward(
        self,
        tokens: np.ndarray,
        targets: np.ndarray | None = None,
        *,
        forced: Sequence[np.ndarray] | None = None,
        masks: Sequence[ExpertMasks] | None = None,
        record: bool = False,
        key: Bits | None = None,
        inference: bool = False,
        documents: np.ndarray | None = None,
    ) -> Output:
        check_documents(tokens, targets, documents)
        check_forced(self.spec, tokens, forced)
        check_masks(self.spec, tokens, masks)
        if targets is not None:
            check_targets(tokens, targets)
        intermediates: dict[str, mx.array] = {}
        result = self._module(
            mx.array(tokens),
            forced=flatten_forced(forced),
            masks=masks,
            record=intermediates,
            key=None if key is None else mx.array(key),
            inference=inference,
            document_BT=None if documents is None else mx.array(documents),
        )
        packed = None if documents is None else packed_documents(mx.array(documents))
        terms = {} if targets is None else self._terms(result, mx.array(targets), documents=packed)
        _, terms = data_parallel.averaged({}, terms)
        mx.eval(result.logits_BTV, result.routings, terms, intermediates if record else {})
        return Output(
            np.array(result.logits_BTV),
            layer_routings(self.spec, routing_values(result), tokens.shape),
            {name: to_float(value) for name, value in terms.items()},
            to_numpy(intermediates) if record else {},
        )

    def _terms(self, result: Forward, targets: mx.array, **of_step: Any) -> dict[str, mx.array]:
        """Return every loss term; `of_step`: what a micro-batch's loss needs of the whole step (`loss_terms`)."""
        losses = result.index_losses
        return loss_terms(self.spec, result.logits_BTV, targets, result.routings, index_losses=losses, **of_step)

    def score(
        self,
        tokens: np.ndarray,
        targets: np.ndarray,
        *,
        inference: bool = False,
        documents: np.ndarray | None = None,
        forced: Sequence[np.ndarray] | None = None,
        masks: Sequence[ExpertMasks] | None = None,
        routing: bool = False,
    ) -> Scores:
        check_documents(tokens, targets, documents)
        check_forced(self.spec, tokens, forced)
        check_masks(self.spec, tokens, masks)
        own_tokens, own_targets = data_parallel.own_part(tokens), data_parallel.own_part(targets)
        document_BT = None if documents is None else mx.array(data_parallel.own_part(documents))
        own_forced = None if forced is None else flatten_forced([data_parallel.own_part(expert) for expert in forced])
        own_masks = None if masks is None else [_own_masks(own) for own in masks]
        given: dict[str, Any] = {"forced": own_forced, "masks": own_masks, "inference": inference}
        result = self._module(mx.array(own_tokens), **given, document_BT=document_BT)
        losses = token_losses(result.logits_BTV, mx.array(own_targets))
        load, dropped = routing_load(result)
        values = routing_values(result) if routing else []
        if len(own_tokens) < len(tokens):
            losses = data_parallel.whole_batch(losses)
            load, dropped = data_parallel.summed(load, dropped)
            values = [tuple(map(data_parallel.whole_batch, own)) for own in values]
        with data_parallel.lost_peer():
            mx.eval(losses, load, dropped, values)
        return Scores(
            np.array(losses),
            [np.array(sizes, np.int64) for sizes in load],
            [to_int(count) for count in dropped],
            layer_routings(self.spec, values, tokens.shape) if routing else [],
        )

    def start_generation(
        self, prompts: Sequence[np.ndarray], new_tokens: int, options: SamplingOptions, reuse: Reuse = NO_REUSE
    ) -> Generation:
        return Generation(self.spec, self._extended, self._decoded(), prompts, new_tokens, options, reuse)

    def prefill(self, tokens: np.ndarray, size: int) -> tuple[np.ndarray, Caches]:
        logits, caches = prefilled(self.spec, self._extended, list(tokens), size)
        return np.array(logits), caches

    def decode(self, tokens: np.ndarray, cache: Caches) -> tuple[np.ndarray, Caches]:
        logits, cache = self._extended_by_one()(mx.array(tokens[:, None]), cache)
        mx.eval(logits, cache)
        return np.array(logits), cache

    def _extended(self, tokens: mx.array, caches: Caches) -> tuple[mx.array, Caches]:
        """Return the logits after the last of the tokens, and the extended caches."""
        result = self._module(tokens, caches=caches)
        assert result.caches is not None
        return result.logits_BTV[:, -1], result.caches

    def _extended_by_one(self) -> Extend:
        """Return `_extended` for single tokens with the parameters of now, by NumPy where that is faster."""
        step = token_step(self.spec, self._named(), self._codes())

        def extended(tokens: mx.array, caches: Caches) -> tuple[mx.array, Caches]:
            if step is None or caches.first_B is not None:  # rows with padding have a mask each
                return self._extended(tokens, caches)
            return step(np.asarray(tokens)[:, 0], caches)

        return extended

    def _decoded(self) -> Step:
        """Return the step of a generation."""
        extended = self._extended_by_one()

        def step(
            tokens: mx.array, caches: Caches, rule: Rule, seen: mx.array | None, draw: mx.array | None
        ) -> tuple[mx.array, mx.array, mx.array | None, Caches]:
            """Return the next tokens, the model's logits, which tokens each row has, and caches."""
            logits, caches = extended(tokens[:, None], caches)
            return *choose(logits, rule, seen, draw), caches

        return step

    def wait(self) -> None:
        mx.eval(self._module.state)
        mx.synchronize()

    def nonfinite_parameters(self) -> list[str]:
        arrays, codes = self._named(), self._codes()
        names = [row.name for row in parameter_table(self.spec)]
        finite = to_ints(
            mx.stack(
                [is_surely_finite(codes[name]) if name in codes else mx.isfinite(arrays[name]).all() for name in names]
            )
        )
        unsure = [name for name, good in zip(names, finite, strict=True) if not good]
        return [name for name in unsure if not self._is_finite_decoded(name)]

    def _is_finite_decoded(self, name: str) -> bool:
        """Return True for codes whose numbers are finite, although those of larger codes would not be."""
        value = self._codes().get(name)
        return value is not None and bool(mx.isfinite(dequantize(value)).all().item())

    # --- the module and its arrays -----------------------------------------------------------------------------------

    def _inside(self, path: str) -> nn.Module:
        """The module at a canonical path."""
        module: Any = self._module
        for step in path.split("."):
            module = module[int(step)] if step.isdigit() else module[step]
        assert isinstance(module, nn.Module)
        return module

    def _named(self) -> dict[str, mx.array]:
        return named(self._module.parameters())

    def _codes(self) -> dict[str, QuantizedArray]:
        """Return the parameters that stay in codes, by name."""
        return named_codes(self._module)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds a parameter, and its attribute there."""
        path, _, leaf = name.rpartition(".")
        module = self._inside(path)
        held = module[leaf]
        return (held, BASE.removeprefix(".")) if isinstance(held, Adapted) else (module, leaf)

    def _value(self, name: str) -> mx.array:
        module, leaf = self._place(name)
        value: mx.array = module[leaf]
        return value


def flatten_forced(forced: Sequence[np.ndarray] | None) -> list[mx.array] | None:
    """Reshape experts [B, T, K] to [P, K]."""
    return (
        None
        if forced is None
        else [mx.array(expert.astype(np.int32).reshape(-1, expert.shape[-1])) for expert in forced]
    )


def _own_masks(masks: ExpertMasks) -> ExpertMasks:
    return ExpertMasks(*(None if mask is None else data_parallel.own_part(mask) for mask in masks))


def routing_load(result: Forward) -> tuple[list[mx.array], list[mx.array]]:
    """Return, per MoE layer, the tokens of each expert, and the number of dropped assignments."""
    load = [expert_counts(routing) for routing in result.routings]
    dropped = [num_dropped(*pair) for pair in zip(result.routings, result.dispatches, strict=True)]
    return load, dropped


def routing_values(result: Forward) -> list[tuple[mx.array, ...]]:
    """Return, per MoE layer, the arguments of `layer_routing`, of all tokens."""
    values: list[tuple[mx.array, ...]] = []
    for routing, dispatched in zip(result.routings, result.dispatches, strict=True):
        kept_PK = routing.valid_PK if dispatched is None else dispatched.kept_PK
        slots = (routing.expert_PK, routing.valid_PK, kept_PK, routing.weight_PK)
        values.append((*slots, routing.score_PE, routing.selection_PE))
    return values


def layer_routings(spec: ModelSpec, values: Sequence[Sequence[mx.array]], shape: tuple[int, ...]) -> list[LayerRouting]:
    """Return the routing of tokens [B, T] from `routing_values` of these or more."""
    layers = zip(spec.moe_layers, values, strict=True)
    return [layer_routing(layer, shape, *(np.array(value) for value in own)) for layer, own in layers]
