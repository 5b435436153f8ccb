"""The router: which experts a token goes to, and with which weight."""

from typing import NamedTuple

import autograd.numpy as np
from autograd.tracer import getval

from moezoo.core.reference import Array, Parameters
from moezoo.core.spec import RouterSpec


class Routing(NamedTuple):
    """What every router returns, whatever its kind; statistics and auxiliary losses are made from it.

    Fields:
        expert_PK: int, the chosen experts of each token, by descending selection value, ties to the lower id.
        valid_PK: bool, False for a slot that the router left unused; its weight is 0 and its expert id is valid.
        weight_PK: combine weights: what multiplies each chosen expert's output.
        score_PE: scores of all experts (probabilities for softmax).
        logits_PE: before the score function, float32; with the noise, if there was any.
        selection_PE: what the choice was made by. No gradient.
        clean_logits_PE, noise_scale_PE: logits before the noise, and its standard deviation; None without noise.
        cutoff_E: lowest score that each expert took (expert choice in training), else None.
        margin_P: only here: how far the nearest decision was from falling otherwise, as a share of the value.
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
    margin_P: Array


def route(
    spec: RouterSpec,
    parameters: Parameters,
    x_PD: Array,
    *,
    token_P: Array | None = None,
    previous_PE: Array | None = None,
    forced_PK: Array | None = None,
    key: Array | None = None,
    inference: bool = False,
) -> Routing:
    """Score all experts, choose K, weight them.

    `logits = x w_router`, `score = softmax(logits)`, experts = the K highest scores, `weight = score[expert]`, divided
    by `sum + renormalize_epsilon` of the K if `renormalize: sum`.

    Args:
        spec: the router.
        parameters: the router's.
        x_PD: tokens.
        forced_PK: int; take these experts instead of choosing (weights are still this router's own). With it, two
            realizations can be compared where near ties would let them choose differently.

    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 3 and 5 (top-k gating); softmax over all experts, then top-k with
    renormalization: Jiang et al. 2024, arXiv 2401.04088.
    """
    logits_PE = np.einsum("PD,DE->PE", x_PD, parameters["w_router"])
    unnormalized = np.exp(logits_PE - np.max(logits_PE, axis=-1, keepdims=True))
    score_PE = unnormalized / np.sum(unnormalized, axis=-1, keepdims=True)
    # Softmax keeps the order of the logits, and they do not underflow to ties.
    # Trap: a stable sort of the negated values is the tie rule; argpartition has none.
    expert_PK = np.argsort(-logits_PE, axis=-1, kind="stable")[:, : spec.top_k] if forced_PK is None else forced_PK
    weight_PK = score_PE[np.arange(x_PD.shape[0])[:, None], expert_PK]
    if spec.renormalize == "sum":
        weight_PK = weight_PK / (np.sum(weight_PK, axis=-1, keepdims=True) + spec.renormalize_epsilon)
    falling_PE = -np.sort(-getval(logits_PE), axis=-1)
    rest_P = falling_PE[:, spec.top_k] if spec.top_k < logits_PE.shape[1] else -np.inf
    margin_P = 1 - np.exp(rest_P - falling_PE[:, spec.top_k - 1])
    valid_PK = np.ones(expert_PK.shape, bool)
    return Routing(expert_PK, valid_PK, weight_PK, score_PE, logits_PE, logits_PE, None, None, None, margin_P)
