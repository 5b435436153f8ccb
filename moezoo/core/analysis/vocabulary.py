"""Vocabulary specialization: how far the first expert of a token is decided by its id, or by that of the next token.

Formulas and sources: writings/measures.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moezoo.core.analysis.chosen import most_experts, share, spans
from moezoo.core.progress import Progress
from moezoo.core.traces.trace import RoutingTrace

FEWEST = 10
"""Token ids that occur less often are left out, as in OLMoE's analysis."""

Of = Literal["input", "next"]

_MAX_COUNTS = 1 << 26  # [ids, L, E], 4 bytes each
_SEED = 0


@dataclass(frozen=True)
class LayerVocabulary:
    """Vocabulary specialization in an MoE layer.

    Fields:
        layer: index in the model.
        expert: [ids], the expert that is most often the first one of each token id.
        share: [ids], share of the id's tokens whose first expert it is (OLMoE's specialization at k = 1).
        mean: mean share over the ids.
        chance: the same if the first experts were drawn by their load, whatever the id.
    """

    layer: int
    expert: NDArray[np.int64]
    share: NDArray[np.float64]
    mean: float
    chance: float


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary specialization of a trace.

    Fields:
        of: `input`: by the id of the routed token; `next`: by the id of the token after it.
        token: [ids], the token ids, the most frequent first.
        occurrences: [ids], routed tokens of each.
        left_out: ids that occur FEWEST times or more, but were left out to bound memory: the least frequent.
        layers: specialization in each MoE layer.
    """

    of: Of
    token: NDArray[np.int64]
    occurrences: NDArray[np.int64]
    left_out: int
    layers: tuple[LayerVocabulary, ...]


def measure_vocabulary(trace: RoutingTrace, of: Of = "input", on_progress: Progress | None = None) -> Vocabulary:
    """Return the vocabulary specialization of a trace; without any id that occurs often enough, the layers are empty.

    Source: Muennighoff et al. 2024, arXiv 2409.02060, eq. 8 with k = 1.
    Differs: chance, which has no counterpart there.
    """
    trace.require("token", purpose="vocabulary specialization")
    frequent, places = _frequent(trace)
    num_layers, num_experts = trace.num_layers, most_experts(trace)
    kept = frequent[: max(1, _MAX_COUNTS // (num_layers * num_experts))]
    counts = np.zeros((len(kept), num_layers, num_experts), np.int32)
    place_of = {token: place for place, token in enumerate(kept.tolist())}
    lookup = np.full(places + 1, -1, np.int64)  # its last value is that of no token, -1
    lookup[list(place_of)] = list(place_of.values())
    for first, last in spans(trace, f"vocabulary, {of}", on_progress):
        expert_NL = trace.column("expert", first, last)[..., 0]
        place_N = lookup[_ids(trace, of, first, last)]
        row, layer = np.nonzero((place_N[:, None] >= 0) & (expert_NL >= 0))
        np.add.at(counts, (place_N[row], layer, expert_NL[row, layer]), 1)
    found = [] if not len(kept) else list(_by_layer(trace, counts))
    occurrences = counts.sum(axis=-1).max(axis=-1, initial=0)
    return Vocabulary(of, kept, occurrences, len(frequent) - len(kept), tuple(found))


def favorite_tokens(trace: RoutingTrace, vocabulary: Vocabulary, place: int, shown: int = 5) -> Mapping[int, list[str]]:
    """Return for each expert of an MoE layer the texts of the ids that it is the main first expert of.

    The ids with the highest share come first, `shown` of them, with their share in percent. A space is shown as an open
    box.
    """
    layer = vocabulary.layers[place]
    found: dict[int, list[str]] = {expert: [] for expert in range(trace.info.num_experts[place])}
    for index in np.argsort(-layer.share, kind="stable"):
        tokens = found[int(layer.expert[index])]
        if len(tokens) < shown:
            text = repr(trace.text(int(vocabulary.token[index])))[1:-1].replace(" ", "\N{OPEN BOX}")
            tokens.append(f"{text} {100 * layer.share[index]:.0f}")
    return found


def _frequent(trace: RoutingTrace) -> tuple[NDArray[np.int64], int]:
    """Return the ids that occur FEWEST times or more, the most frequent first, and a number above every id."""
    counts = np.zeros(0, np.int64)
    for first, last in spans(trace):
        part = np.bincount(trace.column("token", first, last))
        counts = np.pad(counts, (0, max(0, len(part) - len(counts))))
        counts[: len(part)] += part
    order = np.argsort(-counts, kind="stable")
    return order[counts[order] >= FEWEST], len(counts)


def _ids(trace: RoutingTrace, of: Of, first: int, last: int) -> NDArray[np.int64]:
    """Return the token id of each row, or that of the row after it; -1 at the end of a document.

    Trap: a text that was cut into windows goes on in the next row, so the border of a window is no end.
    """
    if of == "input":
        return trace.column("token", first, last).astype(np.int64)
    ids = np.full(last - first, -1, np.int64)
    after = trace.column("token", first + 1, last + 1)
    ids[: len(after)] = after
    if trace.has("document"):
        document = trace.column("document", first, last + 1)
        ends = np.flatnonzero(document[1:] != document[:-1])
        ids[ends] = -1
    return ids


def _by_layer(trace: RoutingTrace, counts: NDArray[np.int32]) -> list[LayerVocabulary]:
    generator = np.random.default_rng(_SEED)
    found = []
    for place, (layer, number) in enumerate(zip(trace.info.layers, trace.info.num_experts, strict=True)):
        own = counts[:, place, :number]
        total = own.sum(axis=-1)
        largest = share(own.max(axis=-1), total)
        drawn = generator.multinomial(total, share(own.sum(axis=0), own.sum()))
        found.append(
            LayerVocabulary(
                layer=layer,
                expert=own.argmax(axis=-1),
                share=largest,
                mean=float(largest.mean()),
                chance=float(share(drawn.max(axis=-1), total).mean()),
            )
        )
    return found
