"""Cross-entropy, and auxiliary losses of a Routing: one value per MoE layer, except `pooled_balance`.

Load-balancing losses have one form, `n * sum_i f_i p_i` over n items (experts or devices) that should be equally
loaded. `f_i` is the fraction of the load on item i: a count, so it has no gradient. `p_i` is the mean router
probability of item i, through which the gradient lowers the scores of overloaded items. writings/losses.md says which
imbalance each loss detects.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import autograd.numpy as np
from autograd.extend import defvjp, primitive
from autograd.tracer import getval

from moezoo.core.parameters.trained import trained_names
from moezoo.core.reference import Array, Parameters
from moezoo.core.reference.positions import Documents, packed_documents, token_mean
from moezoo.core.reference.routing import Routing
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import (
    AuxiliaryLossSpec,
    CommunicationBalanceLossSpec,
    DeviceBalanceLossSpec,
    ExpertBalanceLossSpec,
    GlobalBalanceLossSpec,
    HeterogeneousBalanceLossSpec,
    ImportanceLossSpec,
    LoadLossSpec,
    ModelSpec,
    MoESpec,
    PooledBalanceLossSpec,
    RouterSpec,
    RouterZLossSpec,
    SequenceBalanceLossSpec,
    SwitchBalanceLossSpec,
)
from moezoo.core.tokens import IGNORED

# --- cross-entropy ---------------------------------------------------------------------------------------------------


def log_sum_exp(x: Array) -> Array:
    """Numerically stable log-sum-exp over the last axis: [..., E] -> [...]."""
    highest = np.max(x, axis=-1, keepdims=True)
    return highest[..., 0] + np.log(np.sum(np.exp(x - highest), axis=-1))


def token_losses(logits_BTV: Array, target_BT: Array) -> Array:
    """Negative log-likelihood of each target token, in nats; 0 where the target is IGNORED: [B, T]."""
    batch, length = target_BT.shape
    chosen = logits_BTV[np.arange(batch)[:, None], np.arange(length)[None, :], target_BT]
    return np.where(target_BT == IGNORED, 0.0, log_sum_exp(logits_BTV) - chosen)


def cross_entropy(logits_BTV: Array, target_BT: Array, num_targets: float | None = None) -> Array:
    """Cross-entropy: mean of `token_losses` over the targets that are not IGNORED, at least one.

    `num_targets`: for a micro-batch, the mean number of these per micro-batch of the step, by which the sum is divided.
    The mean over micro-batches is then the mean over all targets of the step, however these are divided.
    """
    own = np.sum(target_BT != IGNORED)
    return np.sum(token_losses(logits_BTV, target_BT)) / (own if num_targets is None else num_targets)


# --- parts of balance losses -----------------------------------------------------------------------------------------


def expert_counts(routing: Routing) -> Array:
    """Number of tokens that chose each expert, before capacity drops any; unused slots are not counted: [E]."""
    hot_PKE = routing.expert_PK[..., None] == np.arange(routing.score_PE.shape[-1])
    return np.sum(hot_PKE & routing.valid_PK[..., None], axis=(0, 1))


def probabilities(spec: RouterSpec, routing: Routing) -> Array:
    """Return router probabilities [P, E], rows that sum to 1: scores other than a softmax are divided by their sum.

    Without a score function (`score: none`), the softmax of the logits. Source: DeepSeek-AI 2024 (DeepSeek-V3),
    arXiv 2412.19437, eq. 19. Differs: like Megatron-Core, we add 1e-20 to the sum, which the paper does not mention.
    """
    match spec.score:
        case "softmax":
            return routing.score_PE
        case "none":
            return np.exp(routing.logits_PE - log_sum_exp(routing.logits_PE)[:, None])
        case "sigmoid" | "sqrt_softplus":
            return routing.score_PE / (np.sum(routing.score_PE, axis=-1, keepdims=True) + 1e-20)


def highest_logits(logits_PE: Array, top_k: int) -> Array:
    """Return the mask of each token's K highest logits, ties to the lower expert id: bool [P, E]."""
    expert_PK = np.argsort(-logits_PE, axis=-1, kind="stable")[:, :top_k]
    return np.any(expert_PK[..., None] == np.arange(logits_PE.shape[-1]), axis=1)


