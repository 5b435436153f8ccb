"""The whole model. Spec: moezoo.core.reference.transformer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, assert_never

import mlx.core as mx
from mlx import nn

from moezoo.core.random import ATTENTION_DROPOUT, FEED_FORWARD_DROPOUT, SHORTCUT_DROPOUT
from moezoo.core.spec import (
    HeadSpec,
    LatentAttentionSpec,
    LayerSpec,
    ModelSpec,
    TiedHeadSpec,
    UntiedHeadSpec,
)
from moezoo.core.tokens import ExpertMasks
from moezoo.mlx_backend.adapter import held, keyed, take
from moezoo.mlx_backend.arrays import DTYPES, Weights
from moezoo.mlx_backend.choice import NO_CONTEXT, RoutingContext, given_routing
from moezoo.mlx_backend.dispatch import Dispatch
from moezoo.mlx_backend.feed_forward import FeedForward
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.kernels.early_start import start_early
from moezoo.mlx_backend.kv_cache import Attended, Cache, Caches, SharedCache, Source
from moezoo.mlx_backend.layer_inputs import LayerInput, LayerInputs
from moezoo.mlx_backend.mixer import mix, mixer
from moezoo.mlx_backend.moe import Exchange, MoE
from moezoo.mlx_backend.normalization import norm
from moezoo.mlx_backend.positions import Documents, EmbeddingPosition, packed_documents, positions
from moezoo.mlx_backend.random import fold_in, uniform
from moezoo.mlx_backend.routing import Routing

Record = dict[str, mx.array]

WrapBlock = Callable[[nn.Module, str], Callable[..., Any]]
"""Transform a block (attention, MoE, feed-forward or layer input), by its name in the layer, for one forward pass."""


class Forward(NamedTuple):
    """Spec: moezoo.core.reference.transformer.Forward; with extended caches if there are any.

    Also the dispatch of each MoE layer, or None of few tokens, of which nothing is dropped.
    """

    logits_BTV: mx.array
    routings: list[Routing]
    dispatches: list[Dispatch | None]
    caches: Caches | None
    index_losses: list[tuple[int, float, mx.array]]


class StepInputs(NamedTuple):
    """Spec: moezoo.core.reference.transformer.StepInputs; with key/value caches."""

    tokens_BT: mx.array
    given: Mapping[int, RoutingContext]
    caches: Caches | None
    record: Record | None
    key: mx.array | None
    inference: bool
    documents: Documents | None
    exchange: Exchange | None
    wrap_block: WrapBlock | None

    def routing_context(self, index: int, previous_PE: mx.array | None, key: mx.array | None) -> RoutingContext:
        """Spec: moezoo.core.reference.transformer.StepInputs.routing_context."""
        return replace(
            self.given.get(index, NO_CONTEXT),
            token_P=self.tokens_BT.reshape(-1),
            previous_PE=previous_PE,
            key=key,
            inference=self.inference,
            real_P=None if self.documents is None else self.documents.real_P,
        )


class ResidualState(NamedTuple):
    """Spec: moezoo.core.reference.transformer.ResidualState."""

    x_BTD: mx.array
    shortcut_BTD: mx.array | None = None
    first_value_BTMH: mx.array | None = None
    previous_PE: mx.array | None = None


class LayerOutput(NamedTuple):
    """Spec: moezoo.core.reference.transformer.LayerOutput; with dispatch and extended cache."""

    routing: Routing | None
    dispatched: Dispatch | None
    cache: Cache | None
    index_loss: mx.array | None
    source: Source | None


class Embedding(nn.Module):
    """Token embedding; also the head of a tied model."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.weight = weights.parameter("weight")


class Head(nn.Module):
    """Parameters of the output projection: a matrix where it is untied, and a bias where it has one."""

    def __init__(self, spec: HeadSpec, weights: Weights):
        super().__init__()
        if isinstance(spec, UntiedHeadSpec):
            self.w_head = weights.parameter("w_head")
        if spec.bias:
            self.b_head = weights.parameter("b_head")


