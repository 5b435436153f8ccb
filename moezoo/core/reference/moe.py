"""The mixture of experts: Router -> Dispatch -> Experts -> Combine, plus shared experts."""

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, Record, inside
from moezoo.core.reference.dispatch import combine, dispatch
from moezoo.core.reference.experts import swiglu_experts
from moezoo.core.reference.feed_forward import swiglu
from moezoo.core.reference.routing import Routing, route
from moezoo.core.spec import MoESpec


def moe(
    spec: MoESpec,
    parameters: Parameters,
    x_BTD: Array,
    *,
    forced_PK: Array | None = None,
    record: Record | None = None,
    name: str = "moe",
) -> tuple[Array, Routing]:
    """[B, T, D] -> [B, T, D] and the Routing of its P = B * T tokens, numbered sequence by sequence.

    `out = sum over chosen experts of weight * expert(x)  +  shared(x)`.
    """
    x_PD = x_BTD.reshape(-1, x_BTD.shape[-1])
    routing = route(spec.router, parameters["router.w_router"], x_PD, forced_PK)
    dispatched = dispatch(spec.dispatch, routing, spec.num_experts)
    y_RD = swiglu_experts(inside(parameters, "experts"), x_PD[dispatched.token_R], dispatched.size_E)
    out_PD = combine(dispatched, y_RD, x_PD.shape[0])
    if record is not None:
        record[f"{name}.router.logits"] = routing.logits_PE
        record[f"{name}.router.weight"] = routing.weight_PK
        record[f"{name}.routed"] = out_PD
    if spec.shared is not None:
        out_PD = out_PD + swiglu(inside(parameters, "shared"), x_PD)
    return np.reshape(out_PD, x_BTD.shape), routing
