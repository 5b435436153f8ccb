"""Predictability: how many of a token's experts in a layer can be guessed before that layer is computed.

Formulas and sources: writings/measures.md.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moezoo.core.analysis.chosen import BLOCK, is_chosen, is_routed, most_experts, share, spans
from moezoo.core.progress import Progress
from moezoo.core.traces.trace import RoutingTrace


@dataclass(frozen=True)
class LayerPredictability:
    """Shares of a layer's chosen experts that a guess of equally many experts has, on the held-out half of the blocks.

    Fields:
        layer: index in the model of the layer that is guessed.
        from_previous: guessed from the experts of the MoE layer before it; None for the first.
        from_token_before: the experts of the token before it, of the same document, in the same layer.
        most_loaded: always the most loaded experts.
    """

    layer: int
    from_previous: float | None
    from_token_before: float
    most_loaded: float


def measure_predictability(trace: RoutingTrace, on_progress: Progress | None = None) -> tuple[LayerPredictability, ...]:
    """Return the predictability of each MoE layer's experts.

    Blocks of BLOCK tokens (fewer in a short trace) alternate: counts come from the even ones, and are tested on the odd
    ones. A guess from the previous layer's experts S are the experts f with the largest `sum over e in S of
    N(e and f) / N(e)`, as many as the token has.
    """
    num_layers, num_experts = trace.num_layers, most_experts(trace)
    block = max(1, min(BLOCK, trace.num_tokens // 2))
    together = np.zeros((num_layers - 1, num_experts, num_experts))
    tokens_LE = np.zeros((num_layers, num_experts))
    for first, last in spans(trace, "predictability, counts", on_progress):
        chosen_NLE = is_chosen(trace, first, last)[np.arange(first, last) // block % 2 == 0].astype(np.float32)
        tokens_LE += chosen_NLE.sum(axis=0)
        for place in range(num_layers - 1):
            together[place] += chosen_NLE[:, place].T @ chosen_NLE[:, place + 1]
    rate = share(together, tokens_LE[:-1, :, None]).astype(np.float32)
    hits, total = np.zeros((3, num_layers)), np.zeros((2, num_layers))
    for first, last in spans(trace, "predictability, test", on_progress):
        odd = np.arange(first, last) // block % 2 == 1
        chosen_NLE = is_chosen(trace, first, last)
        before_NLE, known_NL = _token_before(trace, chosen_NLE, first, last)
        number_NL = chosen_NLE.sum(axis=-1)
        total += np.stack([number_NL[odd], np.where(known_NL, number_NL, 0)[odd]]).sum(axis=1)
        hits[1] += (chosen_NLE & before_NLE)[odd].sum(axis=(0, 2))
        chosen_NLE = chosen_NLE[odd]
        for place in range(num_layers):
            chosen_NE = chosen_NLE[:, place]
            hits[2, place] += _first_of(chosen_NE, np.argsort(-tokens_LE[place], kind="stable"))
            if place > 0:
                score_NE = chosen_NLE[:, place - 1].astype(np.float32) @ rate[place - 1]
                hits[0, place] += _first_of(chosen_NE, _by_score(score_NE, chosen_NE.sum(axis=-1)))
    previous, most = share(hits[0], total[0]), share(hits[2], total[0])
    repeated = share(hits[1], total[1])
    return tuple(
        LayerPredictability(layer, float(previous[i]) if i else None, float(repeated[i]), float(most[i]))
        for i, layer in enumerate(trace.info.layers)
    )


def _by_score(score_NE: NDArray[np.float32], number_N: NDArray[np.int64]) -> NDArray[np.intp]:
    """Return the experts of each token by falling score; with an equal number of each, these first in any order."""
    number = int(number_N.max(initial=0))
    if 0 < number < score_NE.shape[1] and (number_N == number).all():
        return np.argpartition(-score_NE, number - 1, axis=-1)[:, :number]
    return np.argsort(-score_NE, axis=-1, kind="stable")


def _first_of(chosen_NE: NDArray[np.bool_], order: NDArray[np.intp]) -> int:
    """Return the number of chosen experts that are among as many first ones of an order, one for all or of each."""
    ranked = np.take_along_axis(chosen_NE, np.broadcast_to(order, (len(chosen_NE), order.shape[-1])), axis=-1)
    return int((ranked & (np.arange(order.shape[-1]) < chosen_NE.sum(axis=-1, keepdims=True))).sum())


def _token_before(
    trace: RoutingTrace, chosen_NLE: NDArray[np.bool_], first: int, last: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the experts of the token before each, and whether there is one of the same document with known routing."""
    start = is_chosen(trace, first - 1, first) if first else np.zeros_like(chosen_NLE[:1])
    before_NLE = np.concatenate([start, chosen_NLE[:-1]])
    if trace.has("document"):
        document = trace.column("document", max(0, first - 1), last)
        borders = np.flatnonzero(document[1:] != document[:-1]) + (1 if first == 0 else 0)
        before_NLE[borders] = False
    return before_NLE, is_routed(before_NLE)
