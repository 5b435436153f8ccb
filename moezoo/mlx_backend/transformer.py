"""The whole model. Spec: moezoo.core.reference.transformer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, assert_never

import mlx.core as mx
from mlx import nn

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
from moezoo.mlx_backend.arrays import DTYPES, Weights
from moezoo.mlx_backend.attention import GroupedQueryAttention
from moezoo.mlx_backend.choice import RoutingContext
from moezoo.mlx_backend.delta_attention import GatedDeltaAttention
from moezoo.mlx_backend.dispatch import Dispatch
from moezoo.mlx_backend.feed_forward import FeedForward
from moezoo.mlx_backend.kv_cache import Cache, Caches, Source
from moezoo.mlx_backend.latent_attention import LatentAttention
from moezoo.mlx_backend.layer_inputs import LayerInput, LayerInputs
from moezoo.mlx_backend.moe import MoE
from moezoo.mlx_backend.normalization import norm
from moezoo.mlx_backend.positions import EmbeddingPosition, positions
from moezoo.mlx_backend.random import fold_in, uniform
from moezoo.mlx_backend.routing import Routing
from moezoo.mlx_backend.short_convolution import ShortConvolution

Record = dict[str, mx.array]


class Forward(NamedTuple):
    """Logits [B, T, V] float32; per MoE layer its routing and dispatch; extended caches if any; losses of indexers."""

    logits_BTV: mx.array
    routings: list[Routing]
    dispatches: list[Dispatch]
    caches: Caches | None
    index_losses: list[tuple[int, float, mx.array]]


class Embedding(nn.Module):
    """Token embedding; also the head of a tied model."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.weight = weights.parameter("weight")


class Head(nn.Module):
    """What the output projection has of its own: a matrix where it is untied, and a bias where it has one."""

    def __init__(self, spec: HeadSpec, weights: Weights):
        super().__init__()
        if isinstance(spec, UntiedHeadSpec):
            self.w_head = weights.parameter("w_head")
        if spec.bias:
            self.b_head = weights.parameter("b_head")


def attention_layer(spec: AttentionSpec, weights: Weights, index: int) -> nn.Module:
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


