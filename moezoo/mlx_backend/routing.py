"""The router. Spec: moezoo.core.reference.routing."""

from typing import NamedTuple, assert_never

import mlx.core as mx
from mlx import nn

from moezoo.core.random import ROUTER_JITTER
from moezoo.core.reference.routing import LEAST_WEIGHT
from moezoo.core.spec import (
    ExpertChoiceSpec,
    HashChoiceSpec,
    NoisyTopKChoiceSpec,
    RouterMLPSpec,
    RouterSpec,
    TopPChoiceSpec,
)
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.choice import NO_CONTEXT, Choice, RoutingContext, choose, noisy
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.kernels.x86 import pays
from moezoo.mlx_backend.kernels.x86.routing import softmax
from moezoo.mlx_backend.normalization import norm
from moezoo.mlx_backend.quantization import as_array
from moezoo.mlx_backend.random import fold_in, uniform


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
    state_PZ: mx.array | None
    shared_weight_PE: mx.array | None


class Router(nn.Module):
    """Spec: moezoo.core.reference.routing.route."""

    def __init__(self, spec: RouterSpec, weights: Weights):
        super().__init__()
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
        self.freeze(keys=["selection_bias", "hash_table", "cutoff", "cutoff_weight"], recurse=False)

    def __call__(self, x_PD: mx.array, context: RoutingContext = NO_CONTEXT) -> Routing:
        spec, key = self.spec, context.key
        x_PD, state_PZ = self._router_input(x_PD, key), None
        if spec.mlp is not None:
            x_PD, state_PZ = self.mlp(x_PD, context.previous_PZ)
        logits_PE = self._linear(x_PD, context.previous_PE)
        if spec.temperature != 1:
            logits_PE = logits_PE / spec.temperature
        if spec.softcap is not None:
            logits_PE = spec.softcap * mx.tanh(logits_PE / spec.softcap)
        if key is not None and spec.jitter is not None and spec.jitter.of == "logits":
            logits_PE = logits_PE * _jitter(spec.jitter.amount, key, logits_PE.shape)
        clean_logits_PE = noise_scale_PE = None
        if key is not None and isinstance(spec.choice, NoisyTopKChoiceSpec):
            clean_logits_PE = logits_PE
            noise_logits_PE = projection.einsum("PD,DE->PE", x_PD, self.w_noise.astype(x_PD.dtype))
            noise_scale_PE = mx.logaddexp(noise_logits_PE.astype(mx.float32), 0.0)
            logits_PE = noisy(logits_PE, noise_scale_PE, key)
        score_PE = score(spec, logits_PE)
        selection_PE = logits_PE if spec.selection_basis == "logits" else score_PE  # `choose` stops the gradient
        if spec.selection_bias is not None:
            selection_PE = selection_PE + mx.stop_gradient(self.selection_bias.astype(mx.float32))
        if context.excluded_PE is not None:
            selection_PE = mx.where(context.excluded_PE, -mx.inf, selection_PE)
        table_PK = cutoff_E = None
        if isinstance(spec.choice, HashChoiceSpec):
            table_PK = self.hash_table[context.token_P].astype(mx.int32)
        if isinstance(spec.choice, ExpertChoiceSpec) and context.inference:
            cutoff_E = average_cutoff(self.cutoff.astype(mx.float32), self.cutoff_weight.astype(mx.float32))
        choice = choose(spec, logits_PE, score_PE, selection_PE, context, table_PK=table_PK, cutoff_E=cutoff_E)
        every_slot, valid_PK = _uses_every_slot(spec, context), choice.valid_PK
        shared_PE = self._shared_score(x_PD)
        weight_PK, shared_PE = self._combine_weight(choice, logits_PE, score_PE, shared_PE, every_slot=every_slot)
        if context.silenced_PE is not None:
            silenced_PK = mx.take_along_axis(context.silenced_PE, choice.expert_PK, axis=-1)
            weight_PK = mx.where(silenced_PK, 0.0, weight_PK)
        if context.real_P is not None:
            valid_PK = valid_PK & context.real_P[:, None]
            weight_PK = mx.where(context.real_P[:, None], weight_PK, 0.0)
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

    def _router_input(self, x_PD: mx.array, key: mx.array | None) -> mx.array:
        """Return the router's input in the dtype of the product; jitter and norm are computed in float32."""
        spec = self.spec
        dtype = mx.float32 if spec.dtype == "float32" else x_PD.dtype
        x_PD = x_PD.astype(mx.float32)
        if key is not None and spec.jitter is not None and spec.jitter.of == "input":
            x_PD = x_PD * _jitter(spec.jitter.amount, key, x_PD.shape)
        if spec.input == "normalized":
            mean_square_P1 = mx.mean(x_PD**2, axis=-1, keepdims=True)
            scale_D = self.input_scale.astype(mx.float32) / x_PD.shape[-1] ** 0.5
            x_PD = x_PD * mx.rsqrt(mean_square_P1 + spec.input_epsilon) * scale_D
        return x_PD.astype(dtype)

    def _linear(self, x_PD: mx.array, previous_PE: mx.array | None) -> mx.array:
        logits_PE = projection.einsum("PD,DE->PE", x_PD, self.w_router.astype(x_PD.dtype)).astype(mx.float32)
        if self.spec.bias:
            logits_PE = logits_PE + self.b_router.astype(mx.float32)
        if self.spec.product_keys:
            logits_PE = product_key_logits(logits_PE)
        if self.has_residual:
            assert previous_PE is not None
            logits_PE = logits_PE + previous_PE @ as_array(self.w_residual).astype(mx.float32)
        return logits_PE

    def _combine_weight(
        self,
        choice: Choice,
        logits_PE: mx.array,
        score_PE: mx.array,
        shared_PE: mx.array | None,
        *,
        every_slot: bool,
    ) -> tuple[mx.array, mx.array | None]:
        spec = self.spec
        if choice.weight_PK is not None:
            weight_PK = choice.weight_PK
        else:
            of_chosen_PE = score_PE if spec.weight == "score" else logits_PE
            weight_PK = mx.take_along_axis(of_chosen_PE, choice.expert_PK, axis=-1)
            match spec.weight:
                case "score":
                    pass
                case "softmax_of_chosen":
                    chosen_PK = weight_PK if every_slot else mx.where(choice.valid_PK, weight_PK, -mx.inf)
                    weight_PK = mx.softmax(chosen_PK, axis=-1, precise=True)
                case "sigmoid_of_chosen":
                    weight_PK = mx.sigmoid(weight_PK)
                case _:
                    assert_never(spec.weight)
        weight_PK = weight_PK if every_slot else mx.where(choice.valid_PK, weight_PK, 0.0)
        if spec.renormalize != "none":
            divisor_P1 = _divisor(spec, weight_PK, shared_PE)
            weight_PK = weight_PK / divisor_P1
            shared_PE = None if shared_PE is None else shared_PE / divisor_P1
        scale = spec.scale * self.scale.astype(mx.float32) if spec.learned_scale else spec.scale
        if spec.scale != 1 or spec.learned_scale:
            weight_PK = weight_PK * scale
            shared_PE = None if shared_PE is None else shared_PE * scale
        if spec.per_expert_scale:
            weight_PK = weight_PK * self.expert_scale.astype(mx.float32)[choice.expert_PK]
        return weight_PK, shared_PE

    def _shared_score(self, x_PD: mx.array) -> mx.array | None:
        """Spec: moezoo.core.reference.routing._shared_score; None where the router scores no shared experts."""
        if not self.scores_shared:
            return None
        logits_PE = projection.einsum("PD,DE->PE", x_PD, self.w_shared.astype(x_PD.dtype)).astype(mx.float32)
        logits_PE, softcap = logits_PE / self.spec.temperature, self.spec.softcap
        return score(self.spec, logits_PE if softcap is None else softcap * mx.tanh(logits_PE / softcap))


