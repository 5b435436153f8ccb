"""The mixture of experts: Router -> Dispatch -> Experts -> Combine, plus shared experts."""

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, Record, inside
from moezoo.core.reference.dispatch import combine, dispatch
from moezoo.core.reference.experts import experts
from moezoo.core.reference.feed_forward import feed_forward
from moezoo.core.reference.routing import Routing, route
from moezoo.core.spec import MoESpec


def moe(
    spec: MoESpec,
    parameters: Parameters,
    x_BTD: Array,
    *,
    raw_BTD: Array | None = None,
    token_BT: Array | None = None,
    previous_PE: Array | None = None,
    forced_PK: Array | None = None,
    key: Array | None = None,
    inference: bool = False,
    record: Record | None = None,
    name: str = "moe",
) -> tuple[Array, Routing]:
    """[B, T, D] -> [B, T, D] and the Routing of its P = B * T tokens, numbered sequence by sequence.

    `out = sum over chosen experts of weight * expert(x)  +  shared(x)`.
    """
    x_PD = x_BTD.reshape(-1, x_BTD.shape[-1])
    routing = route(
        spec.router,
        inside(parameters, "router"),
        x_PD,
        token_P=None if token_BT is None else token_BT.reshape(-1),
        previous_PE=previous_PE,
        forced_PK=forced_PK,
        key=key,
        inference=inference,
    )
    dispatched = dispatch(spec, routing, inference=inference)
    y_RD = experts(spec.experts, inside(parameters, "experts"), x_PD[dispatched.token_R], dispatched.size_E)
    out_PD = combine(dispatched, y_RD, x_PD.shape[0])
    if record is not None:
        record[f"{name}.router.logits"] = routing.logits_PE
        record[f"{name}.router.weight"] = routing.weight_PK
        record[f"{name}.routed"] = out_PD
    if spec.shared is not None:
        out_PD = out_PD + feed_forward(spec.shared_feed_forward, inside(parameters, "shared"), x_PD)
    return np.reshape(out_PD, x_BTD.shape), routing
