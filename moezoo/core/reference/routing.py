"""The router: scores, chosen experts and combine weights of each token."""

from typing import NamedTuple

import autograd.numpy as np
from autograd.tracer import getval

from moezoo.core.random import ROUTER_JITTER, Bits, fold_in, uniform
from moezoo.core.reference import Array, Parameters, adapter, inside
from moezoo.core.reference.choice import NO_CONTEXT, Choice, RoutingContext, choose, noisy
from moezoo.core.reference.feed_forward import exact_gelu
from moezoo.core.reference.normalization import normalize
from moezoo.core.spec import ExpertChoiceSpec, HashChoiceSpec, NoisyTopKChoiceSpec, RouterMLPSpec, RouterSpec

LEAST_WEIGHT = 1e-30  # of a moving average: only the 0 from before the first step is less


class Routing(NamedTuple):
    """Output of every kind of router; routing statistics and auxiliary losses are computed from it.

    Fields:
        expert_PK: int, the chosen experts of each token, by descending selection value, ties to the lower id.
        valid_PK: bool, False for a slot that the router left unused, as all slots of padding are; its weight is 0 and
            its expert id is valid.
        weight_PK: combine weights: what multiplies each chosen expert's output (or input).
        score_PE: scores of all experts (probabilities for softmax).
        logits_PE: before the score function, float32; with the noise, if there was any.
        selection_PE: values that the choice compared; minus infinity for excluded experts. No gradient.
        clean_logits_PE, noise_scale_PE: logits before the noise, and its standard deviation; None without noise.
        cutoff_E: lowest score that each expert took (expert choice in training), else None.
        state_PZ: state of the router's MLP, for the next MoE layer; None without one.
        shared_weight_PE: weights of the shared experts that the router scores; None if there are none.
        margin_P: only in the reference: relative distance of the nearest decision from the opposite one.
    """

    expert_PK: Array
    valid_PK: Array
    weight_PK: Array
    score_PE: Array
    logits_PE: Array
    selection_PE: Array
    clean_logits_PE: Array | None
    noise_scale_PE: Array | None
    cutoff_E: Array | None
    state_PZ: Array | None
    shared_weight_PE: Array | None
    margin_P: Array


def route(spec: RouterSpec, parameters: Parameters, x_PD: Array, context: RoutingContext = NO_CONTEXT) -> Routing:
    """Route tokens: score all experts, choose up to K, weight them: `x -> logits -> score -> choice -> weight`.

    Args:
        spec: the router, a point in the algebra; its docstring has the formulas, the functions below compute them.
        parameters: `w_router` [D, E], `b_router` [E] (with product keys, 2 sqrt(E) for E), and what the spec asks for:
            `input_scale` [D], `w_residual` [E before, E], `expert_scale`, `selection_bias` and `cutoff` [E], `scale`
            and `cutoff_weight` [1], `w_noise`, `w_shared` [D, E], `hash_table` [V, K]; an MLP's own, its width for D.
        x_PD: tokens.
        context: token ids, the previous router's logits, forced, silenced and excluded experts, key, padding, and
            whether to route as generation does.

    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 3 and 5 (top-k gating); softmax over all experts, then top-k with
    renormalization: Jiang et al. 2024, arXiv 2401.04088. RouterSpec names the sources of the other fields.
    Differs: jitter of the input reaches the router alone, as in Switch; `jittered_input` is for the whole MoE layer.
    """
    key = context.key
    x_PD = _router_input(spec, parameters, x_PD, key)
    state_PZ = clean_logits_PE = noise_scale_PE = None
    if spec.mlp is not None:
        x_PD, state_PZ = router_mlp(spec.mlp, inside(parameters, "mlp"), x_PD, context.previous_PZ)
    logits_PE = _linear(spec, parameters, x_PD, context.previous_PE) / spec.temperature
    if spec.softcap is not None:
        logits_PE = spec.softcap * np.tanh(logits_PE / spec.softcap)
    if key is not None and spec.jitter is not None and spec.jitter.of == "logits":
        logits_PE = logits_PE * _jitter(spec.jitter.amount, key, logits_PE.shape)
    if key is not None and isinstance(spec.choice, NoisyTopKChoiceSpec):
        clean_logits_PE = logits_PE
        noise_scale_PE = np.logaddexp(0.0, adapter.einsum("PD,DE->PE", x_PD, parameters["w_noise"]))
        logits_PE = noisy(logits_PE, noise_scale_PE, key)
    score_PE = score(spec, logits_PE)
    selection_PE = getval(logits_PE if spec.selection_basis == "logits" else score_PE)
    if spec.selection_bias is not None:
        selection_PE = selection_PE + getval(parameters["selection_bias"])
    if context.excluded_PE is not None:
        selection_PE = np.where(context.excluded_PE, -np.inf, selection_PE)
    table_PK = cutoff_E = None
    if isinstance(spec.choice, HashChoiceSpec):
        table_PK = getval(parameters["hash_table"])[context.token_P].astype(int)
    if isinstance(spec.choice, ExpertChoiceSpec) and context.inference:
        cutoff_E = average_cutoff(parameters["cutoff"], parameters["cutoff_weight"])
    choice = choose(spec, logits_PE, score_PE, selection_PE, context, table_PK=table_PK, cutoff_E=cutoff_E)
    weight_PK, shared_PE = combine_weight(spec, parameters, choice, logits_PE, score_PE, x_PD)
    if context.silenced_PE is not None:
        weight_PK = np.where(np.take_along_axis(context.silenced_PE, choice.expert_PK, axis=-1), 0.0, weight_PK)
    real_P1 = np.ones((len(x_PD), 1), bool) if context.real_P is None else context.real_P[:, None]
    return Routing(
        choice.expert_PK,
        choice.valid_PK & real_P1,
        np.where(real_P1, weight_PK, 0.0),
        score_PE,
        logits_PE,
        selection_PE,
        clean_logits_PE,
        noise_scale_PE,
        choice.cutoff_E,
        state_PZ,
        shared_PE,
        choice.margin_P,
    )