class RouterMLP(nn.Module):
    """Spec: moezoo.core.reference.routing.router_mlp; in the dtype of the router's products."""

    def __init__(self, spec: RouterMLPSpec, weights: Weights):
        super().__init__()
        self.w_down, self.b_down = weights.parameter("w_down"), weights.parameter("b_down")
        self.averages = spec.depth_average and weights.has("state_scale")
        if self.averages:
            self.state_scale = weights.parameter("state_scale")
        self.norm = norm(spec.norm, weights.inside("norm"))
        self.w_first, self.b_first = weights.parameter("w_first"), weights.parameter("b_first")
        self.w_second, self.b_second = weights.parameter("w_second"), weights.parameter("b_second")

    def __call__(self, x_PD: mx.array, previous_PZ: mx.array | None = None) -> tuple[mx.array, mx.array]:
        dtype = x_PD.dtype
        state_PZ = projection.einsum("PD,DZ->PZ", x_PD, self.w_down.astype(dtype)) + self.b_down.astype(dtype)
        if self.averages:
            assert previous_PZ is not None
            state_PZ = state_PZ + self.state_scale.astype(dtype) * previous_PZ
        x_PZ = projection.einsum("PZ,ZF->PF", self.norm(state_PZ), self.w_first.astype(dtype))
        x_PZ = nn.gelu(x_PZ + self.b_first.astype(dtype))
        x_PZ = projection.einsum("PZ,ZF->PF", x_PZ, self.w_second.astype(dtype))
        return nn.gelu(x_PZ + self.b_second.astype(dtype)), state_PZ