def by_device(x: Array, num_devices: int) -> Array:
    """Sum over equal groups of consecutive experts: [..., E] -> [..., num_devices]."""
    return np.sum(np.reshape(x, (*x.shape[:-1], num_devices, -1)), axis=-1)


def squared_variation(x_E: Array) -> Array:
    """Squared coefficient of variation, `variance / mean^2`: 0 if all are equal, E / k - 1 if k are and the rest 0."""
    mean = np.mean(x_E)
    return np.mean((x_E - mean) ** 2) / mean**2


@primitive  # type: ignore[untyped-decorator]
def normal_cdf(x: Array) -> Array:
    """Standard normal cumulative distribution function Phi: `(1 + erf(x / sqrt 2)) / 2`."""
    return 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


defvjp(normal_cdf, lambda _, x: lambda g: g * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi))


# --- the auxiliary losses --------------------------------------------------------------------------------------------


def switch_balance(load_E: Array, probability_PE: Array, real_P: Array | None = None) -> Array:
    """Switch load-balancing loss, `E * sum_e f_e p_e`.

    f_e is the fraction of token-expert assignments to expert e, p_e its mean router probability. 1 when balanced; E / k
    when k experts share all tokens, with probabilities 1/k.

    Source: Fedus et al. 2021, arXiv 2101.03961, eq. 4-6; with top-k: `expert_balance`, Dai et al. 2024, arXiv
    2401.06066, eq. 12-14; with the load of all micro-batches: `global_balance`, Qiu et al. 2025, arXiv 2501.11873.
    Differs: f is a fraction of the P * K assignments, so the balanced value is 1 for every K; in Hugging Face it is K.
    """
    share_E = load_E / np.sum(load_E)
    return load_E.shape[-1] * np.sum(share_E * token_mean(probability_PE, real_P))


def device_balance(load_E: Array, probability_PE: Array, num_devices: int, real_P: Array | None = None) -> Array:
    """Balance equal groups of consecutive experts, one group per device; experts within a group may be unbalanced.

    1 when balanced; `num_devices / k` when k of `num_devices` groups share all tokens.

    Source: Dai et al. 2024 (DeepSeekMoE), arXiv 2401.06066, eq. 15-17.
    """
    return switch_balance(by_device(load_E, num_devices), by_device(probability_PE, num_devices), real_P)


def communication_balance(
    routing: Routing, probability_PE: Array, num_devices: int, max_devices: int, real_P: Array | None = None
) -> Array:
    """Communication balance loss, `sum_i f_i p_i` over groups of consecutive experts, one group per device.

    f_i is num_devices / max_devices times the fraction of tokens sent to group i (once, however many of its experts are
    there), p_i its mean probability. 1 when balanced and each token is sent to `max_devices` groups, 1 / max_devices
    when each is sent to one, and `num_devices / max_devices` when all go to the same `max_devices` groups.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), arXiv 2405.04434, eq. 29-31.
    Differs: over the tokens of the batch, not of one sequence.
    """
    hot_PKE = routing.expert_PK[..., None] == np.arange(routing.score_PE.shape[-1])
    chosen_PE = np.any(hot_PKE & routing.valid_PK[..., None], axis=1)
    sent = token_mean(by_device(chosen_PE, num_devices) > 0, real_P)
    return num_devices / max_devices * np.sum(sent * token_mean(by_device(probability_PE, num_devices), real_P))


