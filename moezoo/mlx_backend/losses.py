"""Cross-entropy and auxiliary losses. Spec: moezoo.core.reference.losses."""

from collections.abc import Sequence
from typing import assert_never

import mlx.core as mx

from moezoo.core.spec import AuxiliaryLossSpec, ModelSpec, RouterZLossSpec, SwitchBalanceLossSpec
from moezoo.mlx_backend.dispatch import expert_counts
from moezoo.mlx_backend.routing import Routing


def token_losses(logits_BTV: mx.array, target_BT: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.losses.token_losses."""
    chosen = mx.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    return mx.logsumexp(logits_BTV, axis=-1) - chosen


def switch_balance(routing: Routing) -> mx.array:
    """Spec: moezoo.core.reference.losses.switch_balance."""
    num_experts = routing.score_PE.shape[-1]
    share_E = expert_counts(routing) / routing.expert_PK.size
    return num_experts * mx.sum(share_E * mx.mean(routing.score_PE, axis=0))


def router_z(routing: Routing) -> mx.array:
    """Spec: moezoo.core.reference.losses.router_z."""
    return mx.mean(mx.square(mx.logsumexp(routing.logits_PE, axis=-1)))


def auxiliary_loss(spec: AuxiliaryLossSpec, routing: Routing) -> mx.array:
    """Spec: moezoo.core.reference.losses.auxiliary_loss."""
    match spec:
        case SwitchBalanceLossSpec():
            return switch_balance(routing)
        case RouterZLossSpec():
            return router_z(routing)
        case _:
            assert_never(spec)


def loss_terms(
    spec: ModelSpec,
    logits_BTV: mx.array,
    target_BT: mx.array,
    routings: Sequence[Routing],
    *,
    index_losses=(),
    global_load=None,
) -> dict[str, mx.array]:
    """Spec: moezoo.core.reference.losses.loss_terms."""
    terms = {"cross_entropy": mx.mean(token_losses(logits_BTV, target_BT))}
    values: dict[str, list[mx.array]] = {}
    weighted: dict[str, mx.array] = {}
    moe_specs = [layer.moe for layer in spec.all_layers if layer.moe is not None]
    for moe_spec, routing in zip(moe_specs, routings, strict=True):
        for loss in moe_spec.losses:
            value = auxiliary_loss(loss, routing)
            values.setdefault(loss.kind, []).append(value)
            weighted[loss.kind] = weighted.get(loss.kind, 0.0) + loss.coefficient * value
    total = terms["cross_entropy"]
    for name, layer_values in values.items():
        terms[name] = sum(layer_values) / len(layer_values)
        terms[f"{name}_weighted"] = weighted[name]
        total = total + weighted[name]
    return {"loss": total, **terms}
