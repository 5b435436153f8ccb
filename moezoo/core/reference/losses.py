"""Cross-entropy, and the auxiliary losses that are made from a Routing: per layer, but `pooled_balance`.

The balance losses have one form: `n * sum_i f_i p_i` over n things that shall be equally busy. `f` is the share of the
load that thing i has: a count, so without a gradient. `p` is its mean probability, and there the gradient flows: it
lowers the scores of what is overloaded. What each can see, and what not, is in writings/losses.md.
"""

import math
from collections.abc import Sequence

import autograd.numpy as np
from autograd.extend import defvjp, primitive

from moezoo.core.backend import IGNORED
from moezoo.core.parameters import parameter_table
from moezoo.core.reference import Array, Parameters
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

# --- cross-entropy ---------------------------------------------------------------------------------------------------


def log_sum_exp(x: Array) -> Array:
    """`log sum exp` over the last axis, stable: [..., E] -> [...]."""
    highest = np.max(x, axis=-1, keepdims=True)
    return highest[..., 0] + np.log(np.sum(np.exp(x - highest), axis=-1))


def token_losses(logits_BTV: Array, target_BT: Array) -> Array:
    """Negative log-probability of each target, in nats; 0 where the target is IGNORED: [B, T]."""
    batch, length = target_BT.shape
    chosen = logits_BTV[np.arange(batch)[:, None], np.arange(length)[None, :], target_BT]
    return np.where(target_BT == IGNORED, 0.0, log_sum_exp(logits_BTV) - chosen)


def cross_entropy(logits_BTV: Array, target_BT: Array) -> Array:
    """Mean of `token_losses` over the targets that count, of which there is at least one."""
    return np.sum(token_losses(logits_BTV, target_BT)) / np.sum(target_BT != IGNORED)


# --- what balance losses are made of ---------------------------------------------------------------------------------


def expert_counts(routing: Routing) -> Array:
    """Tokens that chose each expert, whether or not a capacity drops them later; unused slots count nowhere: [E]."""
    hot_PKE = routing.expert_PK[..., None] == np.arange(routing.score_PE.shape[-1])
    return np.sum(hot_PKE & routing.valid_PK[..., None], axis=(0, 1))


def probabilities(spec: RouterSpec, routing: Routing) -> Array:
    """Scores as probabilities, [P, E] with rows that sum to 1: divided by their sum where they are not a softmax.

    Without a score function (`score: none`) it is the softmax of the logits. Source: DeepSeek-AI 2024 (DeepSeek-V3),
    arXiv 2412.19437, eq. 19. Differs: Megatron-Core, too, adds 1e-20 to the sum, which the paper does not say.
    """
    match spec.score:
        case "softmax":
            return routing.score_PE
        case "none":
            return np.exp(routing.logits_PE - log_sum_exp(routing.logits_PE)[:, None])
        case "sigmoid" | "sqrt_softplus":
            return routing.score_PE / (np.sum(routing.score_PE, axis=-1, keepdims=True) + 1e-20)


def highest_logits(logits_PE: Array, top_k: int) -> Array:
    """Whether an expert has one of a token's K highest logits, ties to the lower id: bool [P, E]."""
    expert_PK = np.argsort(-logits_PE, axis=-1, kind="stable")[:, :top_k]
    return np.any(expert_PK[..., None] == np.arange(logits_PE.shape[-1]), axis=1)


def by_device(x: Array, num_devices: int) -> Array:
    """Sums over equal groups of consecutive experts: [..., E] -> [..., num_devices]."""
    return np.sum(np.reshape(x, (*x.shape[:-1], num_devices, -1)), axis=-1)


def squared_variation(x_E: Array) -> Array:
    """Squared coefficient of variation, `variance / mean^2`: 0 if all are equal, E / k - 1 if k are and the rest 0."""
    mean = np.mean(x_E)
    return np.mean((x_E - mean) ** 2) / mean**2


@primitive  # type: ignore[untyped-decorator]
def normal_cdf(x: Array) -> Array:
    """Phi, the distribution function of the normal distribution: `(1 + erf(x / sqrt 2)) / 2`."""
    return 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


defvjp(normal_cdf, lambda _, x: lambda g: g * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi))