def _uses_every_slot(spec: RouterSpec, context: RoutingContext) -> bool:
    """Return True if the choice leaves no slot unused, given finite logits."""
    return context.forced_PK is None and not isinstance(spec.choice, TopPChoiceSpec | ExpertChoiceSpec)


def jittered_input(spec: RouterSpec, x_PD: mx.array, key: mx.array | None) -> mx.array:
    """Spec: moezoo.core.reference.routing.jittered_input."""
    if key is None or spec.jitter is None or spec.jitter.of != "mixture":
        return x_PD
    return (x_PD.astype(mx.float32) * _jitter(spec.jitter.amount, key, x_PD.shape)).astype(x_PD.dtype)


def _jitter(amount: float, key: mx.array, shape: tuple[int, ...]) -> mx.array:
    return 1 + amount * (2 * uniform(fold_in(key, ROUTER_JITTER), shape) - 1)


def product_key_logits(key_PE: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.routing.product_key_logits."""
    number = key_PE.shape[-1] // 2
    return (key_PE[:, :number, None] + key_PE[:, None, number:]).reshape(len(key_PE), number * number)


def score(spec: RouterSpec, logits_PE: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.routing.score."""
    match spec.score:
        case "softmax":
            return softmax(logits_PE) if pays(logits_PE.size) else mx.softmax(logits_PE, axis=-1, precise=True)
        case "sigmoid":
            return mx.sigmoid(logits_PE)
        case "sqrt_softplus":
            # Trap: below -87 softplus underflows, and the gradient of its root is 0 / 0; there it is exp(logit / 2).
            tail_PE = mx.exp(mx.minimum(logits_PE + 20, 0.0) / 2)
            return mx.sqrt(mx.logaddexp(mx.maximum(logits_PE, -20), 0.0)) * tail_PE
        case "none":
            return logits_PE
        case _:
            assert_never(spec.score)


def average_cutoff(cutoff_E: mx.array, cutoff_weight_1: mx.array) -> mx.array:
    """Spec: moezoo.core.reference.routing.average_cutoff."""
    return cutoff_E / mx.maximum(cutoff_weight_1, LEAST_WEIGHT)


def _divisor(spec: RouterSpec, weight_PK: mx.array, shared_PE: mx.array | None) -> mx.array:
    """Spec: moezoo.core.reference.routing._divisor."""
    match spec.renormalize:
        case "none":
            return mx.ones((len(weight_PK), 1), mx.float32)
        case "sum":
            divisor_P1 = mx.sum(weight_PK, axis=-1, keepdims=True)
            if shared_PE is not None:
                divisor_P1 = divisor_P1 + mx.sum(shared_PE, axis=-1, keepdims=True)
        case "p_norm":
            order = spec.renormalize_order
            divisor_P1 = mx.sum(weight_PK**order, axis=-1, keepdims=True) ** (1 / order)
        case _:
            assert_never(spec.renormalize)
    epsilon = spec.renormalize_epsilon
    return mx.maximum(divisor_P1, epsilon) if spec.renormalize_floor else divisor_P1 + epsilon