class Layer(nn.Module):
    """Spec: moezoo.core.reference.transformer.layer."""

    def __init__(self, spec: LayerSpec, model: ModelSpec, weights: Weights, index: int):
        super().__init__()
        self.spec = spec
        self.dropout, self.residual_multiplier = model.dropout, model.multipliers.residual
        self.adapter = model.adapter
        self.attention_norm = norm(model.norm, weights.inside("attention_norm"))
        self.attention = mixer(spec.attention, weights.inside("attention"), index)
        if spec.norm_placement != "parallel":
            self.feed_forward_norm = norm(model.norm, weights.inside("feed_forward_norm"))
        if spec.norm_placement == "sandwich":
            self.attention_output_norm = norm(model.norm, weights.inside("attention_output_norm"))
            self.feed_forward_output_norm = norm(model.norm, weights.inside("feed_forward_output_norm"))
        if spec.feed_forward is not None:
            self.feed_forward = FeedForward(spec.feed_forward, weights.inside("feed_forward"))
        if spec.moe is not None:
            self.moe = MoE(spec.moe, weights.inside("moe"))
        if model.layer_inputs is not None:
            self.layer_input = LayerInput(model.layer_inputs, model.norm, weights.inside("layer_input"))
        if spec.output_scale:
            self.output_scale = weights.state("output_scale")
            self.freeze(keys=["output_scale"], recurse=False)

    def __call__(
        self,
        state: ResidualState,
        inputs: StepInputs,
        index: int,
        input_BTZ: mx.array | None,
        sources: Mapping[int, Source | None],
    ) -> tuple[ResidualState, LayerOutput]:
        name, record = f"layers.{index}", {} if inputs.record is None else inputs.record
        key = None if inputs.key is None else fold_in(inputs.key, index)
        x_BTD = state.x_BTD
        seen_BTD = self.attention_input(x_BTD)
        attended = self._attend(seen_BTD, state, inputs, key, index, sources)
        record[f"{name}.attention"] = attended.out_BTD
        x_BTD = x_BTD + self._added(self.attention_output(attended.out_BTD), key, ATTENTION_DROPOUT)
        if self.spec.norm_placement != "parallel":
            seen_BTD = self.feed_forward_input(x_BTD)
        routing = dispatched = None
        if self.spec.moe is not None:
            context = inputs.routing_context(index, state.previous_PE, key)
            out, routing, dispatched = self._block("moe", inputs, key)(
                seen_BTD, context, raw_BTD=x_BTD, exchange=inputs.exchange, record=record, name=f"{name}.moe"
            )
            record[f"{name}.moe"] = out
        shortcut_BTD = self._added(out, key, SHORTCUT_DROPOUT) if self.spec.shortcut else None
        if self.spec.feed_forward is not None:
            out = self._block("feed_forward", inputs, key)(seen_BTD)
            record[f"{name}.feed_forward"] = out
        x_BTD = x_BTD + self._added(self.feed_forward_output(out), key, FEED_FORWARD_DROPOUT)
        x_BTD = x_BTD if state.shortcut_BTD is None else x_BTD + state.shortcut_BTD
        if input_BTZ is not None:
            out = self._block("layer_input", inputs, key)(x_BTD, input_BTZ)
            record[f"{name}.layer_input"] = out
            x_BTD = x_BTD + out
        x_BTD = self.scaled(x_BTD)
        record[name] = x_BTD
        first_value_BTMH = attended.value_BTMH if state.first_value_BTMH is None else state.first_value_BTMH
        previous_PE = state.previous_PE if routing is None else routing.logits_PE
        state = ResidualState(x_BTD, shortcut_BTD, first_value_BTMH, previous_PE)
        return state, LayerOutput(routing, dispatched, attended.cache, attended.index_loss, attended.source)

    def _attend(
        self,
        x_BTD: mx.array,
        state: ResidualState,
        inputs: StepInputs,
        key: mx.array | None,
        index: int,
        sources: Mapping[int, Source | None],
    ) -> Attended:
        cache, first_B = None, None
        if inputs.caches is not None:
            cache, first_B = inputs.caches.layers[index], inputs.caches.first_B
            if inputs.caches.spent:
                inputs.caches.layers[index] = SharedCache(inputs.caches.places)
        return mix(
            self.spec.attention,
            self._block("attention", inputs, key),
            x_BTD,
            cache,
            first_value_BTMH=state.first_value_BTMH,
            first_B=first_B,
            sources=sources,
            documents=inputs.documents,
        )

    def _block(self, name: str, inputs: StepInputs, key: mx.array | None) -> Callable[..., Any]:
        """One of the layer's blocks, with keys for its adapters, transformed for this forward pass."""
        block = keyed(self.adapter, self[name], name, key)
        return block if inputs.wrap_block is None else inputs.wrap_block(block, name)

    def attention_input(self, x_BTD: mx.array) -> mx.array:
        """Pre-attention norm, unless the norm comes after."""
        return x_BTD if self.spec.norm_placement == "post" else self.attention_norm(x_BTD)

    def attention_output(self, out_BTD: mx.array) -> mx.array:
        """Post-attention norm, where there is one."""
        match self.spec.norm_placement:
            case "pre" | "parallel":
                return out_BTD
            case "post":
                return self.attention_norm(out_BTD)
            case "sandwich":
                return self.attention_output_norm(out_BTD)
            case _:
                assert_never(self.spec.norm_placement)

    def feed_forward_input(self, x_BTD: mx.array) -> mx.array:
        """Pre-feed-forward norm; not of a parallel layer, whose feed-forward has the input of attention."""
        return x_BTD if self.spec.norm_placement == "post" else self.feed_forward_norm(x_BTD)

    def feed_forward_output(self, out_BTD: mx.array) -> mx.array:
        """Post-feed-forward norm, where there is one."""
        match self.spec.norm_placement:
            case "pre" | "parallel":
                return out_BTD
            case "post":
                return self.feed_forward_norm(out_BTD)
            case "sandwich":
                return self.feed_forward_output_norm(out_BTD)
            case _:
                assert_never(self.spec.norm_placement)

    def scaled(self, x_BTD: mx.array) -> mx.array:
        """Multiply the residual stream by the layer's output scale."""
        if not self.spec.output_scale:
            return x_BTD
        return (x_BTD.astype(mx.float32) * self.output_scale.astype(mx.float32)).astype(x_BTD.dtype)

    def _added(self, out_BTD: mx.array, key: mx.array | None, purpose: int) -> mx.array:
        """Apply dropout and the residual multiplier to what is added to the residual stream."""
        out_BTD = dropout(out_BTD, self.dropout, None if key is None else fold_in(key, purpose))
        return out_BTD if self.residual_multiplier == 1 else out_BTD * self.residual_multiplier