# --- the auxiliary losses --------------------------------------------------------------------------------------------


def switch_balance(load_E: Array, probability_PE: Array) -> Array:
    """`E * sum_e f_e p_e`: f_e the share of routed copies that go to expert e, p_e its mean probability.

    1 when balanced; k experts that take all tokens with probabilities 1/k give E / k.

    Source: Fedus et al. 2021, arXiv 2101.03961, eq. 4-6; the same with top-k is `expert_balance`, Dai et al. 2024
    (DeepSeekMoE), arXiv 2401.06066, eq. 12-14; with the load of all micro-batches it is `global_balance`, Qiu et al.
    2025, arXiv 2501.11873.
    Differs: with top-k, f is the share of the P * K copies (sums to 1), so that balanced is 1 for every K; Hugging Face
    lets f sum to K.
    """
    share_E = load_E / np.sum(load_E)
    return load_E.shape[-1] * np.sum(share_E * np.mean(probability_PE, axis=0))


def device_balance(load_E: Array, probability_PE: Array, num_devices: int) -> Array:
    """The same between equal groups of consecutive experts; inside a group experts need not be balanced.

    1 when balanced; k of `num_devices` groups that take all give `num_devices / k`.

    Source: Dai et al. 2024 (DeepSeekMoE), arXiv 2401.06066, eq. 15-17.
    """
    return switch_balance(by_device(load_E, num_devices), by_device(probability_PE, num_devices))


def communication_balance(routing: Routing, probability_PE: Array, num_devices: int, max_devices: int) -> Array:
    """`sum_i f_i p_i`: f_i = num_devices / max_devices times the share of tokens sent to group i, p_i as above.

    A token counts once for a group however many experts it has there: once is how often it is sent. 1 when balanced and
    each token is sent to `max_devices` groups, 1 / max_devices when balanced and each is sent to one; tokens that all
    go to the same `max_devices` groups give `num_devices / max_devices`.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), arXiv 2405.04434, eq. 29-31. Differs: over the tokens of the batch, there
    of a sequence.
    """
    hot_PKE = routing.expert_PK[..., None] == np.arange(routing.score_PE.shape[-1])
    chosen_PE = np.any(hot_PKE & routing.valid_PK[..., None], axis=1)
    sent = np.mean(by_device(chosen_PE, num_devices) > 0, axis=0)
    return num_devices / max_devices * np.sum(sent * np.mean(by_device(probability_PE, num_devices), axis=0))


def sequence_balance(logits_PE: Array, probability_PE: Array, top_k: int, shape: tuple[int, int]) -> Array:
    """Mean over sequences of `E * sum_e f_e p_e`, both taken over the tokens of one sequence. 1 when balanced.

    f counts each token's K highest scores, as the paper writes it: without the selection bias and the groups that may
    have chosen otherwise. So the scores themselves are asked to balance, not what the bias has made of them.

    Args:
        logits_PE: the order of the scores is theirs, and they do not round to ties.
        shape: (B, T).

    Source: DeepSeek-AI 2024 (DeepSeek-V3), arXiv 2412.19437, eq. 17-20.
    """
    batch, length = shape
    num_experts = logits_PE.shape[-1]
    hot_BTE = np.reshape(highest_logits(logits_PE, top_k), (batch, length, num_experts))
    share_BE = np.sum(hot_BTE, axis=1) / (length * top_k)
    mean_BE = np.mean(np.reshape(probability_PE, (batch, length, num_experts)), axis=1)
    return num_experts * np.mean(np.sum(share_BE * mean_BE, axis=-1))


def importance(routing: Routing) -> Array:
    """Squared coefficient of variation of the experts' importance, the sum over tokens of their weights.

    0 when balanced; k experts that share all weight equally give E / k - 1. Source: Shazeer et al. 2017, arXiv
    1701.06538, eq. 6-7.
    """
    hot_PKE = routing.expert_PK[..., None] == np.arange(routing.score_PE.shape[-1])
    return squared_variation(np.sum(routing.weight_PK[..., None] * hot_PKE, axis=(0, 1)))


