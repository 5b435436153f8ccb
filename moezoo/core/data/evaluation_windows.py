"""The batches of an evaluation: consecutive windows of held-out data, with the targets that count."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moezoo.core.data.batch import Positions, row_positions
from moezoo.core.data.packed_split import PackedSequences
from moezoo.core.data.prepare import AnySplit
from moezoo.core.data.splits import Windows
from moezoo.core.data.token_shards import check_range
from moezoo.core.data.tokenizers import Tokenizer
from moezoo.core.tokens import IGNORED, Integers, targets_of, tokens_of


class EvaluationBatch(NamedTuple):
    """Windows of held-out data.

    Fields:
        windows: int32 [n, T + 1], as the data has them.
        inputs: int32 [n, T].
        targets: int32 [n, T]; IGNORED where the target is masked, or counted in the window before.
        documents: int32 [n, T], as in `Model.forward`; None if a window is one document.
        positions: of the inputs in the data. Their token may be another one there (`first_token`).
    """

    windows: Integers
    inputs: Integers
    targets: Integers
    documents: Integers | None
    positions: Positions


def evaluation_batches(
    split: AnySplit,
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    sequence_length: int,
    batch_size: int,
    max_windows: int | None = None,
    first_token: int | None = None,
) -> tuple[int, Iterator[EvaluationBatch]]:
    """Return the number of windows, and their batches, read one at a time; arguments are those of `evaluate`.

    Raises DataError: a token id outside the vocabulary, a source shorter than a window.
    """
    windows = split.windows(sequence_length, max_windows)
    size = _even_batch_size(len(windows), batch_size)

    def batches() -> Iterator[EvaluationBatch]:
        for start in range(0, len(windows), size):
            if isinstance(windows, PackedSequences):
                batch, targets, documents = windows.batch(start, start + size)
            else:
                marked, documents = windows[start : start + size], None
                batch, targets = tokens_of(marked), targets_of(marked[:, 1:])
            if isinstance(windows, Windows | PackedSequences):
                positions = windows.positions(start, start + size)
            else:
                rows = np.arange(start, start + len(batch)) * split.num_windows(sequence_length) // len(windows)
                positions = row_positions(rows, sequence_length)
            check_range(batch, vocab_size, "data to evaluate on")
            inputs = batch[:, :-1]
            if isinstance(windows, Windows):
                targets = np.where(windows.are_repeated(start, start + size), IGNORED, targets)
            if first_token is not None and documents is None:
                inputs, targets = _after_first_token(batch, targets, first_token, tokenizer.end_of_text)
            yield EvaluationBatch(batch, inputs, targets, documents, positions)

    return len(windows), batches()


def _after_first_token(
    windows: Integers, targets: Integers, first_token: int, end_of_text: int | None
) -> tuple[Integers, Integers]:
    """Begin each window with the first token, once, and mask it as a target unless it also ends documents."""
    inputs = windows[:, :-1].copy()
    inputs[windows[:, 1] != first_token, 0] = first_token
    return inputs, targets if first_token == end_of_text else np.where(targets == first_token, IGNORED, targets)


def _even_batch_size(count: int, batch_size: int) -> int:
    """Return the largest divisor of `count` up to `batch_size`, so that one shape is compiled.

    A divisor below half of `batch_size` is not worth it: then batches are of full size, and the last one smaller.
    """
    divisor = next(size for size in range(min(batch_size, count), 0, -1) if count % size == 0)
    return divisor if 2 * divisor >= min(batch_size, count) else min(batch_size, count)