def sequence_balance(
    logits_PE: Array,
    probability_PE: Array,
    top_k: int,
    shape: tuple[int, int],
    documents: Documents | None = None,
) -> Array:
    """Sequence-wise balance loss: mean over sequences of `E * sum_e f_e p_e` within each sequence. 1 when balanced.

    Each document of packed sequences is a sequence. `shape` is (B, T).

    f counts each token's K highest logits, as the paper does with scores: without selection bias and expert groups,
    which may choose others. So the loss balances the scores, not the choices that the bias has corrected.

    Source: DeepSeek-AI 2024 (DeepSeek-V3), arXiv 2412.19437, eq. 17-20.
    """
    sequence_P = np.repeat(np.arange(shape[0]), shape[1]) if documents is None else documents.number_P
    hot_PE, values = highest_logits(logits_PE, top_k), []
    for sequence in range(np.max(sequence_P) + 1):
        own_P = sequence_P == sequence
        values.append(np.sum(token_mean(hot_PE, own_P) / top_k * token_mean(probability_PE, own_P)))
    return logits_PE.shape[-1] * sum(values) / len(values)


def importance(routing: Routing) -> Array:
    """Importance loss: squared coefficient of variation of the sum over tokens of each expert's combine weights.

    0 when balanced; E / k - 1 when k experts share all weight equally.

    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 6-7.
    """
    hot_PKE = routing.expert_PK[..., None] == np.arange(routing.score_PE.shape[-1])
    return squared_variation(np.sum(routing.weight_PK[..., None] * hot_PKE, axis=(0, 1)))


def load(routing: Routing, top_k: int, real_P: Array | None = None) -> Array:
    """Load loss: squared coefficient of variation of each expert's expected load, which is smooth in the logits.

    `load_e = sum over tokens of Phi((clean_e - threshold_e) / noise_scale_e)`, the probability that e is chosen if its
    noise is redrawn; threshold_e is the K-th highest noisy logit of the other experts. Values as in `importance`.

    Without noise (without a key) the probability is 0 or 1: the load is the count of tokens, and has no gradient.

    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 8-11.
    """
    if routing.clean_logits_PE is None or routing.noise_scale_PE is None:
        return squared_variation(expert_counts(routing))
    order_PE = np.argsort(-routing.logits_PE, axis=-1, kind="stable")
    falling_PE = routing.logits_PE[np.arange(len(order_PE))[:, None], order_PE]
    last_P, next_P = falling_PE[:, top_k - 1], falling_PE[:, top_k]
    # Among the others, the K-th highest logit is number K + 1 for one of the top K experts, and number K otherwise.
    is_among_PE = routing.logits_PE > next_P[:, None]
    threshold_PE = last_P[:, None] + is_among_PE * (next_P - last_P)[:, None]
    chance_PE = normal_cdf((routing.clean_logits_PE - threshold_PE) / routing.noise_scale_PE)
    return squared_variation(token_mean(chance_PE, real_P))  # a factor of all loads changes nothing


def heterogeneous_balance(
    load_E: Array, probability_PE: Array, num_experts: int, ffn_share: float, real_P: Array | None = None
) -> Array:
    """Heterogeneous load-balancing loss of E feed-forward experts and Z zero-computation experts.

    `(E + Z / tau) * sum_i eta_i f_i p_i`, where eta_i is 1 for a feed-forward expert and tau (`ffn_share`) for one of
    zero computation. The minimum is 1, where a feed-forward expert gets tau times the load of the other kind. All
    tokens on one feed-forward expert give E + Z / tau, on one of the others tau E + Z. tau = 1 is `switch_balance`.

    Source: Jin et al. 2024 (MoE++), arXiv 2410.07348, eq. 7.
    Differs: in the paper f sums to K, and the sum has no factor, so the balanced value is K tau / (tau E + Z).
    """
    is_zero_E = np.arange(load_E.shape[-1]) >= num_experts
    eta_E = np.where(is_zero_E, ffn_share, 1.0)
    share_E = load_E / np.sum(load_E)
    return np.sum(1 / eta_E) * np.sum(eta_E * share_E * token_mean(probability_PE, real_P))


