"""Co-activation: how often two experts are chosen for the same token, within a layer and across layers.

Formulas and sources: writings/measures.md.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moezoo.core.analysis.chosen import is_chosen, is_routed, most_experts, share, spans
from moezoo.core.progress import Progress
from moezoo.core.traces.trace import RoutingTrace

FEWEST = 10
"""Experts with fewer tokens are left out of the strongest pairs."""

MOST_ROWS = 4096
"""Pairs of all layers are counted up to this number of experts of all layers together."""


@dataclass(frozen=True)
class Pair:
    """Two experts: `share` of the tokens of expert `one` of layer `layer` choose expert `other` of layer `other_layer`.

    `lift`: that share over the share of all tokens that choose `other`; 1 if the two are independent.
    """

    layer: int
    one: int
    other_layer: int
    other: int
    share: float
    lift: float


@dataclass(frozen=True)
class Coactivation:
    """Co-activation in a trace: `N(i and j) / N(i)`, over all pairs of experts.

    Fields:
        layers: indices in the model.
        within: [L, E, E], of two experts of one layer: row i, column j. 1 on the diagonal.
        adjacent: [L - 1, E, E], row: an expert of a layer; column: one of the next MoE layer.
        usage: [L, E], share of all tokens that choose each expert.
        tokens: [L, E], tokens that choose each expert.
        across: [L, L], for two layers the mean over the experts of the first (row), weighted by their tokens, of the
            largest lift-free share: their strongest partner's. None above MOST_ROWS experts.
    """

    layers: tuple[int, ...]
    within: NDArray[np.float64]
    adjacent: NDArray[np.float64]
    usage: NDArray[np.float64]
    tokens: NDArray[np.int64]
    across: NDArray[np.float64] | None

    def strongest(self, place: int) -> Pair | None:
        """Return the pair of an MoE layer with the largest share; None if no two experts share a token."""
        rates = self.within[place] * (1 - np.eye(self.within.shape[-1]))
        return self._pair(rates, place, place)

    def strongest_next(self, place: int) -> Pair | None:
        """Return the pair of an MoE layer and the next one with the largest share."""
        return self._pair(self.adjacent[place], place, place + 1)

    def _pair(self, rates: NDArray[np.float64], place: int, other: int) -> Pair | None:
        rates = np.where(self.tokens[place][:, None] >= FEWEST, rates, 0.0)
        row, column = np.unravel_index(np.argmax(rates), rates.shape)
        rate, usage = float(rates[row, column]), float(self.usage[other, column])
        if rate == 0:
            return None
        return Pair(self.layers[place], int(row), self.layers[other], int(column), rate, rate / usage)


def measure_coactivation(trace: RoutingTrace, on_progress: Progress | None = None) -> Coactivation:
    """Return the co-activation of all pairs of experts of one layer and of neighboring layers, and a summary of all.

    Source: Muennighoff et al. 2024, arXiv 2409.02060, eq. 6.
    Differs: every pair of a token's experts counts. The script released with that paper counts only pairs that are
    neighbors in the order of the router's logits.
    """
    num_layers, num_experts = trace.num_layers, most_experts(trace)
    rows = num_layers * num_experts
    together = np.zeros((rows, rows) if rows <= MOST_ROWS else (num_layers, num_experts, 2 * num_experts), np.int64)
    routed_L = np.zeros(num_layers, np.int64)
    for first, last in spans(trace, "co-activation", on_progress):
        chosen_NLE = is_chosen(trace, first, last)
        routed_L += is_routed(chosen_NLE).sum(axis=0)
        if rows <= MOST_ROWS:
            flat = chosen_NLE.reshape(-1, rows).astype(np.float32)  # exact: a part has fewer than 2^24 tokens
            together += (flat.T @ flat).astype(np.int64)
        else:
            for place in range(num_layers):
                one = chosen_NLE[:, place].astype(np.float32)
                both = chosen_NLE[:, place : place + 2].reshape(len(one), -1).astype(np.float32)
                together[place, :, : both.shape[1]] += (one.T @ both).astype(np.int64)
    blocks = _blocks(together, num_layers, num_experts)
    tokens_LE = np.diagonal(blocks[0], axis1=1, axis2=2)
    across = None
    if rows <= MOST_ROWS:
        rate = share(together, tokens_LE.reshape(-1, 1)).reshape(num_layers, num_experts, num_layers, num_experts)
        across = _strongest_partner(rate, tokens_LE)
    return Coactivation(
        layers=trace.info.layers,
        within=share(blocks[0], tokens_LE[:, :, None]),
        adjacent=share(blocks[1], tokens_LE[:-1, :, None]),
        usage=share(tokens_LE, routed_L[:, None]),
        tokens=tokens_LE,
        across=across,
    )


def _blocks(
    together: NDArray[np.int64], num_layers: int, num_experts: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the counts of pairs within layers, [L, E, E], and of neighboring layers, [L - 1, E, E]."""
    if together.ndim == 3:
        return together[..., :num_experts], together[:-1, :, num_experts:]
    of_layers = together.reshape(num_layers, num_experts, num_layers, num_experts)
    place = np.arange(num_layers)
    return of_layers[place, :, place], of_layers[place[:-1], :, place[:-1] + 1]


def _strongest_partner(rate: NDArray[np.float64], tokens_LE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean share of the strongest partner, [L, L]; in the layer itself, of another expert."""
    place = np.arange(len(tokens_LE))
    own = rate[place, :, place]
    own[:, np.arange(own.shape[1]), np.arange(own.shape[1])] = 0.0
    rate = rate.copy()
    rate[place, :, place] = own
    best = rate.max(axis=-1)  # [L, E, L]
    weight = share(tokens_LE, tokens_LE.sum(axis=-1, keepdims=True))
    mean: NDArray[np.float64] = np.einsum("LEM,LE->LM", best, weight)
    return mean