def load(routing: Routing, top_k: int) -> Array:
    """Squared coefficient of variation of the experts' expected load, which is smooth in the logits.

    `load_e = sum over tokens of Phi((clean_e - threshold_e) / noise_scale_e)`, the probability that e is chosen if its
    noise is drawn again; threshold_e is the K-th highest noisy logit of the others. Values as of `importance`.

    Without noise (evaluation, or a training step without a key) the probability is 0 or 1, the limit for small noise:
    the load is the count, and has no gradient.

    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 8-11.
    """
    if routing.clean_logits_PE is None or routing.noise_scale_PE is None:
        return squared_variation(expert_counts(routing))
    order_PE = np.argsort(-routing.logits_PE, axis=-1, kind="stable")
    falling_PE = routing.logits_PE[np.arange(len(order_PE))[:, None], order_PE]
    last_P, next_P = falling_PE[:, top_k - 1], falling_PE[:, top_k]
    # For one of the K experts the K-th highest of the others is the next after the K; for any other, the last of the K.
    is_among_PE = routing.logits_PE > next_P[:, None]
    threshold_PE = last_P[:, None] + is_among_PE * (next_P - last_P)[:, None]
    chance_PE = normal_cdf((routing.clean_logits_PE - threshold_PE) / routing.noise_scale_PE)
    return squared_variation(np.sum(chance_PE, axis=0))


def heterogeneous_balance(load_E: Array, probability_PE: Array, num_experts: int, ffn_share: float) -> Array:
    """`(E + Z / tau) * sum_i eta_i f_i p_i`: eta is 1 for the E experts with a feed-forward, tau for the Z others.

    Least, and 1, where an expert with a feed-forward gets tau times what a zero-computation expert gets. All tokens on
    one expert with a feed-forward give E + Z / tau, on one other tau E + Z. With tau = 1 it is `switch_balance`.

    Source: Jin et al. 2024 (MoE++), arXiv 2410.07348, eq. 7. Differs: there f sums to K, and there is no factor before
    the sum, so that balanced is K tau / (tau E + Z).
    """
    is_zero_E = np.arange(load_E.shape[-1]) >= num_experts
    eta_E = np.where(is_zero_E, ffn_share, 1.0)
    share_E = load_E / np.sum(load_E)
    return np.sum(1 / eta_E) * np.sum(eta_E * share_E * np.mean(probability_PE, axis=0))


def router_z(routing: Routing) -> Array:
    """`mean over tokens of (log sum_e exp(logit_e))^2`. Source: Zoph et al. 2022, arXiv 2202.08906, eq. 5."""
    return np.mean(log_sum_exp(routing.logits_PE) ** 2)


def pooled_balance(layer_logits: Sequence[Array], top_k: int) -> Array:
    """`E * sum_e f_e p_e` over the rows of all layers at once. K when balanced.

    f_e is the share of rows that have e among their K highest logits, so it sums to K; p_e the mean softmax. Whatever
    the router does, its logits are read as a softmax top-k router's. Trap: layers that are collapsed, each on experts
    of its own, look balanced.

    Args:
        layer_logits: [P, E] of each layer.

    Source: transformers 5.23, `load_balancing_loss_func` of its Mixtral model.
    """
    logits_PE = np.concatenate(layer_logits)
    frequency_E = np.mean(highest_logits(logits_PE, top_k), axis=0)
    probability_PE = np.exp(logits_PE - log_sum_exp(logits_PE)[:, None])
    return logits_PE.shape[-1] * np.sum(frequency_E * np.mean(probability_PE, axis=0))