def router_z(routing: Routing, real_P: Array | None = None) -> Array:
    """Router z-loss, `mean over tokens of (log sum_e exp(logit_e))^2`.

    Source: Zoph et al. 2022 (ST-MoE), arXiv 2202.08906, eq. 5.
    """
    return token_mean(log_sum_exp(routing.logits_PE) ** 2, real_P)


def pooled_balance(layer_logits: Sequence[Array], top_k: int, real_P: Array | None = None) -> Array:
    """Load-balancing loss over the tokens of all MoE layers together, `E * sum_e f_e p_e`. K when balanced.

    f_e is the fraction of rows with e among their K highest logits, so it sums to K; p_e is the mean softmax. Logits of
    any router are treated as those of a softmax top-k router.

    Trap: layers that have collapsed onto different experts look balanced.

    Args:
        layer_logits: router logits [P, E] of each layer.
        top_k: K.
        real_P: bool, the tokens to average over, without padding; None: all. The same in the losses above.

    Source: transformers 5.23, `load_balancing_loss_func` of its Mixtral model.
    """
    logits_PE = np.concatenate(layer_logits)
    real_P = None if real_P is None else np.tile(real_P, len(layer_logits))
    frequency_E = token_mean(highest_logits(logits_PE, top_k), real_P)
    probability_PE = np.exp(logits_PE - log_sum_exp(logits_PE)[:, None])
    return logits_PE.shape[-1] * np.sum(frequency_E * token_mean(probability_PE, real_P))


def auxiliary_loss(
    spec: AuxiliaryLossSpec,
    moe: MoESpec,
    routing: Routing,
    shape: tuple[int, int],
    *,
    load_E: Array | None = None,
    documents: Documents | None = None,
) -> Array:
    """Compute the unweighted value of one auxiliary loss of one MoE layer.

    Args:
        spec, moe: the loss, and the MoE layer.
        routing, shape: the routing of P = B * T tokens, and (B, T).
        load_E: int, for `global_balance`: tokens per expert in the whole step; None: in this micro-batch.
        documents: those of packed sequences.
    """
    real_P = None if documents is None else documents.real_P
    probability_PE, own_E = probabilities(moe.router, routing), expert_counts(routing)
    match spec:
        case SwitchBalanceLossSpec() | ExpertBalanceLossSpec():
            return switch_balance(own_E, probability_PE, real_P)
        case GlobalBalanceLossSpec():
            return switch_balance(own_E if load_E is None else load_E, probability_PE, real_P)
        case DeviceBalanceLossSpec():
            return device_balance(own_E, probability_PE, spec.num_devices, real_P)
        case CommunicationBalanceLossSpec():
            return communication_balance(routing, probability_PE, spec.num_devices, spec.max_devices, real_P)
        case SequenceBalanceLossSpec():
            return sequence_balance(routing.logits_PE, probability_PE, moe.router.top_k, shape, documents)
        case ImportanceLossSpec():
            return importance(routing)
        case LoadLossSpec():
            return load(routing, moe.router.top_k, real_P)
        case HeterogeneousBalanceLossSpec():
            ffn_share = 1.0 if moe.zero_computation is None else moe.zero_computation.ffn_share
            return heterogeneous_balance(own_E, probability_PE, moe.num_experts, ffn_share, real_P)
        case RouterZLossSpec():
            return router_z(routing, real_P)
        case PooledBalanceLossSpec():
            return pooled_balance([routing.logits_PE], moe.router.top_k, real_P)