def jittered_input(spec: RouterSpec, x_PD: Array, key: Bits | None) -> Array:
    """Return the input of router, experts and shared experts: in training times noise, for `jitter: {of: mixture}`.

    Source: transformers 5.23, models mixtral, minimax_m2, phimoe (`input_jitter_noise`), dbrx.
    """
    if key is None or spec.jitter is None or spec.jitter.of != "mixture":
        return x_PD
    return x_PD * _jitter(spec.jitter.amount, key, x_PD.shape)


def _router_input(spec: RouterSpec, parameters: Parameters, x_PD: Array, key: Bits | None) -> Array:
    """Return the router's input: with jitter, then normalized: `x / rms(x) * input_scale / sqrt(D)`."""
    if key is not None and spec.jitter is not None and spec.jitter.of == "input":
        x_PD = x_PD * _jitter(spec.jitter.amount, key, x_PD.shape)
    if spec.input == "normalized":
        mean_square_P1 = np.mean(x_PD**2, axis=-1, keepdims=True)
        x_PD = x_PD / np.sqrt(mean_square_P1 + spec.input_epsilon) * parameters["input_scale"] / np.sqrt(x_PD.shape[-1])
    return x_PD


def router_mlp(
    spec: RouterMLPSpec, parameters: Parameters, x_PD: Array, previous_PZ: Array | None = None
) -> tuple[Array, Array]:
    """Return what the router's matrix multiplies, [P, Z], and the state for the next MoE layer, [P, Z].

        state = x w_down + b_down + state_scale * previous state
        output = gelu(gelu(norm(state) w_first + b_first) w_second + b_second)

    Args:
        spec: the MLP; without `depth_average`, and in the first MoE layer, nothing is added to the state.
        parameters: `w_down` [D, Z], `w_first` and `w_second` [Z, Z], a bias [Z] of each, those of `norm`, and
            `state_scale` [Z] if there is something to add.
        x_PD: the router's input.
        previous_PZ: state of the previous MoE layer's router.

    Source: Anthony et al. 2025 (ZAYA1), arXiv 2511.17127; transformers 5.23, zaya (`ZayaRouter`), GELU by erf.
    """
    state_PZ = adapter.einsum("PD,DZ->PZ", x_PD, parameters["w_down"]) + parameters["b_down"]
    if "state_scale" in parameters:
        state_PZ = state_PZ + parameters["state_scale"] * previous_PZ
    x_PZ = normalize(spec.norm, inside(parameters, "norm"), state_PZ)
    x_PZ = exact_gelu(adapter.einsum("PZ,ZF->PF", x_PZ, parameters["w_first"]) + parameters["b_first"])
    return exact_gelu(adapter.einsum("PZ,ZF->PF", x_PZ, parameters["w_second"]) + parameters["b_second"]), state_PZ


def _jitter(amount: float, key: Bits, shape: tuple[int, ...]) -> Array:
    """Uniform in [1 - amount, 1 + amount)."""
    return 1 + amount * (2 * uniform(fold_in(key, ROUTER_JITTER), shape).astype(float) - 1)


def _linear(spec: RouterSpec, parameters: Parameters, x_PD: Array, previous_PE: Array | None) -> Array:
    """`x w_router + b_router + previous w_residual`; the first MoE layer of a model has no w_residual."""
    logits_PE = adapter.einsum("PD,DE->PE", x_PD, parameters["w_router"])
    if spec.bias:
        logits_PE = logits_PE + parameters["b_router"]
    if spec.product_keys:
        logits_PE = product_key_logits(logits_PE)
    if spec.gating_residual and "w_residual" in parameters:
        logits_PE = logits_PE + previous_PE @ parameters["w_residual"]
    return logits_PE


