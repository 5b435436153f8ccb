"""Change of a model's loss on held-out text without some of its experts, several variants in one pass."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.backend import Model, check_length
from moezoo.core.data.evaluation_windows import EvaluationBatch, evaluation_batches
from moezoo.core.data.prepare import AnySplit
from moezoo.core.data.tokenizers import Tokenizer
from moezoo.core.errors import DataError
from moezoo.core.interventions.experts import Experts, name_experts
from moezoo.core.interventions.masks import Mode, masks_of
from moezoo.core.progress import Progress
from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import IGNORED, ExpertMasks

_WHAT = "without experts"


@dataclass(frozen=True)
class Change:
    """Change of the mean loss without some experts.

    Fields:
        experts: those that the model does without.
        change: mean loss without them, less that of the whole model: nats per token.
        standard_error: of that change, from its differences between windows; None with a single window.
    """

    experts: Experts
    change: float
    standard_error: float | None


@dataclass(frozen=True)
class Changes:
    """Changes of the mean loss, each without other experts.

    Fields:
        mode: `silence` or `reroute`.
        loss: mean loss of the whole model on the same windows, nats per token, with inference routing.
        windows, sequence_length: number of windows, and tokens in each.
        changes: one for each set of experts.
    """

    mode: Mode
    loss: float
    windows: int
    sequence_length: int
    changes: tuple[Change, ...]


def loss_changes(
    model: Model,
    split: AnySplit,
    tokenizer: Tokenizer,
    without: Sequence[Experts],
    *,
    sequence_length: int,
    batch_size: int,
    max_windows: int | None = None,
    first_token: int | None = None,
    mode: Mode = "silence",
    on_progress: Progress | None = None,
) -> Changes:
    """Measure the change of loss without each of several sets of experts.

    Every window is scored with the whole model and without each set: the rows of a batch are the same windows with
    different masks. Routing is that of inference, so no row depends on another.

    With W windows of n_w targets, and difference d_w of their summed losses, the change is `sum d_w / sum n_w`, and its
    standard error that of a ratio of means, `sqrt(W / (W - 1) sum (d_w - change n_w)^2) / sum n_w`.

    Args:
        without: sets of experts to do without.
        mode: what it means to do without them.
        on_progress: progress callback, in windows, each counted for every set, and once more.
        model, and others: those of `evaluate`.

    Raises DataError: as `evaluate`. Raises SpecError: as `check_masks`.
    """
    check_length(model.spec, sequence_length, f"windows of {sequence_length} tokens")
    count, batches = evaluation_batches(
        split,
        tokenizer,
        model.spec.vocab,
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_windows=max_windows,
        first_token=first_token,
    )
    report, done, total = on_progress or (lambda what, done, total: None), 0, count * (1 + len(without))
    nats, targets = [], []
    report(_WHAT, 0, total)
    for batch in batches:
        own_WA = np.zeros((len(batch.inputs), 1 + len(without)))
        for window, variant, own in _scored(model, batch, [{}, *without], batch_size, mode):
            own_WA[window, variant] = own
            report(_WHAT, done := done + len(window), total)
        nats.append(own_WA)
        targets.append(np.sum(batch.targets != IGNORED, axis=-1))
    nats_WA, targets_W = np.concatenate(nats), np.concatenate(targets)
    if not targets_W.any():
        raise DataError(f"the {split.name} data has no targets in {count} windows; {split.source_names}. Use others.")
    loss = _finite(float(nats_WA[:, 0].sum() / targets_W.sum()), split)
    changes = [
        Change(experts, *_mean_difference(nats_WA[:, place] - nats_WA[:, 0], targets_W))
        for place, experts in enumerate(without, start=1)
    ]
    return Changes(mode, loss, count, sequence_length, tuple(changes))


def _finite(loss: float, split: AnySplit) -> float:
    """Return the loss of the whole model. Raises DataError: it is not finite, and then no change of it is."""
    if not math.isfinite(loss):
        raise DataError(
            f"the loss of the whole model is {loss}, from which no change can be measured; expected a number; "
            f"{split.source_names}. `moezoo doctor MODEL --forward` finds where NaN or infinity starts."
        )
    return loss


def _scored(
    model: Model, batch: EvaluationBatch, variants: Sequence[Experts], batch_size: int, mode: Mode
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]:
    """Score all windows of a batch in all variants; yield window, variant and summed loss of each row, some at a time.

    A variant is the experts that the model does without.
    """
    num_windows, inference = len(batch.inputs), model.spec.inference_differs
    rows = num_windows * len(variants)
    size = min(batch_size, rows)
    for start in range(0, rows, size):
        # The last rows are filled up with the first ones again, so that one shape is compiled.
        variant, window = np.divmod(np.arange(start, start + size) % rows, num_windows)
        targets = batch.targets[window]
        documents = None if batch.documents is None else batch.documents[window]
        masks = _masks(model.spec, [variants[each] for each in variant], mode)
        scores = model.score(batch.inputs[window], targets, inference=inference, documents=documents, masks=masks)
        nats: NDArray[np.float64] = np.where(targets != IGNORED, scores.token_losses, 0).sum(axis=-1, dtype=np.float64)
        new = slice(rows - start)
        yield window[new], variant[new], nats[new]


def _masks(spec: ModelSpec, rows: Sequence[Experts], mode: Mode) -> list[ExpertMasks]:
    """Return the masks of rows that do without these experts each."""
    without = {layer: np.zeros((len(rows), moe.num_choices), bool) for layer, moe in spec.moes}
    for row, experts in enumerate(rows):
        for layer, ids in experts.items():
            without[layer][row, list(ids)] = True
    return masks_of(list(without.values()), mode)


def _mean_difference(difference_W: NDArray[np.float64], targets_W: NDArray[np.int64]) -> tuple[float, float | None]:
    """Return the mean difference per target, and its standard error over windows."""
    count, targets = len(targets_W), float(targets_W.sum())
    mean = float(difference_W.sum()) / targets
    if count == 1:
        return mean, None
    squares = float(np.sum((difference_W - mean * targets_W) ** 2))
    return mean, math.sqrt(count / (count - 1) * squares) / targets


def described(change: Change) -> str:
    """Describe a change in nats per token, with its standard error."""
    return f"{change.change:+.5f}" + ("" if change.standard_error is None else f" ± {change.standard_error:.5f}")


def change_values(found: Changes) -> dict[str, Any]:
    """Return a single change as plain values for JSON."""
    (change,) = found.changes
    return {
        "experts": name_experts(change.experts),
        "mode": found.mode,
        "loss": found.loss,
        "change": change.change,
        "standard_error": change.standard_error,
    }


def describe_change(found: Changes) -> str:
    """Describe a single change in a line."""
    (change,) = found.changes
    how = {"silence": "silenced", "reroute": "rerouted around"}[found.mode]
    error = " (one window has no standard error)" if change.standard_error is None else ""
    return (
        f"without {name_experts(change.experts)}, {how}: {described(change)} nats per token{error}, from "
        f"{found.loss:.4f} with all experts"
    )
