"""The whole model. Spec: moezoo.core.reference.transformer."""

from collections.abc import Sequence
from typing import NamedTuple, assert_never

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import LayerSpec, ModelSpec, TiedHeadSpec, UntiedHeadSpec
from moezoo.mlx_backend.arrays import DTYPES, Weights
from moezoo.mlx_backend.attention import GroupedQueryAttention
from moezoo.mlx_backend.dispatch import Dispatch
from moezoo.mlx_backend.feed_forward import SwiGLU
from moezoo.mlx_backend.kv_cache import KVCache
from moezoo.mlx_backend.moe import MoE
from moezoo.mlx_backend.normalization import norm
from moezoo.mlx_backend.routing import Routing

Record = dict[str, mx.array]


class Forward(NamedTuple):
    """Logits [B, T, V] float32, per MoE layer its routing and dispatch, per layer its cache."""

    logits_BTV: mx.array
    routings: list[Routing]
    dispatches: list[Dispatch]
    caches: list[KVCache | None]


class Embedding(nn.Module):
    """Token embedding; also the head of a tied model."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.weight = weights.parameter("weight")


class Head(nn.Module):
    """The output projection of an untied model."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.w_head = weights.parameter("w_head")


class Layer(nn.Module):
    """One pre-norm layer: attention, then a dense feed-forward or a MoE."""

    def __init__(self, spec: LayerSpec, model: ModelSpec, weights: Weights, index: int):
        super().__init__()
        self.spec = spec
        self.attention_norm = norm(model.norm, weights.inside("attention_norm"))
        self.attention = GroupedQueryAttention(spec.attention, weights.inside("attention"), index)
        self.feed_forward_norm = norm(model.norm, weights.inside("feed_forward_norm"))
        if spec.feed_forward is not None:
            self.feed_forward = SwiGLU(spec.feed_forward, weights.inside("feed_forward"))
        if spec.moe is not None:
            self.moe = MoE(spec.moe, weights.inside("moe"))


class Transformer(nn.Module):
    """Spec: moezoo.core.reference.transformer.forward."""

    def __init__(self, spec: ModelSpec, weights: Weights):
        super().__init__()
        self.spec = spec
        self.embedding = Embedding(weights.inside("embedding"))
        self.layers = [
            Layer(layer, spec, weights.inside(f"layers.{index}"), index) for index, layer in enumerate(spec.all_layers)
        ]
        self.final_norm = norm(spec.norm, weights.inside("final_norm"))
        if isinstance(spec.head, UntiedHeadSpec):
            self.head = Head(weights.inside("head"))

    def __call__(
        self,
        tokens_BT: mx.array,
        *,
        forced: Sequence[mx.array] | None = None,
        caches: Sequence[KVCache] | None = None,
        record: Record | None = None,
    ) -> Forward:
        """With `caches`, the tokens follow the cached ones, and routing is dropless."""
        record = {} if record is None else record
        routings: list[Routing] = []
        dispatches: list[Dispatch] = []
        new_caches: list[KVCache | None] = []
        first_value_BTMH: mx.array | None = None
        x_BTD = self.embedding.weight[tokens_BT].astype(DTYPES[self.spec.precision.compute])
        record["embedding"] = x_BTD
        for index, layer in enumerate(self.layers):
            name = f"layers.{index}"
            cache = None if caches is None else caches[index]
            attended = layer.attention(layer.attention_norm(x_BTD), cache, first_value_BTMH=first_value_BTMH)
            if index == 0:
                first_value_BTMH = attended.value_BTMH
            new_caches.append(attended.cache)
            record[f"{name}.attention"] = attended.out_BTD
            x_BTD = x_BTD + attended.out_BTD
            normed = layer.feed_forward_norm(x_BTD)
            if layer.spec.moe is not None:
                forced_PK = None if forced is None else forced[len(routings)]
                out, routing, dispatched = layer.moe(
                    normed,
                    forced_PK=forced_PK,
                    inference=caches is not None,
                    record=record,
                    name=f"{name}.moe",
                )
                routings.append(routing)
                dispatches.append(dispatched)
                record[f"{name}.moe"] = out
            else:
                out = layer.feed_forward(normed)
                record[f"{name}.feed_forward"] = out
            x_BTD = x_BTD + out
            record[name] = x_BTD
        x_BTD = self.final_norm(x_BTD)
        record["final_norm"] = x_BTD
        logits_BTV = self._logits(x_BTD).astype(mx.float32)
        record["logits"] = logits_BTV
        return Forward(logits_BTV, routings, dispatches, new_caches)

    def _logits(self, x_BTD: mx.array) -> mx.array:
        match self.spec.head:
            case TiedHeadSpec():
                return mx.einsum("BTD,VD->BTV", x_BTD, self.embedding.weight.astype(x_BTD.dtype))
            case UntiedHeadSpec():
                return mx.einsum("BTD,DV->BTV", x_BTD, self.head.w_head.astype(x_BTD.dtype))
            case _:
                assert_never(self.spec.head)
