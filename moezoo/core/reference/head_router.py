"""Mixture of attention heads: a router chooses, for each token, which query heads attend for it."""

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, Record, inside
from moezoo.core.reference.choice import RoutingContext
from moezoo.core.reference.routing import Routing, route
from moezoo.core.spec import HeadRouterSpec


def route_heads(
    spec: HeadRouterSpec, parameters: Parameters, x_BTD: Array, context: RoutingContext, record: Record, name: str
) -> Routing:
    """Route P = B * T tokens to attention heads; arguments as of `moe`, `parameters` with those of `router`."""
    routing = route(spec.router, inside(parameters, "router"), x_BTD.reshape(-1, x_BTD.shape[-1]), context)
    record[f"{name}.router.logits"] = routing.logits_PE
    record[f"{name}.router.weight"] = routing.weight_PK
    return routing


def choose_heads(query_BTMGH: Array, routing: Routing | None) -> Array:
    """Return the query heads of the K experts of each token: [B, T, M, K, H]. Expert g is head g of each of M groups.

    Without a routing these are all G heads.

    Source: Zhang et al. 2022 (MoA), arXiv 2210.05144, section 3.2.
    """
    if routing is None:
        return query_BTMGH
    hot_BTKG = chosen_heads(query_BTMGH, routing)
    return np.einsum("BTMGH,BTKG->BTMKH", query_BTMGH, hot_BTKG)


def place_heads(attended_BTMKH: Array, routing: Routing | None) -> Array:
    """Return the outputs of all G heads, [B, T, M, G, H]: of a chosen one its own times its weight, of others 0."""
    if routing is None:
        return attended_BTMKH
    hot_BTKG = chosen_heads(attended_BTMKH, routing)
    weight_BTK = routing.weight_PK.reshape(hot_BTKG.shape[:3])
    return np.einsum("BTMKH,BTKG->BTMGH", attended_BTMKH * weight_BTK[:, :, None, :, None], hot_BTKG)


def chosen_heads(x: Array, routing: Routing) -> Array:
    """Return which of G heads each slot of a token is, [B, T, K, G], as numbers; x: [B, T, ...]."""
    hot_PKG = routing.expert_PK[..., None] == np.arange(routing.score_PE.shape[-1])
    return hot_PKG.reshape(*x.shape[:2], *hot_PKG.shape[1:]).astype(float)