def product_key_logits(key_PE: Array) -> Array:
    """Return the logits `first[e // n] + second[e % n]` of E = n * n experts from the two halves of 2 n outputs.

    [P, 2 n] -> [P, E]. Source: Lample et al. 2019, arXiv 1907.05242, section 3.2; He 2024, arXiv 2407.04153, section
    2.2.
    Differs: they search the best of the sums among those of each half's K best; here all sums are made, since scores,
    losses and traces are of all experts.
    """
    number = key_PE.shape[-1] // 2
    return np.reshape(key_PE[:, :number, None] + key_PE[:, None, number:], (len(key_PE), number * number))


def score(spec: RouterSpec, logits_PE: Array) -> Array:
    """`softmax` over the experts, `sigmoid`, `sqrt_softplus`: `sqrt(log(1 + exp(logit)))`, or `none`: the logits."""
    match spec.score:
        case "softmax":
            return softmax(logits_PE)
        case "sigmoid":
            return sigmoid(logits_PE)
        case "sqrt_softplus":
            return np.sqrt(np.logaddexp(0.0, logits_PE))
        case "none":
            return logits_PE


def _shared_score(spec: RouterSpec, parameters: Parameters, x_PD: Array) -> Array | None:
    """Return the scores of shared experts, computed as those of the routed ones, without noise, bias or residual.

    None where the router scores no shared experts.
    """
    if "w_shared" not in parameters:
        return None
    logits_PE = adapter.einsum("PD,DE->PE", x_PD, parameters["w_shared"]) / spec.temperature
    return score(spec, logits_PE if spec.softcap is None else spec.softcap * np.tanh(logits_PE / spec.softcap))


def average_cutoff(cutoff_E: Array, cutoff_weight_1: Array) -> Array:
    """Return the moving average of cutoffs, bias-corrected as Adam's moments are: its sum over its sum of weights."""
    return getval(cutoff_E) / np.maximum(getval(cutoff_weight_1), LEAST_WEIGHT)


def combine_weight(
    spec: RouterSpec, parameters: Parameters, choice: Choice, logits_PE: Array, score_PE: Array, x_PD: Array
) -> tuple[Array, Array | None]:
    """Return the combine weights of the chosen experts [P, K], 0 in unused slots, and those of shared ones.

    The score, softmax or sigmoid of the chosen logits, or the choice's own weights (sparsemixer). Then, in this
    order: divided by `sum_k weight_k` or by the p-norm `(sum_k weight_k^p)^(1/p)`, where an epsilon is added to the
    divisor or is its floor; times `scale` and the learned scale; times the expert's own scale. Scores of shared experts
    are added to the sum, and are divided and scaled as the others are.
    """
    shared_PE = _shared_score(spec, parameters, x_PD)
    row_P1 = np.arange(len(score_PE))[:, None]
    if choice.weight_PK is not None:
        weight_PK = choice.weight_PK
    else:
        match spec.weight:
            case "score":
                weight_PK = score_PE[row_P1, choice.expert_PK]
            case "softmax_of_chosen":
                weight_PK = softmax(np.where(choice.valid_PK, logits_PE[row_P1, choice.expert_PK], -np.inf))
            case "sigmoid_of_chosen":
                weight_PK = sigmoid(logits_PE[row_P1, choice.expert_PK])
    weight_PK = np.where(choice.valid_PK, weight_PK, 0.0)
    divisor_P1 = _divisor(spec, weight_PK, shared_PE)
    scale = spec.scale * parameters["scale"] if spec.learned_scale else spec.scale
    weight_PK = weight_PK / divisor_P1 * scale
    if spec.per_expert_scale:
        weight_PK = weight_PK * parameters["expert_scale"][choice.expert_PK]
    return weight_PK, None if shared_PE is None else shared_PE / divisor_P1 * scale


def _divisor(spec: RouterSpec, weight_PK: Array, shared_PE: Array | None) -> Array:
    """Return what the weights of each token are divided by: [P, 1]."""
    match spec.renormalize:
        case "none":
            return np.ones((len(weight_PK), 1))
        case "sum":
            divisor_P1 = np.sum(weight_PK, axis=-1, keepdims=True)
            if shared_PE is not None:
                divisor_P1 = divisor_P1 + np.sum(shared_PE, axis=-1, keepdims=True)
        case "p_norm":
            order = spec.renormalize_order
            divisor_P1 = np.sum(weight_PK**order, axis=-1, keepdims=True) ** (1 / order)
    epsilon = spec.renormalize_epsilon
    return np.maximum(divisor_P1, epsilon) if spec.renormalize_floor else divisor_P1 + epsilon


def softmax(logits: Array) -> Array:
    """`exp(logit) / sum exp(logit)` over the last axis; minus infinity gives 0."""
    unnormalized = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    return unnormalized / np.sum(unnormalized, axis=-1, keepdims=True)


def sigmoid(logits: Array) -> Array:
    """`1 / (1 + exp(-logit))`, without overflow."""
    return np.exp(-np.logaddexp(0.0, -logits))
