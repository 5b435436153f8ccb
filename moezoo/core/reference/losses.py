"""Cross-entropy, and the auxiliary losses that are made from a Routing. Each is computed per layer."""

from collections.abc import Sequence

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters
from moezoo.core.reference.routing import Routing
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import AuxiliaryLossSpec, ModelSpec, RouterZLossSpec, SwitchBalanceLossSpec


def log_sum_exp(x: Array) -> Array:
    """`log sum exp` over the last axis, stable: [..., E] -> [...]."""
    highest = np.max(x, axis=-1, keepdims=True)
    return highest[..., 0] + np.log(np.sum(np.exp(x - highest), axis=-1))


def token_losses(logits_BTV: Array, target_BT: Array) -> Array:
    """Negative log-probability of each target, in nats: [B, T]."""
    batch, length = target_BT.shape
    chosen = logits_BTV[np.arange(batch)[:, None], np.arange(length)[None, :], target_BT]
    return log_sum_exp(logits_BTV) - chosen


def expert_counts(expert_PK: Array, num_experts: int) -> Array:
    """Tokens routed to each expert, before any is dropped: [E], sums to P * K."""
    return np.array([np.sum(expert_PK == expert) for expert in range(num_experts)])


def switch_balance(routing: Routing) -> Array:
    """`E * sum_e f_e p_e`: f_e the share of routed copies that go to expert e, p_e its mean score. 1 when balanced.

    The gradient flows through p only. K experts that take all tokens with scores 1/K give E / K.

    Source: Fedus et al. 2021, arXiv 2101.03961, eq. 4-6.
    Differs: with top-k, f is the share of the P * K copies (sums to 1), so that balanced is 1 for every K; Hugging Face
    lets f sum to K.
    """
    num_experts = routing.score_PE.shape[-1]
    share_E = expert_counts(routing.expert_PK, num_experts) / routing.expert_PK.size
    return num_experts * np.sum(share_E * np.mean(routing.score_PE, axis=0))


def router_z(routing: Routing) -> Array:
    """`mean over tokens of (log sum_e exp(logit_e))^2`. Source: Zoph et al. 2022, arXiv 2202.08906, eq. 5."""
    return np.mean(log_sum_exp(routing.logits_PE) ** 2)


def auxiliary_loss(spec: AuxiliaryLossSpec, routing: Routing) -> Array:
    """The unweighted value of one auxiliary loss of one layer."""
    match spec:
        case SwitchBalanceLossSpec():
            return switch_balance(routing)
        case RouterZLossSpec():
            return router_z(routing)


def loss_terms(
    spec: ModelSpec,
    logits_BTV: Array,
    target_BT: Array,
    routings: Sequence[Routing],
    *,
    index_losses=(),
    global_load=None,
) -> dict[str, Array]:
    """Every loss term by name.

    `loss` is what training minimizes: `cross_entropy` (mean over tokens, nats) plus every `<name>_weighted`. For an
    auxiliary loss `<name>` is the mean over the layers that have it, unweighted, and `<name>_weighted` the sum over
    layers of coefficient times value.
    """
    terms = {"cross_entropy": np.mean(token_losses(logits_BTV, target_BT))}
    values: dict[str, list[Array]] = {}
    weighted: dict[str, Array] = {}
    moe_specs = [layer.moe for layer in spec.all_layers if layer.moe is not None]
    for moe_spec, routing in zip(moe_specs, routings, strict=True):
        for loss in moe_spec.losses:
            value = auxiliary_loss(loss, routing)
            values.setdefault(loss.kind, []).append(value)
            weighted[loss.kind] = weighted.get(loss.kind, 0.0) + loss.coefficient * value
    total = terms["cross_entropy"]
    for name, layer_values in values.items():
        terms[name] = sum(layer_values) / len(layer_values)
        terms[f"{name}_weighted"] = weighted[name]
        total = total + weighted[name]
    return {"loss": total, **terms}


def loss_and_gradients(
    spec: ModelSpec,
    parameters: Parameters,
    tokens_BT: Array,
    target_BT: Array,
    forced: Sequence[Array] | None = None,
    key: Array | None = None,
    global_load: Sequence[Array] | None = None,
) -> tuple[dict[str, float], dict[str, Array]]:
    """Every loss term, and the gradient of `loss` by canonical parameter name."""
    from autograd import value_and_grad
    from autograd.tracer import getval

    seen: dict[str, float] = {}

    def total(values: dict[str, Array]) -> Array:
        logits_BTV, routings, _ = forward(spec, values, tokens_BT, forced=forced, key=key)
        terms = loss_terms(spec, logits_BTV, target_BT, routings)
        seen.update({name: float(getval(term)) for name, term in terms.items()})
        return terms["loss"]

    _, gradients = value_and_grad(total)(dict(parameters))
    return seen, gradients
