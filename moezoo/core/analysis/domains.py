"""Domain specialization: which experts the tokens of each text choose, beside the level of chance.

Formulas and sources: writings/measures.md.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moezoo.core.analysis.chosen import BLOCK, is_chosen, is_routed, most_experts, share, spans
from moezoo.core.progress import Progress
from moezoo.core.traces.trace import RoutingTrace

_SHUFFLES = 16
_SEED = 0


@dataclass(frozen=True)
class LayerDomains:
    """Domain specialization in an MoE layer.

    Fields:
        layer: index in the model.
        names: the texts that have tokens.
        share: [domains, E], share of the domain's tokens that choose each expert (OLMoE's domain specialization).
        shift: [domains], total variation distance between the domain's load and that of all domains together,
            every domain weighing the same: 0 if the domain uses the experts like all others do.
        chance: [domains], mean shift if each block of BLOCK tokens had a domain by chance.
        chance_spread: [domains], standard deviation of the same.
    """

    layer: int
    names: tuple[str, ...]
    share: NDArray[np.float64]
    shift: NDArray[np.float64]
    chance: NDArray[np.float64]
    chance_spread: NDArray[np.float64]

    def strongest(self, domain: int) -> tuple[int, float, float]:
        """Return the expert that a domain prefers most: its id, share of this domain's tokens, and of the others'.

        The preferred one has the largest difference of the two.
        """
        others = np.delete(self.share, domain, axis=0).mean(axis=0)
        expert = int(np.argmax(self.share[domain] - others))
        return expert, float(self.share[domain, expert]), float(others[expert])


def measure_domains(trace: RoutingTrace, on_progress: Progress | None = None) -> tuple[LayerDomains, ...]:
    """Return the domain specialization of each MoE layer; none if fewer than two texts have tokens.

    Source: Muennighoff et al. 2024, arXiv 2409.02060, eq. 7.
    """
    sizes, generator = _domain_sizes(trace), np.random.default_rng(_SEED)
    present = np.flatnonzero(sizes)
    names = tuple(trace.info.domains[domain] for domain in present)
    if len(names) < 2:
        return ()
    chosen = np.zeros((len(names), trace.num_layers, most_experts(trace)))
    tokens = np.zeros(chosen.shape[:2])
    shuffled = np.zeros((_SHUFFLES, *chosen.shape))
    for first, last in spans(trace, "domains", on_progress):
        chosen_NLE = is_chosen(trace, first, last)
        own = present[:, None] == trace.column("domain", first, last)  # [domains, N]
        tokens += own.astype(float) @ is_routed(chosen_NLE)
        block = np.arange(last - first) // BLOCK
        groups = np.concatenate([own, np.unique(block)[:, None] == block]).astype(np.float32)
        sums = np.tensordot(groups, chosen_NLE.astype(np.float32), 1)  # by domain, then by block
        chosen += sums[: len(names)]
        drawn = generator.choice(present, size=(_SHUFFLES, len(groups) - len(names)), p=sizes[present] / sizes.sum())
        shuffled += np.tensordot((present[:, None] == drawn[:, None, :]).astype(np.float32), sums[len(names) :], 1)
    shift, chance = _shift(chosen), _shift(shuffled)
    return tuple(
        LayerDomains(
            layer=layer,
            names=names,
            share=share(chosen[:, place, :count], tokens[:, place, None]),
            shift=shift[:, place],
            chance=chance[:, :, place].mean(axis=0),
            chance_spread=chance[:, :, place].std(axis=0),
        )
        for place, (layer, count) in enumerate(zip(trace.info.layers, trace.info.num_experts, strict=True))
    )


def _domain_sizes(trace: RoutingTrace) -> NDArray[np.int64]:
    """Return the number of tokens of each domain."""
    sizes = np.zeros(len(trace.info.domains), np.int64)
    for first, last in spans(trace):
        sizes += np.bincount(trace.column("domain", first, last), minlength=len(sizes))
    return sizes


def _shift(chosen: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the total variation distance of each domain's load from the mean of all: [..., domains, L]."""
    load = share(chosen, chosen.sum(axis=-1, keepdims=True))
    distance: NDArray[np.float64] = np.abs(load - load.mean(axis=-3, keepdims=True)).sum(axis=-1) / 2
    return distance