def auxiliary_loss(
    spec: AuxiliaryLossSpec, moe: MoESpec, routing: Routing, shape: tuple[int, int], *, load_E: Array | None = None
) -> Array:
    """The unweighted value of one auxiliary loss of one layer.

    Args:
        spec: the loss.
        moe: the mixture of the layer.
        routing: of P = B * T tokens.
        shape: (B, T).
        load_E: int, for `global_balance`: tokens of each expert in the whole step; None: in this pass.
    """
    match spec:
        case SwitchBalanceLossSpec() | ExpertBalanceLossSpec():
            return switch_balance(expert_counts(routing), probabilities(moe.router, routing))
        case GlobalBalanceLossSpec():
            own_E = expert_counts(routing) if load_E is None else load_E
            return switch_balance(own_E, probabilities(moe.router, routing))
        case DeviceBalanceLossSpec():
            return device_balance(expert_counts(routing), probabilities(moe.router, routing), spec.num_devices)
        case CommunicationBalanceLossSpec():
            probability_PE = probabilities(moe.router, routing)
            return communication_balance(routing, probability_PE, spec.num_devices, spec.max_devices)
        case SequenceBalanceLossSpec():
            return sequence_balance(routing.logits_PE, probabilities(moe.router, routing), moe.router.top_k, shape)
        case ImportanceLossSpec():
            return importance(routing)
        case LoadLossSpec():
            return load(routing, moe.router.top_k)
        case HeterogeneousBalanceLossSpec():
            ffn_share = 1.0 if moe.zero_computation is None else moe.zero_computation.ffn_share
            return heterogeneous_balance(
                expert_counts(routing), probabilities(moe.router, routing), moe.num_experts, ffn_share
            )
        case RouterZLossSpec():
            return router_z(routing)
        case PooledBalanceLossSpec():
            return pooled_balance([routing.logits_PE], moe.router.top_k)


def loss_terms(
    spec: ModelSpec,
    logits_BTV: Array,
    target_BT: Array,
    routings: Sequence[Routing],
    *,
    index_losses: Sequence[tuple[int, float, Array]] = (),
    global_load: Sequence[Array] | None = None,
) -> dict[str, Array]:
    """Every loss term by name.

    `loss` is what training minimizes: `cross_entropy` (mean over tokens whose target counts, nats) plus every
    `<name>_weighted`. Auxiliary losses see every token. For one of them `layers.<i>.<name>` is its value in layer i,
    `<name>` the mean over the layers that have it, and `<name>_weighted` the sum over layers of coefficient times
    value. But `pooled_balance` is one value for the rows of all layers that name it, times their one coefficient.

    Args:
        spec: the model.
        logits_BTV: of the next token.
        target_BT: int, the next tokens; IGNORED where there is none to predict.
        routings: one for each MoE layer.
        index_losses: layer, coefficient and value of each sparse attention's indexer; they are reported as `index`.
        global_load: for each MoE layer int [E], tokens of each expert in the whole step, for `global_balance`.
    """
    terms = {"cross_entropy": cross_entropy(logits_BTV, target_BT)}
    found: dict[str, list[tuple[int, float, Array]]] = {}
    pooled: list[Array] = []
    for place, ((index, moe), routing) in enumerate(zip(spec.moes, routings, strict=True)):
        load_E = None if global_load is None else global_load[place]
        for loss in moe.losses:
            value = auxiliary_loss(loss, moe, routing, target_BT.shape, load_E=load_E)
            found.setdefault(loss.kind, []).append((index, loss.coefficient, value))
            if isinstance(loss, PooledBalanceLossSpec):
                pooled.append(routing.logits_PE)
                pooled_top_k = moe.router.top_k
    if index_losses:
        found["index"] = list(index_losses)
    total = terms["cross_entropy"]
    for name, rows in found.items():
        value = sum(value for _, _, value in rows) / len(rows)
        weighted = sum(coefficient * value for _, coefficient, value in rows)
        if name == "pooled_balance":
            value = pooled_balance(pooled, pooled_top_k)
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
) -> tuple[dict[str, float], dict[str, Array]]:
    """Every loss term, and the gradient of `loss` by canonical name of every trained parameter.

    `forced` and `key` as in `forward`, `global_load` as in `loss_terms`.
    """
    from autograd import value_and_grad
    from autograd.tracer import getval

    seen: dict[str, float] = {}
    trained = {row.name for row in parameter_table(spec) if row.trained}
    state = {name: value for name, value in parameters.items() if name not in trained}

    def total(values: dict[str, Array]) -> Array:
        logits_BTV, routings, index_losses = forward(spec, {**state, **values}, tokens_BT, forced=forced, key=key)
        terms = loss_terms(spec, logits_BTV, target_BT, routings, index_losses=index_losses, global_load=global_load)
        seen.update({name: float(getval(term)) for name, term in terms.items()})
        return terms["loss"]

    _, gradients = value_and_grad(total)({name: value for name, value in parameters.items() if name in trained})
    return seen, gradients
