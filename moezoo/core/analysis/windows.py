"""Distinct experts that a number of tokens need: a window of consecutive ones, or a batch of unrelated ones.

Formulas and sources: writings/measures.md.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moezoo.core.analysis.chosen import BLOCK, is_chosen, is_routed, most_experts, share, spans
from moezoo.core.progress import Progress
from moezoo.core.traces.trace import RoutingTrace

SIZES = tuple(2**power for power in range(BLOCK.bit_length()))
"""Numbers of tokens: 1, 2, 4, ..., BLOCK."""


@dataclass(frozen=True)
class DistinctExperts:
    """Mean number of distinct experts that `tokens` tokens need in a layer.

    Fields:
        tokens: W, number of tokens.
        consecutive: [L], of a document: one prefill or speculative step. Windows do not overlap.
        unrelated: [L], drawn from the whole trace independently: a decoding batch of W sequences.
        balanced: [L], if in addition all experts were equally likely.
    """

    tokens: int
    consecutive: NDArray[np.float64]
    unrelated: NDArray[np.float64]
    balanced: NDArray[np.float64]


def measure_windows(trace: RoutingTrace, on_progress: Progress | None = None) -> tuple[DistinctExperts, ...]:
    """Return the number of distinct experts for each of SIZES of which a document of the trace has a window.

    `unrelated = sum over e of 1 - (1 - p(e))^W`, p(e) being the share of tokens that choose e; `balanced` has
    `p = mean number of experts per token / E`.
    """
    num_layers = trace.num_layers
    used, windows = np.zeros((len(SIZES), num_layers)), np.zeros(len(SIZES))
    tokens_LE, routed_L = np.zeros((num_layers, most_experts(trace))), np.zeros(num_layers)
    for first, last in spans(trace, "windows", on_progress):
        chosen_NLE = is_chosen(trace, first, last)
        tokens_LE += chosen_NLE.sum(axis=0)
        routed_L += is_routed(chosen_NLE).sum(axis=0)
        document = trace.column("document", first, last) if trace.has("document") else np.zeros(last - first, int)
        start, end, whole = document, document, np.asarray(is_routed(chosen_NLE).any(axis=1))
        for index in range(len(SIZES)):
            inside = (start == end) & whole
            windows[index] += inside.sum()
            used[index] += chosen_NLE[inside].sum(axis=(0, 2))
            even = len(start) // 2 * 2
            chosen_NLE = chosen_NLE[0:even:2] | chosen_NLE[1:even:2]
            start, end, whole = start[0:even:2], end[1:even:2], whole[0:even:2] & whole[1:even:2]
    usage_LE = share(tokens_LE, routed_L[:, None])
    count_L = np.array(trace.info.num_experts, float)
    mean_L = usage_LE.sum(axis=-1) / count_L
    return tuple(
        DistinctExperts(
            tokens=size,
            consecutive=used[index] / windows[index],
            unrelated=(1 - (1 - usage_LE) ** size).sum(axis=-1),
            balanced=count_L * (1 - (1 - mean_L) ** size),
        )
        for index, size in enumerate(SIZES)
        if windows[index]
    )
