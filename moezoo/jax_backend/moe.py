"""The mixture of experts. Spec: moezoo.core.reference.moe."""

import jax
from flax import nnx

from moezoo.core.spec import MoESpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.dispatch import Dispatch, combine, dispatch
from moezoo.jax_backend.experts import Experts
from moezoo.jax_backend.feed_forward import FeedForward
from moezoo.jax_backend.routing import Router, Routing


class MoE(nnx.Module):
    """Spec: moezoo.core.reference.moe.moe."""

    def __init__(self, spec: MoESpec, weights: Weights):
        self.spec = spec
        self.router = Router(spec.router, weights.inside("router"))
        self.experts = Experts(spec.experts, weights.inside("experts"))
        if spec.shared is not None:
            self.shared = FeedForward(spec.shared_feed_forward, weights.inside("shared"))

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        raw_BTD: jax.Array | None = None,
        token_BT: jax.Array | None = None,
        previous_PE: jax.Array | None = None,
        forced_PK: jax.Array | None = None,
        key: jax.Array | None = None,
        inference: bool = False,
        record: dict[str, jax.Array] | None = None,
        name: str = "moe",
    ) -> tuple[jax.Array, Routing, Dispatch]:
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
