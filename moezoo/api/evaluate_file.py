"""Evaluation of a loaded model on a file."""

import warnings
from collections.abc import Callable
from typing import TypeVar

from moezoo.api.loaded_model import LoadedModel
from moezoo.core.cost.fits import scoring_size
from moezoo.core.data.prepare import whole_file
from moezoo.core.progress import Message, Progress

Result = TypeVar("Result")


def evaluate_file(
    loaded: LoadedModel,
    path: str,
    measure: Callable[..., Result],
    *,
    sequence_length: int | None = None,
    batch_size: int | None = None,
    max_windows: int | None = None,
    on_progress: Progress | None = None,
    on_message: Message = warnings.warn,
) -> Result:
    """Evaluate a model on a whole file of text or token ids (`data.prepare.whole_file`), documents as in training.

    Args:
        loaded: the model. Each window of a published one starts with its first token, if it has one; those of a run are
            as in training and validation.
        path: the file.
        measure: `evaluate`, or another function of these arguments, whose result is returned.
        sequence_length: tokens per window; None: as in training (512 for a Hugging Face checkpoint), or the whole file
            if it is shorter.
        batch_size: windows per batch; None: as in training, reduced so that the logits of a batch take at most 128 MiB.
        max_windows, on_progress: as in `evaluate`.
        on_message: called with a line about each damaged entry of the token cache, which is made again.

    Raises DataError: the file cannot be used, or as `measure`.
    """
    model, documents = loaded.model, loaded.config.data.documents
    split = whole_file(path, loaded.tokenizer, model.spec.num_logits, on_message=on_message, documents=documents)
    length, batch = scoring_size(loaded.config, model.spec.num_logits, split.num_tokens, sequence_length, batch_size)
    loaded.check_scoring(split.num_tokens, batch, length)
    return measure(
        model,
        split,
        loaded.tokenizer,
        sequence_length=length,
        batch_size=batch,
        max_windows=max_windows,
        first_token=loaded.first_token if loaded.published else None,
        on_progress=on_progress,
    )
