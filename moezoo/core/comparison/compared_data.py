"""The windows that two models are compared on, in the tokens of both."""

from collections.abc import Iterator

import numpy as np

from moezoo.core.backend import check_length
from moezoo.core.comparison.side import Side
from moezoo.core.comparison.specs import check_comparable
from moezoo.core.cost.fits import check_scoring
from moezoo.core.data.evaluation_windows import EvaluationBatch, evaluation_batches
from moezoo.core.data.prepare import AnySplit, whole_file
from moezoo.core.data.tokenizers import TokenIds, Tokenizer
from moezoo.core.errors import TokenizerError
from moezoo.core.progress import Message
from moezoo.core.spec import ModelSpec

_OUTPUT_BYTES = 2**28
"""Default limit for the logits and recorded intermediates of both models for one batch, in float32."""


def windows_of_file(
    a: Side,
    b: Side,
    path: str,
    *,
    sequence_length: int | None,
    batch_size: int | None,
    max_windows: int | None,
    on_message: Message,
) -> tuple[int, Iterator[EvaluationBatch]]:
    """Return the number of windows of a file, and their batches. Arguments are those of `api.evaluate_file`.

    Raises DataError: the file cannot be used. Raises what `windows_of_split` raises.
    """
    check_comparable(a.model.spec, b.model.spec)
    reader = b if isinstance(a.tokenizer, TokenIds) else a
    vocab, documents = a.model.spec.vocab, a.config.data.documents
    split = whole_file(path, reader.tokenizer, vocab, on_message=on_message, documents=documents)
    length = sequence_length or max(1, min(a.config.training.sequence_length, split.num_tokens - 1))
    return windows_of_split(a, b, split, sequence_length=length, batch_size=batch_size, max_windows=max_windows)


def windows_of_split(
    a: Side, b: Side, split: AnySplit, *, sequence_length: int, batch_size: int | None, max_windows: int | None
) -> tuple[int, Iterator[EvaluationBatch]]:
    """Return the number of windows of a split of A's tokens, and their batches.

    Raises DataError: windows longer than a model's positions. Raises OutOfMemoryError: the logits of a batch do not
    fit. The batches raise TokenizerError: the tokenizers encode the text of a window differently.
    """
    length = sequence_length
    for side in (a, b):
        check_length(side.model.spec, length, f"windows of {length} tokens")
    most = max(1, _OUTPUT_BYTES // sum(_sequence_bytes(side.model.spec, length) for side in (a, b)))
    batch = batch_size or min(a.config.training.batch_size, most)
    for side in (a, b):
        check_scoring(side.model.spec, batch, length, side.devices, allow_overcommit=side.allow_overcommit)
    count, batches = evaluation_batches(
        split,
        a.tokenizer,
        a.model.spec.vocab,
        sequence_length=length,
        batch_size=batch,
        max_windows=max_windows,
        first_token=a.first_token,
    )
    return count, (_same_tokens(a.tokenizer, b.tokenizer, batch, split.source_names) for batch in batches)


def _same_tokens(a: Tokenizer, b: Tokenizer, batch: EvaluationBatch, where: str) -> EvaluationBatch:
    """Return a batch, after encoding its text with both tokenizers if they are not the same."""
    if a.content_hash != b.content_hash and not isinstance(a, TokenIds) and not isinstance(b, TokenIds):
        for window in batch.windows:
            text = a.decode(window)
            one, other = a.encode(text, where=where), b.encode(text, where=where)
            if not np.array_equal(one, other):
                raise TokenizerError(
                    f"the tokenizers of the models encode {where} differently; got {one[:8].tolist()} and "
                    f"{other[:8].tolist()} for {text[:20]!r}; expected the same tokens. Compare models of one "
                    "tokenizer, or give token ids (.npy, .bin)."
                )
    return batch


def _sequence_bytes(spec: ModelSpec, length: int) -> int:
    """Return the bytes of logits, routing and recorded intermediates of a sequence."""
    layers, experts = 6 * len(spec.all_layers) * spec.embed_dim, sum(3 * moe.num_choices for _, moe in spec.moes)
    return 4 * length * (spec.vocab + layers + experts)
