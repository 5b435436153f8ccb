"""Whole documents packed into sequences by first fit, as a pure function of (seed, epoch).

    cut     documents -> pieces of at most T targets
    shuffle epoch -> the order of the pieces
    fit     each piece goes into the first sequence that has room for it
    permute the order of the sequences of an epoch

So a run resumes from its step alone, after packing the epochs before it once more, a few microseconds a document.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from moezoo.core.data import sample_order

Integers = npt.NDArray[np.int64]

_SHUFFLE, _ORDER = 3, 4  # domain separation of hashes, beside those of sample_order
_KEPT_EPOCHS = 4  # of packings; a step reads one, or two where an epoch ends


@dataclass(frozen=True)
class Pieces:
    """Documents, cut where they are longer than a sequence.

    A piece is the tokens [start, start + size] of a source: `size` inputs, of which each has the next token as target.
    A document of n tokens has n - 1 of these, so it is cut into pieces of T targets, and a last one with the rest. The
    last token of a piece is the first of the next one, where it is context alone: every token of a document but its
    first is a target once.

    Fields:
        start, size: int64 [n], in the order of the source; sizes are from 1 to T.
    """

    start: Integers
    size: Integers


def cut(start: Integers, length: Integers, most: int) -> Pieces:
    """Cut documents of `length` tokens into pieces of at most `most` targets; a document of one token has none."""
    targets = np.maximum(length - 1, 0)
    count = -(-targets // most)
    first = np.repeat(np.cumsum(count) - count, count)
    offset = (np.arange(count.sum()) - first) * most
    return Pieces(np.repeat(start, count) + offset, np.minimum(np.repeat(targets, count) - offset, most))


def first_fit(size: Integers, room: int) -> Integers:
    """Put pieces into sequences of `room` places, each into the first one that has room for it: the sequence of each.

    Sizes are from 1 to `room`. A tree of maxima finds the first sequence in as many steps as the logarithm of their
    number.

    Source: Johnson et al. 1974, SIAM J. Comput. 3(4): at most 1.7 times as many sequences as the best packing.
    """
    leaves = 1 << max(len(size) - 1, 0).bit_length()
    free = [room] * (2 * leaves)  # free[n]: most room of the sequences below node n; leaves are last
    found = np.empty(len(size), np.int64)
    for piece, needed in enumerate(size.tolist()):
        node = 1
        while node < leaves:
            node *= 2
            node += free[node] < needed
        found[piece] = node - leaves
        free[node] -= needed
        while node > 1:
            node //= 2
            most = max(free[2 * node], free[2 * node + 1])
            if free[node] == most:
                break
            free[node] = most
    return found


@dataclass(frozen=True)
class Packing:
    """Sequences of an epoch: sequence i has the pieces `piece[first[i] : first[i + 1]]`, in this order."""

    piece: Integers
    first: Integers

    def __len__(self) -> int:
        return len(self.first) - 1


def packed(pieces: Pieces, room: int, seed: int, source: int, epoch: int | None) -> Packing:
    """Pack the pieces of a source for an epoch; None: in their own order, for evaluation."""
    order = np.arange(len(pieces.size))
    if epoch is not None:
        order = order[_permutation(len(order), seed, source, epoch, _SHUFFLE)]
    sequence = first_fit(pieces.size[order], room)
    count = int(sequence.max()) + 1
    if epoch is not None:
        sequence = _permutation(count, seed, source, epoch, _ORDER)[sequence]
    sorted_order = np.argsort(sequence, kind="stable")
    first = np.searchsorted(sequence[sorted_order], np.arange(count + 1))
    return Packing(order[sorted_order], first)


def _permutation(size: int, seed: int, source: int, epoch: int, purpose: int) -> Integers:
    keys = np.full(size, sample_order.key(purpose, seed, source, epoch), np.uint64)
    return sample_order.permute(np.arange(size, dtype=np.uint64), size, keys).astype(np.int64)


class Epochs:
    """Packings of all epochs of a source. The number of sequences differs a little from epoch to epoch."""

    def __init__(self, pieces: Pieces, room: int, seed: int, source: int):
        self.pieces = pieces
        self._ends = [0]  # number of sequences of the epochs up to each
        self.epoch = lru_cache(_KEPT_EPOCHS)(lambda epoch: packed(pieces, room, seed, source, epoch))

    def find(self, index: int) -> tuple[int, int]:
        """Return the epoch of the source's sequence number `index`, and which of that epoch's it is."""
        while self._ends[-1] <= index:
            self._ends.append(self._ends[-1] + len(self.epoch(len(self._ends) - 1)))
        epoch = int(np.searchsorted(self._ends, index, side="right")) - 1
        return epoch, index - self._ends[epoch]
