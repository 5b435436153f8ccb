"""The router. Spec: moezoo.core.reference.routing."""

from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moezoo.core.random import ROUTER_JITTER
from moezoo.core.reference.routing import LEAST_WEIGHT
from moezoo.core.spec import ExpertChoiceSpec, HashChoiceSpec, NoisyTopKChoiceSpec, RouterMLPSpec, RouterSpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.choice import NO_CONTEXT, Choice, RoutingContext, choose, noisy
from moezoo.jax_backend.kernels import projection
from moezoo.jax_backend.normalization import norm
from moezoo.jax_backend.random import fold_in, uniform


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
    state_PZ: jax.Array | None
    shared_weight_PE: jax.Array | None


class Router(nnx.Module):
    """Spec: moezoo.core.reference.routing.route."""

    def __init__(self, spec: RouterSpec, weights: Weights):
        self.spec = spec
        self.w_router = weights.parameter("w_router")
        if spec.input == "normalized":
            self.input_scale = weights.parameter("input_scale")
        if spec.mlp is not None:
            self.mlp = RouterMLP(spec.mlp, weights.inside("mlp"))
        if spec.bias:
            self.b_router = weights.parameter("b_router")
        self.has_residual = spec.gating_residual and weights.has("w_residual")
        if self.has_residual:
            self.w_residual = weights.parameter("w_residual")
        self.scores_shared = weights.has("w_shared")
        if self.scores_shared:
            self.w_shared = weights.parameter("w_shared")
        if spec.learned_scale:
            self.scale = weights.parameter("scale")
        if spec.per_expert_scale:
            self.expert_scale = weights.parameter("expert_scale")
        if spec.selection_bias is not None:
            self.selection_bias = weights.state("selection_bias")
        match spec.choice:
            case NoisyTopKChoiceSpec():
                self.w_noise = weights.parameter("w_noise")
            case HashChoiceSpec():
                self.hash_table = weights.state("hash_table")
            case ExpertChoiceSpec():
                self.cutoff, self.cutoff_weight = weights.state("cutoff"), weights.state("cutoff_weight")

    def __call__(self, x_PD: jax.Array, context: RoutingContext = NO_CONTEXT) -> Routing:
        spec, key = self.spec, context.key
        x_PD, state_PZ = self._router_input(x_PD, key), None
        if spec.mlp is not None:
            x_PD, state_PZ = self.mlp(x_PD, context.previous_PZ)
        logits_PE = self._linear(x_PD, context.previous_PE) / spec.temperature
        if spec.softcap is not None:
            logits_PE = spec.softcap * jnp.tanh(logits_PE / spec.softcap)
        if key is not None and spec.jitter is not None and spec.jitter.of == "logits":
            logits_PE = logits_PE * _jitter(spec.jitter.amount, key, logits_PE.shape)
        clean_logits_PE = noise_scale_PE = None
        if key is not None and isinstance(spec.choice, NoisyTopKChoiceSpec):
            clean_logits_PE = logits_PE
            noise_logits_PE = projection.einsum("PD,DE->PE", x_PD, self.w_noise[...].astype(x_PD.dtype))
            noise_scale_PE = jax.nn.softplus(noise_logits_PE.astype(jnp.float32))
            logits_PE = noisy(logits_PE, noise_scale_PE, key)
        score_PE = score(spec, logits_PE)
        selection_PE = lax.stop_gradient(logits_PE if spec.selection_basis == "logits" else score_PE)
        if spec.selection_bias is not None:
            selection_PE = selection_PE + lax.stop_gradient(self.selection_bias[...].astype(jnp.float32))
        if context.excluded_PE is not None:
            selection_PE = jnp.where(context.excluded_PE, -jnp.inf, selection_PE)
        table_PK = cutoff_E = None
        if isinstance(spec.choice, HashChoiceSpec):
            table_PK = self.hash_table[...][context.token_P].astype(jnp.int32)
        if isinstance(spec.choice, ExpertChoiceSpec) and context.inference:
            cutoff_E = average_cutoff(self.cutoff[...].astype(jnp.float32), self.cutoff_weight[...].astype(jnp.float32))
        choice = choose(spec, logits_PE, score_PE, selection_PE, context, table_PK=table_PK, cutoff_E=cutoff_E)
        valid_PK, shared_PE = choice.valid_PK, self._shared_score(x_PD)
        weight_PK, shared_PE = self._combine_weight(choice, logits_PE, score_PE, shared_PE)
        if context.silenced_PE is not None:
            silenced_PK = jnp.take_along_axis(context.silenced_PE, choice.expert_PK, axis=-1)
            weight_PK = jnp.where(silenced_PK, 0.0, weight_PK)
        if context.real_P is not None:
            valid_PK = valid_PK & context.real_P[:, None]
            weight_PK = jnp.where(context.real_P[:, None], weight_PK, 0.0)
        return Routing(
            choice.expert_PK,
            valid_PK,
            weight_PK,
            score_PE,
            logits_PE,
            selection_PE,
            clean_logits_PE,
            noise_scale_PE,
            choice.cutoff_E,
            state_PZ,
            shared_PE,
        )

    def _router_input(self, x_PD: jax.Array, key: jax.Array | None) -> jax.Array:
        """Return the router's input in the dtype of the product; jitter and norm are computed in float32."""
        spec = self.spec
        dtype = jnp.float32 if spec.dtype == "float32" else x_PD.dtype
        x_PD = x_PD.astype(jnp.float32)
        if key is not None and spec.jitter is not None and spec.jitter.of == "input":
            x_PD = x_PD * _jitter(spec.jitter.amount, key, x_PD.shape)
        if spec.input == "normalized":
            mean_square_P1 = jnp.mean(x_PD**2, axis=-1, keepdims=True)
            scale_D = self.input_scale[...].astype(jnp.float32) / x_PD.shape[-1] ** 0.5
            x_PD = x_PD * lax.rsqrt(mean_square_P1 + spec.input_epsilon) * scale_D
        return x_PD.astype(dtype)

    def _linear(self, x_PD: jax.Array, previous_PE: jax.Array | None) -> jax.Array:
        logits_PE = projection.einsum("PD,DE->PE", x_PD, self.w_router[...].astype(x_PD.dtype)).astype(jnp.float32)
        if self.spec.bias:
            logits_PE = logits_PE + self.b_router[...].astype(jnp.float32)
        if self.spec.product_keys:
            logits_PE = product_key_logits(logits_PE)
        if self.has_residual:
            assert previous_PE is not None
            logits_PE = logits_PE + previous_PE @ self.w_residual[...].astype(jnp.float32)
        return logits_PE

    def _combine_weight(
        self, choice: Choice, logits_PE: jax.Array, score_PE: jax.Array, shared_PE: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        spec = self.spec
        if choice.weight_PK is not None:
            weight_PK = choice.weight_PK
        else:
            of_chosen_PE = score_PE if spec.weight == "score" else logits_PE
            weight_PK = jnp.take_along_axis(of_chosen_PE, choice.expert_PK, axis=-1)
            match spec.weight:
                case "score":
                    pass
                case "softmax_of_chosen":
                    weight_PK = jax.nn.softmax(jnp.where(choice.valid_PK, weight_PK, -jnp.inf), axis=-1)
                case "sigmoid_of_chosen":
                    weight_PK = jax.nn.sigmoid(weight_PK)
                case _:
                    assert_never(spec.weight)
        weight_PK = jnp.where(choice.valid_PK, weight_PK, 0.0)
        divisor_P1 = _divisor(spec, weight_PK, shared_PE)
        scale = spec.scale * self.scale[...].astype(jnp.float32) if spec.learned_scale else spec.scale
        weight_PK = weight_PK / divisor_P1 * scale
        if spec.per_expert_scale:
            weight_PK = weight_PK * self.expert_scale[...].astype(jnp.float32)[choice.expert_PK]
        return weight_PK, None if shared_PE is None else shared_PE / divisor_P1 * scale

    def _shared_score(self, x_PD: jax.Array) -> jax.Array | None:
        """Spec: moezoo.core.reference.routing._shared_score; None where the router scores no shared experts."""
        if not self.scores_shared:
            return None
        logits_PE = projection.einsum("PD,DE->PE", x_PD, self.w_shared[...].astype(x_PD.dtype)).astype(jnp.float32)
        logits_PE, softcap = logits_PE / self.spec.temperature, self.spec.softcap
        return score(self.spec, logits_PE if softcap is None else softcap * jnp.tanh(logits_PE / softcap))


class RouterMLP(nnx.Module):
    """Spec: moezoo.core.reference.routing.router_mlp; in the dtype of the router's products."""

    def __init__(self, spec: RouterMLPSpec, weights: Weights):
        self.w_down, self.b_down = weights.parameter("w_down"), weights.parameter("b_down")
        self.averages = spec.depth_average and weights.has("state_scale")
        if self.averages:
            self.state_scale = weights.parameter("state_scale")
        self.norm = norm(spec.norm, weights.inside("norm"))
        self.w_first, self.b_first = weights.parameter("w_first"), weights.parameter("b_first")
        self.w_second, self.b_second = weights.parameter("w_second"), weights.parameter("b_second")

    def __call__(self, x_PD: jax.Array, previous_PZ: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        dtype = x_PD.dtype
        state_PZ = projection.einsum("PD,DZ->PZ", x_PD, self.w_down[...].astype(dtype))
        state_PZ = state_PZ + self.b_down[...].astype(dtype)
        if self.averages:
            assert previous_PZ is not None
            state_PZ = state_PZ + self.state_scale[...].astype(dtype) * previous_PZ
        x_PZ = projection.einsum("PZ,ZF->PF", self.norm(state_PZ), self.w_first[...].astype(dtype))
        x_PZ = jax.nn.gelu(x_PZ + self.b_first[...].astype(dtype), approximate=False)
        x_PZ = projection.einsum("PZ,ZF->PF", x_PZ, self.w_second[...].astype(dtype))
        return jax.nn.gelu(x_PZ + self.b_second[...].astype(dtype), approximate=False), state_PZ


def jittered_input(spec: RouterSpec, x_PD: jax.Array, key: jax.Array | None) -> jax.Array:
    """Spec: moezoo.core.reference.routing.jittered_input."""
    if key is None or spec.jitter is None or spec.jitter.of != "mixture":
        return x_PD
    return (x_PD.astype(jnp.float32) * _jitter(spec.jitter.amount, key, x_PD.shape)).astype(x_PD.dtype)


def _jitter(amount: float, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return 1 + amount * (2 * uniform(fold_in(key, ROUTER_JITTER), shape) - 1)


def product_key_logits(key_PE: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.routing.product_key_logits."""
    number = key_PE.shape[-1] // 2
    return (key_PE[:, :number, None] + key_PE[:, None, number:]).reshape(len(key_PE), number * number)


def score(spec: RouterSpec, logits_PE: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.routing.score."""
    match spec.score:
        case "softmax":
            return jax.nn.softmax(logits_PE, axis=-1)
        case "sigmoid":
            return jax.nn.sigmoid(logits_PE)
        case "sqrt_softplus":
            # Trap: below -87 softplus underflows, and the gradient of its root is 0 / 0; there it is exp(logit / 2).
            tail_PE = jnp.exp(jnp.minimum(logits_PE + 20, 0.0) / 2)
            return jnp.sqrt(jax.nn.softplus(jnp.maximum(logits_PE, -20))) * tail_PE
        case "none":
            return logits_PE
        case _:
            assert_never(spec.score)


def average_cutoff(cutoff_E: jax.Array, cutoff_weight_1: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.routing.average_cutoff."""
    return cutoff_E / jnp.maximum(cutoff_weight_1, LEAST_WEIGHT)


def _divisor(spec: RouterSpec, weight_PK: jax.Array, shared_PE: jax.Array | None) -> jax.Array:
    """Spec: moezoo.core.reference.routing._divisor."""
    match spec.renormalize:
        case "none":
            return jnp.ones((len(weight_PK), 1), jnp.float32)
        case "sum":
            divisor_P1 = jnp.sum(weight_PK, axis=-1, keepdims=True)
            if shared_PE is not None:
                divisor_P1 = divisor_P1 + jnp.sum(shared_PE, axis=-1, keepdims=True)
        case "p_norm":
            order = spec.renormalize_order
            divisor_P1 = jnp.sum(weight_PK**order, axis=-1, keepdims=True) ** (1 / order)
        case _:
            assert_never(spec.renormalize)
    epsilon = spec.renormalize_epsilon
    return jnp.maximum(divisor_P1, epsilon) if spec.renormalize_floor else divisor_P1 + epsilon
