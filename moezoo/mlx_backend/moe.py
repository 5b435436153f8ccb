"""The mixture of experts. Spec: moezoo.core.reference.moe."""

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import MoESpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.dispatch import Dispatch, combine, dispatch
from moezoo.mlx_backend.experts import Experts
from moezoo.mlx_backend.feed_forward import FeedForward
from moezoo.mlx_backend.routing import Router, Routing


class MoE(nn.Module):
    """Spec: moezoo.core.reference.moe.moe."""

    def __init__(self, spec: MoESpec, weights: Weights):
        super().__init__()
        self.spec = spec
        self.router = Router(spec.router, weights.inside("router"))
        self.experts = Experts(spec.experts, weights.inside("experts"))
        if spec.shared is not None:
            self.shared = FeedForward(spec.shared_feed_forward, weights.inside("shared"))

    def __call__(
        self,
        x_BTD: mx.array,
        *,
        raw_BTD: mx.array | None = None,
        token_BT: mx.array | None = None,
        previous_PE: mx.array | None = None,
        forced_PK: mx.array | None = None,
        key: mx.array | None = None,
        inference: bool = False,
        record: dict[str, mx.array] | None = None,
        name: str = "moe",
    ) -> tuple[mx.array, Routing, Dispatch]:
        """`inference`: route as generation does: no noise, and every token served whatever the spec's capacity."""
        x_PD = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = self.router(
            x_PD,
            token_P=None if token_BT is None else token_BT.reshape(-1),
            previous_PE=previous_PE,
            forced_PK=forced_PK,
            key=key,
            inference=inference,
        )
        dispatched = dispatch(self.spec, routing, inference=inference)
        y_RD = self.experts(x_PD[dispatched.token_R], dispatched.size_E)
        out_PD = combine(dispatched, y_RD, x_PD.shape[0])
        if record is not None:
            record[f"{name}.router.logits"] = routing.logits_PE
            record[f"{name}.router.weight"] = routing.weight_PK
            record[f"{name}.routed"] = out_PD
        if self.spec.shared is not None:
            out_PD = out_PD + self.shared(x_PD)
        return out_PD.reshape(x_BTD.shape), routing, dispatched
