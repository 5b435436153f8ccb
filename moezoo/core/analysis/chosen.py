"""The chosen experts of a trace as 0 and 1, a part of its tokens at a time, so that memory does not grow with the text.

Dimensions: N tokens, L MoE layers, E experts (the most of any layer), K experts per token.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

from moezoo.core.progress import Progress
from moezoo.core.traces.trace import ColumnReader, RoutingTrace

BLOCK = 256
"""Every part but the last has a multiple of this number of tokens."""

_PART_VALUES = 1 << 23


def most_experts(trace: RoutingTrace) -> int:
    """Return E, the number of experts of the layer that has the most."""
    return max(trace.info.num_experts)


def spans(trace: RoutingTrace, what: str = "", on_progress: Progress | None = None) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of consecutive parts of the tokens, few enough for an array [N, L, E].

    `on_progress` is called with `what` and the number of tokens done.
    """
    size = max(1, _PART_VALUES // (trace.num_layers * most_experts(trace)) // BLOCK) * BLOCK
    for first in range(0, trace.num_tokens, size):
        if on_progress is not None:
            on_progress(what, first, trace.num_tokens)
        yield first, min(first + size, trace.num_tokens)


def is_chosen(trace: RoutingTrace, first: int, last: int) -> NDArray[np.bool_]:
    """Return for the tokens first, ..., last - 1 whether each expert was chosen: [N, L, E]."""
    expert_NLK = trace.column("expert", first, last)
    num_tokens, num_layers, _ = expert_NLK.shape
    chosen = np.zeros((num_tokens * num_layers, most_experts(trace) + 1), bool)
    # an unused slot, -1, has the first column, which is cut off
    start = np.arange(len(chosen)).reshape(num_tokens, num_layers, 1) * chosen.shape[1]
    chosen.reshape(-1)[start + expert_NLK + 1] = True
    return chosen[:, 1:].reshape(num_tokens, num_layers, -1)


def is_routed(chosen_NLE: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return whether the routing of a token in a layer is known: [N, L]. Else it has no expert."""
    return np.asarray(chosen_NLE.any(axis=-1))


def share(part: npt.ArrayLike, whole: npt.ArrayLike) -> NDArray[np.float64]:
    """Return `part / whole`, 0 where the whole is 0."""
    part_f, whole_f = np.broadcast_arrays(np.asarray(part, float), np.asarray(whole, float))
    found: NDArray[np.float64] = np.divide(part_f, whole_f, out=np.zeros(part_f.shape), where=whole_f != 0)
    return found


def first_tokens(trace: RoutingTrace, number: int | None) -> RoutingTrace:
    """Return a trace of the first `number` tokens; None: all."""
    if number is None or number >= trace.num_tokens:
        return trace
    return replace(trace, source=_FirstRows(trace.source, number))


@dataclass(frozen=True)
class _FirstRows:
    """The first rows of the columns of a trace."""

    source: ColumnReader
    number: int

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: (self.number, *shape[1:]) for name, shape in self.source.shapes.items()}

    def read(self, name: str, first: int, last: int) -> NDArray[Any]:
        return self.source.read(name, first, min(last, self.number))
