"""Mixture of attention heads. Spec: moezoo.core.reference.head_router."""

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import HeadRouterSpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.choice import RoutingContext
from moezoo.mlx_backend.routing import Router, Routing


class HeadRouter(nn.Module):
    """Spec: moezoo.core.reference.head_router.route_heads."""

    def __init__(self, spec: HeadRouterSpec, weights: Weights):
        super().__init__()
        self.router = Router(spec.router, weights.inside("router"))

    def __call__(
        self,
        x_BTD: mx.array,
        context: RoutingContext,
        *,
        record: dict[str, mx.array] | None = None,
        name: str = "moe",
    ) -> Routing:
        routing: Routing = self.router(x_BTD.reshape(-1, x_BTD.shape[-1]), context)
        if record is not None:
            record[f"{name}.router.logits"] = routing.logits_PE
            record[f"{name}.router.weight"] = routing.weight_PK
        return routing


def choose_heads(query_BTMGH: mx.array, routing: Routing | None) -> mx.array:
    """Spec: moezoo.core.reference.head_router.choose_heads."""
    if routing is None:
        return query_BTMGH
    hot_BTKG = chosen_heads(query_BTMGH, routing)
    return mx.einsum("BTMGH,BTKG->BTMKH", query_BTMGH, hot_BTKG)


def place_heads(attended_BTMKH: mx.array, routing: Routing | None) -> mx.array:
    """Spec: moezoo.core.reference.head_router.place_heads; weighted in float32, back in the dtype of the heads."""
    if routing is None:
        return attended_BTMKH
    hot_BTKG = chosen_heads(attended_BTMKH, routing)
    weight_BTK = routing.weight_PK.reshape(hot_BTKG.shape[:3])
    weighted = (attended_BTMKH * weight_BTK[:, :, None, :, None]).astype(attended_BTMKH.dtype)
    return mx.einsum("BTMKH,BTKG->BTMGH", weighted, hot_BTKG)


def chosen_heads(x: mx.array, routing: Routing) -> mx.array:
    """Spec: moezoo.core.reference.head_router.chosen_heads; in the dtype of x."""
    hot_PKG = routing.expert_PK[..., None] == mx.arange(routing.score_PE.shape[-1])
    return hot_PKG.reshape(*x.shape[:2], *hot_PKG.shape[1:]).astype(x.dtype)
