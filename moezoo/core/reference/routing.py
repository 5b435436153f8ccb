"""The router: which experts a token goes to, and with which weight."""

from typing import NamedTuple

import autograd.numpy as np

from moezoo.core.reference import Array
from moezoo.core.spec import RouterSpec


class Routing(NamedTuple):
    """What every router returns, whatever its kind; statistics and auxiliary losses are made from it.

    Fields:
        expert_PK: int, the chosen experts of each token, by descending score, ties to the lower id. No gradient.
        weight_PK: combine weights: what multiplies each chosen expert's output.
        score_PE: scores of all experts (probabilities for softmax).
        logits_PE: before the score function, float32.
    """

    expert_PK: Array
    weight_PK: Array
    score_PE: Array
    logits_PE: Array


def route(spec: RouterSpec, w_router_DE: Array, x_PD: Array, forced_PK: Array | None = None) -> Routing:
    """Score all experts, choose K, weight them.

    `logits = x w_router`, `score = softmax(logits)`, experts = the K highest scores, `weight = score[expert]`, divided
    by `sum + renormalize_epsilon` of the K if `renormalize: sum`.

    Args:
        spec: the router.
        w_router_DE: the router's matrix.
        x_PD: tokens.
        forced_PK: int; take these experts instead of choosing (weights are still this router's own). With it, two
            realizations can be compared where near ties would let them choose differently.

    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 3 and 5 (top-k gating); softmax over all experts, then top-k with
    renormalization: Jiang et al. 2024, arXiv 2401.04088.
    """
    logits_PE = np.einsum("PD,DE->PE", x_PD, w_router_DE)
    unnormalized = np.exp(logits_PE - np.max(logits_PE, axis=-1, keepdims=True))
    score_PE = unnormalized / np.sum(unnormalized, axis=-1, keepdims=True)
    # Softmax keeps the order of the logits, and they do not underflow to ties.
    # Trap: a stable sort of the negated values is the tie rule; argpartition has none.
    expert_PK = np.argsort(-logits_PE, axis=-1, kind="stable")[:, : spec.top_k] if forced_PK is None else forced_PK
    weight_PK = score_PE[np.arange(x_PD.shape[0])[:, None], expert_PK]
    if spec.renormalize == "sum":
        weight_PK = weight_PK / (np.sum(weight_PK, axis=-1, keepdims=True) + spec.renormalize_epsilon)
    return Routing(expert_PK, weight_PK, score_PE, logits_PE)
