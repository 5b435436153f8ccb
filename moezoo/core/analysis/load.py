"""Load of the experts of each layer: balance, dead experts, gate mass, dropped assignments, narrow margins.

Formulas and sources: writings/measures.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moezoo.core.analysis.chosen import is_chosen, is_routed, most_experts, share, spans
from moezoo.core.progress import Progress
from moezoo.core.traces.trace import RoutingTrace

NARROW = 0.01
"""Margin below which a choice counts as a narrow one."""


@dataclass(frozen=True)
class LayerLoad:
    """Load of an MoE layer. A measure whose column the trace lacks is None.

    Fields:
        layer: index in the model.
        load: share of the assignments that go to each expert, before any is dropped; sums to 1.
        max_violation: MaxVio, `max(load) / mean(load) - 1`; 0 is balanced.
        entropy: entropy of the load over that of a balanced one, `-sum(load ln load) / ln E`; 1 is balanced.
        dead: experts without a token.
        experts_per_token: mean number of chosen experts.
        gate_mass: share of all combine weights that each expert gets; sums to 1.
        first_weight: mean share of a token's combine weights that its first expert gets.
        weight_sum: mean sum of a token's combine weights.
        dropped: share of assignments beyond an expert's capacity.
        margin: mean of the finite margins.
        narrow: share of tokens whose margin is below NARROW.
    """

    layer: int
    load: NDArray[np.float64]
    max_violation: float
    entropy: float
    dead: tuple[int, ...]
    experts_per_token: float
    gate_mass: NDArray[np.float64] | None
    first_weight: float | None
    weight_sum: float | None
    dropped: float | None
    margin: float | None
    narrow: float | None


def measure_load(trace: RoutingTrace, on_progress: Progress | None = None) -> tuple[LayerLoad, ...]:
    """Return the load of each MoE layer. Tokens whose routing is unknown do not count."""
    chosen_LE = np.zeros((trace.num_layers, most_experts(trace)), np.int64)
    mass_LE = np.zeros(chosen_LE.shape)
    names = ("routed", "first", "weighted", "weight", "dropped", "margin", "finite", "narrow")
    sum_L = {name: np.zeros(trace.num_layers) for name in names}
    for first, last in spans(trace, "load", on_progress):
        chosen_NLE = is_chosen(trace, first, last)
        known_NL = is_routed(chosen_NLE)
        chosen_LE += chosen_NLE.sum(axis=0)
        sum_L["routed"] += known_NL.sum(axis=0)
        if trace.has("weight"):
            weight_NLK = trace.column("weight", first, last).astype(float)
            total_NL = weight_NLK.sum(axis=-1)
            mass_LE += _summed_by_expert(trace.column("expert", first, last), weight_NLK, mass_LE.shape[1])
            sum_L["first"] += share(weight_NLK.max(axis=-1), total_NL).sum(axis=0)
            sum_L["weighted"] += (total_NL > 0).sum(axis=0)
            sum_L["weight"] += total_NL.sum(axis=0)
        if trace.has("dropped"):
            sum_L["dropped"] += trace.column("dropped", first, last).sum(axis=(0, 2), dtype=float)
        if trace.has("margin"):
            margin_NL = trace.column("margin", first, last).astype(float)
            finite_NL = np.isfinite(margin_NL) & known_NL
            sum_L["finite"] += finite_NL.sum(axis=0)
            sum_L["margin"] += np.where(finite_NL, margin_NL, 0.0).sum(axis=0)
            sum_L["narrow"] += ((margin_NL < NARROW) & known_NL).sum(axis=0)
    return tuple(_layer_load(trace, place, chosen_LE, mass_LE, sum_L) for place in range(trace.num_layers))


def _layer_load(
    trace: RoutingTrace,
    place: int,
    chosen_LE: NDArray[np.int64],
    mass_LE: NDArray[np.float64],
    sum_L: Mapping[str, NDArray[np.float64]],
) -> LayerLoad:
    """Return the measures of one layer from the sums over all tokens."""
    count = trace.info.num_experts[place]
    chosen_E, mass_E = chosen_LE[place, :count], mass_LE[place, :count]
    sums = {name: float(values[place]) for name, values in sum_L.items()}

    def mean(column: str, part: str, whole: float) -> float | None:
        if not trace.has(column):
            return None
        return sums[part] / whole if whole else 0.0

    return LayerLoad(
        layer=trace.info.layers[place],
        load=share(chosen_E, chosen_E.sum()),
        max_violation=max_violation(chosen_E),
        entropy=relative_entropy(chosen_E),
        dead=tuple(int(expert) for expert in np.flatnonzero(chosen_E == 0)),
        experts_per_token=float(share(chosen_E.sum(), sums["routed"])),
        gate_mass=share(mass_E, mass_E.sum()) if trace.has("weight") else None,
        first_weight=mean("weight", "first", sums["weighted"]),
        weight_sum=mean("weight", "weight", sums["routed"]),
        dropped=mean("dropped", "dropped", float(chosen_E.sum())),
        margin=mean("margin", "margin", sums["finite"]),
        narrow=mean("margin", "narrow", sums["routed"]),
    )


def max_violation(counts_E: NDArray[np.number]) -> float:
    """Return MaxVio of counts, `max / mean - 1`; 0 without any count.

    Source: Wang et al. 2024, arXiv 2408.15664.
    """
    mean = counts_E.mean()
    return float(counts_E.max() / mean - 1) if mean > 0 else 0.0


def relative_entropy(counts_E: NDArray[np.number]) -> float:
    """Return the entropy of counts as shares, over `ln E`: 1 if all are equal; 1 for a single expert."""
    if len(counts_E) == 1 or counts_E.sum() == 0:
        return 1.0
    present = counts_E[counts_E > 0] / counts_E.sum()
    return float(-(present * np.log(present)).sum() / np.log(len(counts_E)))


def _summed_by_expert(
    expert_NLK: NDArray[np.int16], weight_NLK: NDArray[np.float64], num_experts: int
) -> NDArray[np.float64]:
    """Return the sum of weights by layer and expert: [L, E]."""
    num_layers = expert_NLK.shape[1]
    place = np.arange(num_layers)[:, None] * (num_experts + 1) + np.where(expert_NLK < 0, num_experts, expert_NLK)
    sums: NDArray[np.float64] = np.bincount(
        place.ravel(), weight_NLK.ravel(), minlength=num_layers * (num_experts + 1)
    ).astype(float)
    return sums.reshape(num_layers, num_experts + 1)[:, :num_experts]