class Layer(nn.Module):
    """Attention and a feed-forward, dense or a MoE or both, with their norms before or behind them."""

    def __init__(self, spec: LayerSpec, model: ModelSpec, weights: Weights, index: int):
        super().__init__()
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
            self.freeze(keys=["output_scale"], recurse=False)

    def source_among(self, sources: Mapping[int, Any]) -> dict[str, Any]:
        """Keys and values of the layer whose this one attends to, if it has none of its own."""
        match self.spec.attention:
            case GroupedQueryAttentionSpec(keys_of_layer=int(index)):
                return {"source": sources[index]}
            case _:
                return {}

    def before_attention(self, x_BTD: mx.array) -> mx.array:
        """What attention sees."""
        return x_BTD if self.spec.arrangement == "post" else self.attention_norm(x_BTD)

    def behind_attention(self, out_BTD: mx.array) -> mx.array:
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

    def before_feed_forward(self, x_BTD: mx.array) -> mx.array:
        """What the feed-forward sees; in a parallel layer it sees what attention saw."""
        return x_BTD if self.spec.arrangement == "post" else self.feed_forward_norm(x_BTD)

    def behind_feed_forward(self, out_BTD: mx.array) -> mx.array:
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

    def scaled(self, x_BTD: mx.array) -> mx.array:
        """What leaves the layer."""
        if not self.spec.output_scale:
            return x_BTD
        return (x_BTD.astype(mx.float32) * self.output_scale.astype(mx.float32)).astype(x_BTD.dtype)


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
        caches: Caches | None = None,
        record: Record | None = None,
        key: mx.array | None = None,
        inference: bool = False,
    ) -> Forward:
        """With `caches`, tokens follow the cached ones, routing is of inference, and logits are the last token's."""
        inference = inference or caches is not None
        record = {} if record is None else record
        routings: list[Routing] = []
        dispatches: list[Dispatch] = []
        new_caches: list[Cache] = []
        index_losses: list[tuple[int, float, mx.array]] = []
        first_value_BTMH = None
        shortcut_BTD: mx.array | None = None
        sources: dict[int, Source | None] = {}
        first_B = None if caches is None else caches.first_B
        x_BTD = self._embed(tokens_BT, caches)
        record["embedding"] = x_BTD
        inputs_BTLZ = None if self.spec.layer_inputs is None else self.layer_inputs(tokens_BT, x_BTD)
        for index, layer in enumerate(self.layers):
            name = f"layers.{index}"
            layer_key = None if key is None else fold_in(key, index)
            cache = None if caches is None else caches.layers[index]
            seen_BTD = layer.before_attention(x_BTD)
            attended = layer.attention(
                seen_BTD, cache, first_value_BTMH=first_value_BTMH, first_B=first_B, **layer.source_among(sources)
            )
            if index in self.spec.shared_layers:
                sources[index] = attended.source
            if attended.cache is not None:
                new_caches.append(attended.cache)
            record[f"{name}.attention"] = attended.out_BTD
            if index == 0:
                first_value_BTMH = attended.value_BTMH
            if attended.index_loss is not None:
                index_losses.append((index, layer.spec.attention.indexer.loss_coefficient, attended.index_loss))
            x_BTD = x_BTD + self._added(layer.behind_attention(attended.out_BTD), layer_key, ATTENTION_DROPOUT)
            if layer.spec.arrangement != "parallel":
                seen_BTD = layer.before_feed_forward(x_BTD)
            if layer.spec.moe is not None:
                out, routing, dispatched = layer.moe(
                    seen_BTD,
                    RoutingContext(
                        tokens_BT.reshape(-1),
                        routings[-1].logits_PE if routings else None,
                        None if forced is None else forced[len(routings)],
                        layer_key,
                        inference,
                    ),
                    raw_BTD=x_BTD,
                    record=record,
                    name=f"{name}.moe",
                )
                routings.append(routing)
                dispatches.append(dispatched)
                record[f"{name}.moe"] = out
            joining_BTD, shortcut_BTD = shortcut_BTD, None
            if layer.spec.shortcut:
                shortcut_BTD = self._added(out, layer_key, SHORTCUT_DROPOUT)
            if layer.spec.feed_forward is not None:
                out = layer.feed_forward(seen_BTD)
                record[f"{name}.feed_forward"] = out
            x_BTD = x_BTD + self._added(layer.behind_feed_forward(out), layer_key, FEED_FORWARD_DROPOUT)
            x_BTD = x_BTD if joining_BTD is None else x_BTD + joining_BTD
            if inputs_BTLZ is not None:
                out = layer.layer_input(x_BTD, inputs_BTLZ[:, :, index])
                record[f"{name}.layer_input"] = out
                x_BTD = x_BTD + out
            x_BTD = layer.scaled(x_BTD)
            record[name] = x_BTD
        x_BTD = self.final_norm(x_BTD if caches is None else x_BTD[:, -1:])
        record["final_norm"] = x_BTD
        logits_BTV = self._logits(x_BTD)
        record["logits"] = logits_BTV
        extended = None if caches is None else Caches(new_caches, first_B)
        return Forward(logits_BTV, routings, dispatches, extended, index_losses)

    def _embed(self, tokens_BT: mx.array, caches: Caches | None) -> mx.array:
        x_BTD = self.embedding.weight[tokens_BT].astype(mx.float32)
        if self.spec.multipliers.embedding != 1:
            x_BTD = x_BTD * self.spec.multipliers.embedding
        if self.spec.position is not None:
            start, first_B = (0, None) if caches is None else (caches.places, caches.first_B)
            x_BTD = x_BTD + self.position(mx.maximum(positions(tokens_BT.shape[1], start, first_B), 0))
        return x_BTD.astype(DTYPES[self.spec.precision.compute])

    def _added(self, out_BTD: mx.array, key: mx.array | None, purpose: int) -> mx.array:
        """What a block adds to the residual stream."""
        out_BTD = dropout(out_BTD, self.spec.dropout, None if key is None else fold_in(key, purpose))
        return out_BTD if self.spec.multipliers.residual == 1 else out_BTD * self.spec.multipliers.residual

    def _logits(self, x_BTD: mx.array) -> mx.array:
        match self.spec.head:
            case TiedHeadSpec():
                logits_BTV = mx.einsum("BTD,VD->BTV", x_BTD, self.embedding.weight.astype(x_BTD.dtype))
            case UntiedHeadSpec():
                logits_BTV = mx.einsum("BTD,DV->BTV", x_BTD, self.head.w_head.astype(x_BTD.dtype))
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