def loss_terms(
    spec: ModelSpec,
    logits_BTV: Array,
    target_BT: Array,
    routings: Sequence[Routing],
    *,
    index_losses: Sequence[tuple[int, float, Array]] = (),
    global_load: Sequence[Array] | None = None,
    num_targets: float | None = None,
    documents: Documents | None = None,
) -> dict[str, Array]:
    """Return every loss term by name.

    `loss` is the training objective: `cross_entropy` (mean over tokens whose target is not IGNORED, in nats) plus every
    `<name>_weighted`. Auxiliary losses include every token but padding. For each of them, `layers.<i>.<name>` is its
    value in layer i, `<name>` the mean over the layers that have it, and `<name>_weighted` the sum over layers of
    coefficient times value. `pooled_balance`, however, is one value over all layers that have it, times their common
    coefficient.

    Args:
        spec: the model.
        logits_BTV, target_BT: of the next tokens, and these; IGNORED where there is none to predict.
        routings: one per MoE layer.
        index_losses: layer, coefficient and value of the loss of each sparse-attention indexer, reported as `index`.
        global_load: int [E] per MoE layer, tokens per expert in the whole step, for `global_balance`.
        num_targets, documents: as in `cross_entropy`; those of packed sequences.
    """
    terms = {"cross_entropy": cross_entropy(logits_BTV, target_BT, num_targets)}
    found: dict[str, list[tuple[int, float, Array]]] = {}
    pooled: list[Array] = []
    for order, ((index, moe), routing) in enumerate(zip(spec.moes, routings, strict=True)):
        load_E = None if global_load is None else global_load[order]
        for loss in moe.losses:
            value = auxiliary_loss(loss, moe, routing, target_BT.shape, load_E=load_E, documents=documents)
            found.setdefault(loss.kind, []).append((index, loss.coefficient, value))
            if isinstance(loss, PooledBalanceLossSpec):
                pooled += [routing.logits_PE] * loss.times
                pooled_top_k = moe.router.top_k
    if index_losses:
        found["index"] = list(index_losses)
    total = terms["cross_entropy"]
    for name, rows in found.items():
        value = sum(value for _, _, value in rows) / len(rows)
        weighted = sum(coefficient * value for _, coefficient, value in rows)
        if name == "pooled_balance":
            value = pooled_balance(pooled, pooled_top_k, None if documents is None else documents.real_P)
            weighted = rows[0][1] * value
        terms |= {name: value, f"{name}_weighted": weighted}
        terms |= {f"layers.{index}.{name}": value for index, _, value in rows}
        total = total + weighted
    return {"loss": total, **terms}


def loss_and_gradients(
    spec: ModelSpec,
    parameters: Parameters,
    tokens_BT: Array,
    target_BT: Array,
    forced: Sequence[Array] | None = None,
    *,
    key: Array | None = None,
    global_load: Sequence[Array] | None = None,
    num_targets: float | None = None,
    trained: Collection[str] | None = None,
    document_BT: Array | None = None,
) -> tuple[dict[str, float], dict[str, Array]]:
    """Return every loss term, and the gradient of `loss` for every trained parameter, by canonical name.

    `forced`, `key` and `document_BT` as in `forward`, `global_load` and `num_targets` as in `loss_terms`. `trained`:
    names of the trained parameters (`core.parameters.trained`); None: all.
    """
    from autograd import value_and_grad

    seen: dict[str, float] = {}
    trained = trained_names(spec, ("all",)) if trained is None else trained
    state = {name: value for name, value in parameters.items() if name not in trained}
    of_step: dict[str, Any] = {"global_load": global_load, "num_targets": num_targets}
    of_step["documents"] = packed_documents(document_BT)

    def total(values: dict[str, Array]) -> Array:
        result = forward(spec, {**state, **values}, tokens_BT, forced=forced, key=key, document_BT=document_BT)
        terms = loss_terms(
            spec, result.logits_BTV, target_BT, result.routings, index_losses=result.index_losses, **of_step
        )
        seen.update({name: float(getval(term)) for name, term in terms.items()})
        return terms["loss"]

    _, gradients = value_and_grad(total)({name: value for name, value in parameters.items() if name in trained})
    return seen, gradients