def dropout(x: mx.array, rate: float, key: mx.array | None) -> mx.array:
    """Spec: moezoo.core.reference.transformer.dropout."""
    if rate == 0 or key is None:
        return x
    return mx.where(uniform(key, x.shape) >= rate, x / (1 - rate), 0).astype(x.dtype)


class Transformer(nn.Module):
    """Spec: moezoo.core.reference.transformer.forward."""

    def __init__(self, spec: ModelSpec, weights: Weights):
        super().__init__()
        self.spec = spec
        weights = weights.adapted_by(spec.adapter)
        self.embedding = Embedding(weights.inside("embedding"))
        if spec.position is not None:
            self.position = EmbeddingPosition(spec.position, spec.embed_dim, weights.inside("position"))
        if spec.layer_inputs is not None:
            self.layer_inputs = LayerInputs(spec.layer_inputs, spec.norm, weights.inside("layer_inputs"))
        self.layers = [
            Layer(layer, spec, weights.inside(f"layers.{index}"), index) for index, layer in enumerate(spec.all_layers)
        ]
        self.final_norm = norm(spec.norm, weights.inside("final_norm"))
        if isinstance(spec.head, UntiedHeadSpec) or spec.head.bias:
            self.head = Head(spec.head, weights.inside("head"))

    def __call__(
        self,
        tokens_BT: mx.array,
        *,
        forced: Sequence[mx.array] | None = None,
        masks: Sequence[ExpertMasks] | None = None,
        caches: Caches | None = None,
        record: Record | None = None,
        key: mx.array | None = None,
        inference: bool = False,
        document_BT: mx.array | None = None,
        exchange: Exchange | None = None,
        wrap_block: WrapBlock | None = None,
    ) -> Forward:
        """With `caches`, tokens follow the cached ones, routing is of inference, and logits are the last token's.

        `exchange` runs the experts; `wrap_block` transforms each layer's blocks.
        """
        given = given_routing(self.spec.moe_layers, forced, masks, tokens_BT.shape[1])
        inference = inference or caches is not None
        documents = packed_documents(document_BT)
        inputs = StepInputs(tokens_BT, given, caches, record, key, inference, documents, exchange, wrap_block)
        x_BTD = self._embed(tokens_BT, caches, documents)
        if record is not None:
            record["embedding"] = x_BTD
        inputs_BTLZ = None if self.spec.layer_inputs is None else self.layer_inputs(tokens_BT, x_BTD)
        state, outputs = self._run_layers(ResidualState(x_BTD), inputs, inputs_BTLZ)
        x_BTD = self.final_norm(state.x_BTD if caches is None else state.x_BTD[:, -1:])
        logits_BTV = self._logits(x_BTD, key)
        if record is not None:
            record |= {"final_norm": x_BTD, "logits": logits_BTV}
        return self._collected(logits_BTV, outputs, caches)

    def _run_layers(
        self, state: ResidualState, inputs: StepInputs, inputs_BTLZ: mx.array | None
    ) -> tuple[ResidualState, list[LayerOutput]]:
        """Run all layers in order: the state after the last one, and the output of each."""
        sources: dict[int, Source | None] = {}
        outputs: list[LayerOutput] = []
        for index in range(len(self.spec.all_layers)):
            input_BTZ = None if inputs_BTLZ is None else inputs_BTLZ[:, :, index]
            state, output = self.layers[index](state, inputs, index, input_BTZ, sources)
            if index in self.spec.shared_layers:
                sources[index] = output.source
            outputs.append(output._replace(source=None))  # so that no other layer's keys are kept
            if inputs.caches is not None:
                start_early(state.x_BTD)
        return state, outputs

    def _collected(self, logits_BTV: mx.array, outputs: list[LayerOutput], caches: Caches | None) -> Forward:
        extended = [output.cache for output in outputs if output.cache is not None]
        return Forward(
            logits_BTV,
            [output.routing for output in outputs if output.routing is not None],
            [output.dispatched for output in outputs if output.routing is not None],
            None if caches is None else Caches(extended, caches.first_B),
            [
                (index, layer.attention.indexer.loss_coefficient, output.index_loss)
                for index, (layer, output) in enumerate(zip(self.spec.all_layers, outputs, strict=True))
                if isinstance(layer.attention, LatentAttentionSpec)
                and layer.attention.indexer is not None
                and output.index_loss is not None
            ],
        )

    def _embed(self, tokens_BT: mx.array, caches: Caches | None, documents: Documents | None) -> mx.array:
        x_BTD = take(held(self.embedding.weight), tokens_BT).astype(mx.float32)
        if self.spec.multipliers.embedding != 1:
            x_BTD = x_BTD * self.spec.multipliers.embedding
        if self.spec.position is not None:
            start, first_B = (0, None) if caches is None else (caches.places, caches.first_B)
            x_BTD = x_BTD + self.position(mx.maximum(positions(tokens_BT.shape[1], start, first_B, documents), 0))
        return x_BTD.astype(DTYPES[self.spec.precision.compute])

    def _logits(self, x_BTD: mx.array, key: mx.array | None) -> mx.array:
        key = None if key is None else fold_in(key, len(self.spec.all_layers))
        match self.spec.head:
            case TiedHeadSpec():
                w = keyed(self.spec.adapter, self.embedding, "embedding", key).weight
                logits_BTV = projection.einsum("BTD,VD->BTV", x_BTD, w.astype(x_BTD.dtype))
            case UntiedHeadSpec():
                w = keyed(self.spec.adapter, self.head, "head", key).w_head
                logits_BTV = projection.einsum("BTD,DV->BTV", x_BTD, w.astype(x_BTD.dtype))
            case _:
                assert_never(self.spec.head)
        if self.spec.head.bias:
            logits_BTV = logits_BTV + self.head.b_head.astype(x_BTD.dtype)
        logits_BTV = logits_BTV.astype(mx.float32)
        if self.spec.multipliers.logits != 1:
            logits_BTV = logits_BTV * self.spec.multipliers.logits
        if self.spec.softcap is not None:
            logits_BTV = self.spec.softcap * mx.tanh(logits_BTV / self.spec.softcap)
        return logits_BTV
