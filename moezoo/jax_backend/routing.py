"""The router. Spec: moezoo.core.reference.routing."""

from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moezoo.core.spec import RouterSpec
from moezoo.jax_backend.arrays import Weights


class Routing(NamedTuple):
    """Spec: moezoo.core.reference.routing.Routing."""

    expert_PK: jax.Array
    valid_PK: jax.Array
    weight_PK: jax.Array
    score_PE: jax.Array
    logits_PE: jax.Array
    selection_PE: jax.Array
    clean_logits_PE: jax.Array | None
    noise_scale_PE: jax.Array | None
    cutoff_E: jax.Array | None


class Router(nnx.Module):
    """Spec: moezoo.core.reference.routing.route."""

    def __init__(self, spec: RouterSpec, weights: Weights):
        self.spec = spec
        self.w_router = weights.parameter("w_router")

    def __call__(
        self,
        x_PD: jax.Array,
        *,
        token_P: jax.Array | None = None,
        previous_PE: jax.Array | None = None,
        forced_PK: jax.Array | None = None,
        key: jax.Array | None = None,
        inference: bool = False,
    ) -> Routing:
        spec = self.spec
        x_PD = x_PD.astype(jnp.float32) if spec.dtype == "float32" else x_PD
        logits_PE = jnp.einsum("PD,DE->PE", x_PD, self.w_router[...].astype(x_PD.dtype)).astype(jnp.float32)
        score_PE = jax.nn.softmax(logits_PE, axis=-1)
        # Softmax keeps the order of the logits; lax.top_k sorts descending and breaks ties by the lower id.
        expert_PK = lax.top_k(lax.stop_gradient(logits_PE), spec.top_k)[1] if forced_PK is None else forced_PK
        weight_PK = jnp.take_along_axis(score_PE, expert_PK, axis=-1)
        match spec.renormalize:
            case "sum":
                weight_PK = weight_PK / (jnp.sum(weight_PK, axis=-1, keepdims=True) + spec.renormalize_epsilon)
            case "none":
                pass
            case _:
                assert_never(spec.renormalize)
        valid_PK = jnp.ones(expert_PK.shape, jnp.bool_)
        return Routing(expert_PK, valid_PK, weight_PK, score_PE, logits_PE, logits_PE, None, None, None)
