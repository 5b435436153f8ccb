"""A built model in JAX, as far as nothing is trained: forward pass, scores and generation."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moezoo.core.backend import Output, Scores
from moezoo.core.checkpoint.safetensors_file import shapes_of
from moezoo.core.checkpoint.store import check_names_and_shapes
from moezoo.core.config.training import Rematerialize
from moezoo.core.generation.prefill import widths
from moezoo.core.interventions.masks import check_masks
from moezoo.core.layer_routing import LayerRouting, check_forced, layer_routing
from moezoo.core.parameters import parameter_table
from moezoo.core.random import Bits
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.core.reuse import NO_REUSE, Reuse
from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import ExpertMasks, check_documents, check_targets
from moezoo.jax_backend.arrays import Weights, named
from moezoo.jax_backend.dispatch import expert_counts, num_dropped
from moezoo.jax_backend.distributed.expert_parallel import ExpertParallel
from moezoo.jax_backend.distributed.sharding import Placement, gather_outside_layers
from moezoo.jax_backend.generation import SMALLEST, Generation, choose, drawn, prefilled
from moezoo.jax_backend.kv_cache import Caches
from moezoo.jax_backend.losses import loss_terms, token_losses
from moezoo.jax_backend.positions import packed_documents
from moezoo.jax_backend.quantization import QuantizedArray, dequantize, is_surely_finite
from moezoo.jax_backend.runtime.memory import returning_memory
from moezoo.jax_backend.runtime.processes import on_host
from moezoo.jax_backend.runtime.typed import GraphDef, State
from moezoo.jax_backend.sampling import Rule
from moezoo.jax_backend.transformer import Forward, Transformer
from moezoo.jax_backend.transforms.rematerialization import Transforms, compiler_options, decoding_options, transforms
from moezoo.jax_backend.transforms.scanned_layers import Stacks

Parameters = dict[str, jax.Array]
Array = TypeVar("Array", np.ndarray, jax.Array)


class JaxInference:
    """Parameters as a dict of canonical names; the module is merged inside each compiled function."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, np.ndarray], placement: Placement | None = None):
        """On the devices of a placement, else on the first one."""
        rows = {row.name: row.shape for row in parameter_table(spec)}
        check_names_and_shapes(shapes_of(weights), rows, "the model")
        self.spec = spec
        self._placement = placement
        self._exchange = None if placement is None else ExpertParallel(placement)
        self._stacks = Stacks(spec, placement=placement)
        on_devices = weights if placement is None else placement.shard(weights)
        self._parameters, self._state = self._split(Transformer(spec, Weights(on_devices)))
        self._codes = [name for name, value in self._parameters.items() if isinstance(value, QuantizedArray)]
        # Codes are decoded behind barriers, which one product after the other keeps.
        options = compiler_options(rematerialize=False) if self._codes else None
        self._forward = jax.jit(self._forward_values, static_argnames=("record", "inference"), compiler_options=options)
        static = ("count", "inference", "routing")
        self._score = jax.jit(self._score_values, static_argnames=static, compiler_options=options)
        self._extend = jax.jit(self._extend_values, donate_argnums=3, compiler_options=options)
        self._decode = jax.jit(self._decode_values, donate_argnums=(3, 5), compiler_options=decoding_options())
        self._finite = jax.jit(self._finite_values, out_shardings=None if placement is None else placement.replicated)

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
        inputs = (self._parameters, self._state, tokens, targets, flatten_forced(forced), masks, key, documents)
        with self._traced(len(tokens)):
            result, terms, intermediates = on_host(self._forward(*inputs, record=record, inference=inference))
        return Output(
            result.logits_BTV,
            layer_routings(self.spec, routing_values(result), tokens.shape),
            {name: float(value) for name, value in terms.items()},
            {name: np.asarray(value, np.float32) for name, value in intermediates.items()},
        )

    def _forward_values(
        self,
        parameters: Parameters,
        state: Parameters,
        tokens: jax.Array,
        targets: jax.Array | None,
        forced: Sequence[jax.Array] | None,
        masks: Sequence[ExpertMasks] | None,
        key: jax.Array | None,
        documents: jax.Array | None,
        *,
        record: bool,
        inference: bool,
    ) -> tuple[Forward, Parameters, Parameters]:
        intermediates: dict[str, jax.Array] = {}
        module, exchange = self._merge(parameters, state), None if self._sharded(tokens) is None else self._exchange
        result = module(
            tokens,
            forced=forced,
            masks=masks,
            record=intermediates,
            key=key,
            inference=inference,
            document_BT=documents,
            exchange=exchange,
        )
        terms = {} if targets is None else self._terms(result, targets, documents=packed_documents(documents))
        return result._replace(index_losses=[]), terms, intermediates if record else {}

    def _terms(self, result: Forward, targets: jax.Array, **of_step: Any) -> Parameters:
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
        count = len(tokens)
        batch: Any = (tokens, targets, documents, *(None if own is None else list(own) for own in (forced, masks)))
        if self._placement is not None:
            filled = self._placement.padded_batch(count)
            batch = jax.tree.map(lambda rows: np.resize(rows, (filled, *rows.shape[1:])), batch)  # the same again
        with self._traced(len(batch[0])):
            inputs = (self._parameters, self._state, *batch)
            values = self._score(*inputs, count=count, inference=inference, routing=routing)
        losses, load, dropped, routings = on_host(values)
        return Scores(
            losses[:count],
            [np.asarray(sizes, np.int64) for sizes in load],
            [int(number) for number in dropped],
            layer_routings(self.spec, routings, tokens.shape) if routing else [],
        )

    def _score_values(
        self,
        parameters: Parameters,
        state: Parameters,
        tokens: jax.Array,
        targets: jax.Array,
        documents: jax.Array | None,
        forced: Sequence[jax.Array] | None,
        masks: Sequence[ExpertMasks] | None,
        *,
        count: int,
        inference: bool,
        routing: bool,
    ) -> tuple[jax.Array, list[jax.Array], list[jax.Array], list[tuple[jax.Array, ...]]]:
        """Score the first `count` sequences; those after them pad the batch, and their losses are ignored."""
        module, how = self._transformed(parameters, state, tokens)
        given: dict[str, Any] = {"forced": flatten_forced(forced), "masks": masks, "inference": inference}
        result = module(tokens, **given, document_BT=documents, **how._asdict())
        if count < len(tokens):
            counted_P = jnp.arange(tokens.size) < count * tokens.shape[1]
            routings = [own._replace(valid_PK=own.valid_PK & counted_P[:, None]) for own in result.routings]
            result = result._replace(routings=routings)
        values = routing_values(result) if routing else []
        return token_losses(result.logits_BTV, targets), *routing_load(result), values

    def start_generation(
        self, prompts: Sequence[np.ndarray], new_tokens: int, options: SamplingOptions, reuse: Reuse = NO_REUSE
    ) -> Generation:
        weights = (self._parameters, self._state)
        extend, step = (partial(returning_memory(compiled), *weights) for compiled in (self._extend, self._decode))
        return Generation(self.spec, extend, step, prompts, new_tokens, options, reuse)

    def prefill(self, tokens: np.ndarray, size: int) -> tuple[np.ndarray, Caches]:
        # Slots before the prompt are padding, and sizes are rounded up: prompts of like length share their programs.
        size = sum(widths(tokens.shape[1], SMALLEST)) - tokens.shape[1] + -(-size // 64) * 64
        extend = partial(self._extend, self._parameters, self._state)
        logits, caches = prefilled(self.spec, extend, list(tokens), size)
        return np.asarray(logits), caches

    def decode(self, tokens: np.ndarray, cache: Caches) -> tuple[np.ndarray, Caches]:
        logits, cache = self._extend(self._parameters, self._state, tokens[:, None], cache)
        return np.asarray(logits), cache

    def _extend_values(
        self, parameters: Parameters, state: Parameters, tokens: jax.Array, caches: Caches
    ) -> tuple[jax.Array, Caches]:
        """Return the logits after the last of the tokens, and the extended caches."""
        result = self._merge(parameters, state)(tokens, caches=caches)
        assert result.caches is not None
        return result.logits_BTV[:, -1], result.caches

    def _decode_values(
        self,
        parameters: Parameters,
        state: Parameters,
        tokens: jax.Array,
        caches: Caches,
        rule: Rule,
        seen: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None, Caches]:
        """Return the next tokens, the model's logits, which tokens each row has, and caches."""
        logits, caches = self._extend_values(parameters, state, tokens[:, None], caches)
        assert caches.first_B is not None
        position = caches.places - caches.first_B
        return *choose(logits, rule, seen, drawn(rule, position)), caches

    def wait(self) -> None:
        jax.block_until_ready((self._parameters, self._state))

    def nonfinite_parameters(self) -> list[str]:
        finite = on_host(self._finite(self._parameters, self._state))
        names = [row.name for row in parameter_table(self.spec) if not finite[row.name]]
        return [name for name in names if not self._is_finite_decoded(name)]

    def _is_finite_decoded(self, name: str) -> bool:
        """Return True for codes whose numbers are finite, although those of larger codes would not be."""
        held = self._stacks.name(name)
        value = self._stacks.unstack({held: self._parameters.get(held)})[name]
        return isinstance(value, QuantizedArray) and bool(jnp.isfinite(dequantize(value)).all())

    def _finite_values(self, parameters: Parameters, state: Parameters) -> Parameters:
        values = self._stacks.unstack(parameters) | state
        return {
            name: is_surely_finite(value) if isinstance(value, QuantizedArray) else jnp.all(jnp.isfinite(value))
            for name, value in values.items()
        }

    # --- the module and its arrays -----------------------------------------------------------------------------------

    def _split(self, module: Transformer) -> tuple[Parameters, Parameters]:
        """Split a module into parameters and state by name; from now on, `_merge` makes such a module."""
        graph, parameters, *others = nnx.split(module, nnx.Param, ...)
        (state,) = others
        self._merge_split = _merger(graph, parameters, state)
        return named(parameters), named(state)

    def _merge(self, parameters: Parameters, state: Parameters) -> Transformer:
        return self._merge_split(parameters, self._stacks.stack(state, state.__getitem__))

    def _sharded(self, tokens: jax.Array) -> Placement | None:
        """The placement over which a batch is sharded; None for a batch that cannot be sharded equally."""
        return self._placement if self._placement is not None and self._placement.divides(len(tokens)) else None

    def _transformed(
        self, parameters: Parameters, state: Parameters, tokens: jax.Array, rematerialize: Rematerialize = "none"
    ) -> tuple[Transformer, Transforms]:
        """The module and its transforms for a batch: all-gather, expert parallelism, recomputation."""
        placement = self._sharded(tokens)
        if placement is None:
            return self._merge(parameters, state), transforms(rematerialize, None, None)
        module = self._merge(gather_outside_layers(parameters, placement), state)
        return module, transforms(rematerialize, placement, self._exchange)

    def _traced(self, num_sequences: int) -> AbstractContextManager[None]:
        """Trace for the mesh, if there is one, with a batch of so many sequences."""
        return nullcontext() if self._placement is None else self._placement.active(num_sequences)


def _is_codes(value: object) -> bool:
    return isinstance(value, QuantizedArray)


def _merger(graph: GraphDef, *states: State) -> Callable[..., Transformer]:
    """Return a function that merges a module from values by name, one dict for each of the states."""
    parts = [(jax.tree.structure(state, is_leaf=_is_codes), list(named(state))) for state in states]

    def merge(*values: Parameters) -> Transformer:
        pairs = zip(parts, values, strict=True)
        module: Transformer = nnx.merge(
            graph, *(jax.tree.unflatten(shape, [own[name] for name in names]) for (shape, names), own in pairs)
        )
        return module

    return merge


def flatten_forced(forced: Sequence[Array] | None) -> list[Array] | None:
    """Reshape experts [B, T, K] to [P, K]."""
    return None if forced is None else [expert.astype(np.int32).reshape(-1, expert.shape[-1]) for expert in forced]


def routing_load(result: Forward) -> tuple[list[jax.Array], list[jax.Array]]:
    """Return, per MoE layer, the tokens of each expert, and the number of dropped assignments."""
    load = [expert_counts(routing) for routing in result.routings]
    dropped = [num_dropped(*pair) for pair in zip(result.routings, result.dispatches, strict=True)]
    return load, dropped


def routing_values(result: Forward) -> list[tuple[jax.Array, ...]]:
    """Return, per MoE layer, the arguments of `layer_routing`, of all tokens."""
    values: list[tuple[jax.Array, ...]] = []
    for routing, dispatched in zip(result.routings, result.dispatches, strict=True):
        kept_PK = routing.valid_PK if dispatched is None else dispatched.kept_PK
        slots = (routing.expert_PK, routing.valid_PK, kept_PK, routing.weight_PK)
        values.append((*slots, routing.score_PE, routing.selection_PE))
    return values


def layer_routings(spec: ModelSpec, values: Sequence[Sequence[Any]], shape: tuple[int, ...]) -> list[LayerRouting]:
    """Return the routing of tokens [B, T] from `routing_values` of these or more."""
    layers = zip(spec.moe_layers, values, strict=True)
    return [layer_routing(layer, shape, *(np.array(value) for value in own)) for layer, own in layers]
