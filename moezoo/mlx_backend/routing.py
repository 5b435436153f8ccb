"""The router. Spec: moezoo.core.reference.routing."""

from typing import NamedTuple, assert_never

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import RouterSpec
from moezoo.mlx_backend.arrays import Weights


class Routing(NamedTuple):
    """Spec: moezoo.core.reference.routing.Routing."""

    expert_PK: mx.array
    valid_PK: mx.array
    weight_PK: mx.array
    score_PE: mx.array
    logits_PE: mx.array
    selection_PE: mx.array
    clean_logits_PE: mx.array | None
    noise_scale_PE: mx.array | None
    cutoff_E: mx.array | None


class Router(nn.Module):
    """Spec: moezoo.core.reference.routing.route."""

    def __init__(self, spec: RouterSpec, weights: Weights):
        super().__init__()
        self.spec = spec
        self.w_router = weights.parameter("w_router")

    def __call__(
        self,
        x_PD: mx.array,
        *,
        token_P: mx.array | None = None,
        previous_PE: mx.array | None = None,
        forced_PK: mx.array | None = None,
        key: mx.array | None = None,
        inference: bool = False,
    ) -> Routing:
        spec = self.spec
        x_PD = x_PD.astype(mx.float32) if spec.dtype == "float32" else x_PD
        logits_PE = mx.einsum("PD,DE->PE", x_PD, self.w_router.astype(x_PD.dtype)).astype(mx.float32)
        score_PE = mx.softmax(logits_PE, axis=-1, precise=True)
        # Softmax keeps the order of the logits.
        # Trap: argsort is stable, so ties go to the lower id; argpartition has no tie rule.
        order_PE = mx.argsort(-mx.stop_gradient(logits_PE), axis=-1)
        expert_PK = order_PE[:, : spec.top_k].astype(mx.int32) if forced_PK is None else forced_PK
        # Trap: without it, "Cannot calculate VJP with respect to indices".
        expert_PK = mx.stop_gradient(expert_PK)
        weight_PK = mx.take_along_axis(score_PE, expert_PK, axis=-1)
        match spec.renormalize:
            case "sum":
                weight_PK = weight_PK / (mx.sum(weight_PK, axis=-1, keepdims=True) + spec.renormalize_epsilon)
            case "none":
                pass
            case _:
                assert_never(spec.renormalize)
        valid_PK = mx.ones(expert_PK.shape, mx.bool_)
        return Routing(expert_PK, valid_PK, weight_PK, score_PE, logits_PE, logits_PE, None, None, None)
