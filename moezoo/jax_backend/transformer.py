"""The whole model. Spec: moezoo.core.reference.transformer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.random import ATTENTION_DROPOUT, FEED_FORWARD_DROPOUT, SHORTCUT_DROPOUT
from moezoo.core.spec import (
    AttentionSpec,
    GatedDeltaAttentionSpec,
    GroupedQueryAttentionSpec,
    HeadSpec,
    LatentAttentionSpec,
    LayerSpec,
    ModelSpec,
    ShortConvolutionSpec,
    TiedHeadSpec,
    UntiedHeadSpec,
)
from moezoo.jax_backend.arrays import DTYPES, Weights
from moezoo.jax_backend.attention import GroupedQueryAttention
from moezoo.jax_backend.choice import RoutingContext
from moezoo.jax_backend.delta_attention import GatedDeltaAttention
from moezoo.jax_backend.dispatch import Dispatch
from moezoo.jax_backend.feed_forward import FeedForward
from moezoo.jax_backend.kv_cache import Cache, Caches, Source
from moezoo.jax_backend.latent_attention import LatentAttention
from moezoo.jax_backend.layer_inputs import LayerInput, LayerInputs
from moezoo.jax_backend.moe import MoE
from moezoo.jax_backend.normalization import norm
from moezoo.jax_backend.positions import EmbeddingPosition, positions
from moezoo.jax_backend.random import fold_in, uniform
from moezoo.jax_backend.routing import Routing
from moezoo.jax_backend.short_convolution import ShortConvolution

Record = dict[str, jax.Array]


class Forward(NamedTuple):
    """Logits [B, T, V] float32; per MoE layer its routing and dispatch; extended caches if any; losses of indexers."""

    logits_BTV: jax.Array
    routings: list[Routing]
    dispatches: list[Dispatch]
    caches: Caches | None
    index_losses: list[tuple[int, float, jax.Array]]


class _Given(NamedTuple):
    """What all layers are given."""

    tokens_BT: jax.Array
    forced: Sequence[jax.Array] | None
    caches: Caches | None
    record: Record | None
    key: jax.Array | None
    inference: bool


class _Stream(NamedTuple):
    """What a layer hands on to the next."""

    x_BTD: jax.Array
    shortcut_BTD: jax.Array | None = None
    first_value_BTMH: jax.Array | None = None
    previous_PE: jax.Array | None = None


class _Left(NamedTuple):
    """What a layer leaves beside the stream."""

    routing: Routing | None
    dispatched: Dispatch | None
    cache: Cache | None
    index_loss: jax.Array | None
    source: Source | None


class Embedding(nnx.Module):
    """Token embedding; also the head of a tied model."""

    def __init__(self, weights: Weights):
        self.weight = weights.parameter("weight")


class Head(nnx.Module):
    """What the output projection has of its own: a matrix where it is untied, and a bias where it has one."""

    def __init__(self, spec: HeadSpec, weights: Weights):
        if isinstance(spec, UntiedHeadSpec):
            self.w_head = weights.parameter("w_head")
        if spec.bias:
            self.b_head = weights.parameter("b_head")


def attention_layer(spec: AttentionSpec, weights: Weights, index: int) -> nnx.Module:
    """The attention of layer `index`."""
    match spec:
        case GroupedQueryAttentionSpec():
            return GroupedQueryAttention(spec, weights, index)
        case GatedDeltaAttentionSpec():
            return GatedDeltaAttention(spec, weights, index)
        case LatentAttentionSpec():
            return LatentAttention(spec, weights, index)
        case ShortConvolutionSpec():
            return ShortConvolution(spec, weights, index)
        case _:
            assert_never(spec)


class Layer(nnx.Module):
    """Attention and a feed-forward, dense or a MoE or both, with their norms before or behind them."""

    def __init__(self, spec: LayerSpec, model: ModelSpec, weights: Weights, index: int):
        self.spec = spec
        self.attention_norm = norm(model.norm, weights.inside("attention_norm"))
        self.attention = attention_layer(spec.attention, weights.inside("attention"), index)
        if spec.arrangement != "parallel":
            self.feed_forward_norm = norm(model.norm, weights.inside("feed_forward_norm"))
        if spec.arrangement == "sandwich":
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

    def source_among(self, sources: Mapping[int, Any]) -> dict[str, Any]:
        """Keys and values of the layer whose this one attends to, if it has none of its own."""
        match self.spec.attention:
            case GroupedQueryAttentionSpec(keys_of_layer=int(index)):
                return {"source": sources[index]}
            case _:
                return {}

    def before_attention(self, x_BTD: jax.Array) -> jax.Array:
        """What attention sees."""
        return x_BTD if self.spec.arrangement == "post" else self.attention_norm(x_BTD)

    def behind_attention(self, out_BTD: jax.Array) -> jax.Array:
        """What attention adds."""
        match self.spec.arrangement:
            case "pre" | "parallel":
                return out_BTD
            case "post":
                return self.attention_norm(out_BTD)
            case "sandwich":
                return self.attention_output_norm(out_BTD)
            case _:
                assert_never(self.spec.arrangement)

    def before_feed_forward(self, x_BTD: jax.Array) -> jax.Array:
        """What the feed-forward sees; in a parallel layer it sees what attention saw."""
        return x_BTD if self.spec.arrangement == "post" else self.feed_forward_norm(x_BTD)

    def behind_feed_forward(self, out_BTD: jax.Array) -> jax.Array:
        """What the feed-forward adds."""
        match self.spec.arrangement:
            case "pre" | "parallel":
                return out_BTD
            case "post":
                return self.feed_forward_norm(out_BTD)
            case "sandwich":
                return self.feed_forward_output_norm(out_BTD)
            case _:
                assert_never(self.spec.arrangement)

    def scaled(self, x_BTD: jax.Array) -> jax.Array:
        """What leaves the layer."""
        if not self.spec.output_scale:
            return x_BTD
        return (x_BTD.astype(jnp.float32) * self.output_scale[...].astype(jnp.float32)).astype(x_BTD.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Spec: moezoo.core.reference.transformer.dropout."""
    if rate == 0 or key is None:
        return x
    return jnp.where(uniform(key, x.shape) >= rate, x / (1 - rate), 0).astype(x.dtype)


class Transformer(nnx.Module):
    """Spec: moezoo.core.reference.transformer.forward."""

    def __init__(self, spec: ModelSpec, weights: Weights):
        self.spec = spec
        self.embedding = Embedding(weights.inside("embedding"))
        if spec.position is not None:
            self.position = EmbeddingPosition(spec.position, spec.embed_dim, weights.inside("position"))
        if spec.layer_inputs is not None:
            self.layer_inputs = LayerInputs(spec.layer_inputs, spec.norm, weights.inside("layer_inputs"))
        self.layers = self._made_layers(weights)
        self.final_norm = norm(spec.norm, weights.inside("final_norm"))
        if isinstance(spec.head, UntiedHeadSpec) or spec.head.bias:
            self.head = Head(spec.head, weights.inside("head"))

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        forced: Sequence[jax.Array] | None = None,
        caches: Caches | None = None,
        record: Record | None = None,
        key: jax.Array | None = None,
        inference: bool = False,
    ) -> Forward:
        """With `caches`, tokens follow the cached ones, routing is of inference, and logits are the last token's."""
        x_BTD = self._embed(tokens_BT, caches)
        if record is not None:
            record["embedding"] = x_BTD
        inputs_BTLZ = None if self.spec.layer_inputs is None else self.layer_inputs(tokens_BT, x_BTD)
        given = _Given(tokens_BT, forced, caches, record, key, inference or caches is not None)
        stream, lefts = self._through_layers(_Stream(x_BTD), inputs_BTLZ, given)
        x_BTD = self.final_norm(stream.x_BTD if caches is None else stream.x_BTD[:, -1:])
        logits_BTV = self._logits(x_BTD)
        if record is not None:
            record |= {"final_norm": x_BTD, "logits": logits_BTV}
        return Forward(
            logits_BTV,
            [left.routing for left in lefts if left.routing is not None],
            [left.dispatched for left in lefts if left.dispatched is not None],
            None
            if caches is None
            else Caches([left.cache for left in lefts if left.cache is not None], caches.first_B),
            [
                (index, layer.attention.indexer.loss_coefficient, left.index_loss)
                for index, (layer, left) in enumerate(zip(self.spec.all_layers, lefts, strict=True))
                if left.index_loss is not None
            ],
        )

    def _made_layers(self, weights: Weights) -> nnx.List | nnx.Dict:
        return nnx.List(
            [
                Layer(layer, self.spec, weights.inside(f"layers.{index}"), index)
                for index, layer in enumerate(self.spec.all_layers)
            ]
        )

    def _layer_at(self, index: int) -> Layer:
        return self.layers[index]

    def _through_layers(
        self, stream: _Stream, inputs_BTLZ: jax.Array | None, given: _Given
    ) -> tuple[_Stream, list[_Left]]:
        """What the last layer hands on, and what each one left."""
        sources: dict[int, Source | None] = {}
        lefts: list[_Left] = []
        for index in range(len(self.spec.all_layers)):
            input_BTZ = None if inputs_BTLZ is None else inputs_BTLZ[:, :, index]
            stream, left = self._through_layer(self._layer_at(index), index, stream, input_BTZ, sources, given)
            if index in self.spec.shared_layers:
                sources[index] = left.source
            lefts.append(left)
        return stream, lefts

    def _through_layer(
        self,
        layer: Layer,
        index: int | jax.Array,
        stream: _Stream,
        input_BTZ: jax.Array | None,
        sources: Mapping[int, Source | None],
        given: _Given,
    ) -> tuple[_Stream, _Left]:
        """One layer. `index` may be traced where nothing is recorded or forced, and nothing is in a cache."""
        name, caches = f"layers.{index}", given.caches
        record: Record = {} if given.record is None else given.record
        key = None if given.key is None else fold_in(given.key, index)
        x_BTD = stream.x_BTD
        seen_BTD = layer.before_attention(x_BTD)
        attended = layer.attention(
            seen_BTD,
            None if caches is None else caches.layers[index],
            first_value_BTMH=stream.first_value_BTMH,
            first_B=None if caches is None else caches.first_B,
            **layer.source_among(sources),
        )
        record[f"{name}.attention"] = attended.out_BTD
        x_BTD = x_BTD + self._added(layer.behind_attention(attended.out_BTD), key, ATTENTION_DROPOUT)
        if layer.spec.arrangement != "parallel":
            seen_BTD = layer.before_feed_forward(x_BTD)
        routing = dispatched = None
        if layer.spec.moe is not None:
            out, routing, dispatched = layer.moe(
                seen_BTD,
                RoutingContext(
                    given.tokens_BT.reshape(-1),
                    stream.previous_PE,
                    None if given.forced is None else given.forced[self.spec.moe_layers.index(index)],
                    key,
                    given.inference,
                ),
                raw_BTD=x_BTD,
                record=record,
                name=f"{name}.moe",
            )
            record[f"{name}.moe"] = out
        shortcut_BTD = self._added(out, key, SHORTCUT_DROPOUT) if layer.spec.shortcut else None
        if layer.spec.feed_forward is not None:
            out = layer.feed_forward(seen_BTD)
            record[f"{name}.feed_forward"] = out
        x_BTD = x_BTD + self._added(layer.behind_feed_forward(out), key, FEED_FORWARD_DROPOUT)
        x_BTD = x_BTD if stream.shortcut_BTD is None else x_BTD + stream.shortcut_BTD
        if input_BTZ is not None:
            out = layer.layer_input(x_BTD, input_BTZ)
            record[f"{name}.layer_input"] = out
            x_BTD = x_BTD + out
        x_BTD = layer.scaled(x_BTD)
        record[name] = x_BTD
        first_value_BTMH, previous_PE = stream.first_value_BTMH, stream.previous_PE
        first_value_BTMH = attended.value_BTMH if first_value_BTMH is None else first_value_BTMH
        previous_PE = previous_PE if routing is None else routing.logits_PE
        stream = _Stream(x_BTD, shortcut_BTD, first_value_BTMH, previous_PE)
        return stream, _Left(routing, dispatched, attended.cache, attended.index_loss, attended.source)

    def _embed(self, tokens_BT: jax.Array, caches: Caches | None) -> jax.Array:
        x_BTD = self.embedding.weight[...][tokens_BT].astype(jnp.float32)
        if self.spec.multipliers.embedding != 1:
            x_BTD = x_BTD * self.spec.multipliers.embedding
        if self.spec.position is not None:
            start, first_B = (0, None) if caches is None else (caches.places, caches.first_B)
            x_BTD = x_BTD + self.position(jnp.maximum(positions(tokens_BT.shape[1], start, first_B), 0))
        return x_BTD.astype(DTYPES[self.spec.precision.compute])

    def _added(self, out_BTD: jax.Array, key: jax.Array | None, purpose: int) -> jax.Array:
        """What a block adds to the residual stream."""
        out_BTD = dropout(out_BTD, self.spec.dropout, None if key is None else fold_in(key, purpose))
        return out_BTD if self.spec.multipliers.residual == 1 else out_BTD * self.spec.multipliers.residual

    def _logits(self, x_BTD: jax.Array) -> jax.Array:
        match self.spec.head:
            case TiedHeadSpec():
                logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, self.embedding.weight[...].astype(x_BTD.dtype))
            case UntiedHeadSpec():
                logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD, self.head.w_head[...].astype(x_BTD.dtype))
            case _:
                assert_never(self.spec.head)
        if self.spec.head.bias:
            logits_BTV = logits_BTV + self.head.b_head[...].astype(x_BTD.dtype)
        logits_BTV = logits_BTV.astype(jnp.float32)
        if self.spec.multipliers.logits != 1:
            logits_BTV = logits_BTV * self.spec.multipliers.logits
        if self.spec.softcap is not None:
            logits_BTV = self.spec.softcap * jnp.tanh(logits_BTV / self.spec.softcap)
        return logits_BTV
