"""Evaluation on held-out data: nats per token, bits per byte, expert load, and the distance from a known optimum."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.backend import Model, check_length
from moezoo.core.config.data import DataConfig, DatasetSource
from moezoo.core.data.datasets import dataset_grammar
from moezoo.core.data.evaluation_windows import EvaluationBatch, evaluation_batches
from moezoo.core.data.grammar.grammar import Grammar
from moezoo.core.data.prepare import AnySplit
from moezoo.core.data.tokenizers import CharacterTokenizer, Tokenizer
from moezoo.core.errors import DataError, counted
from moezoo.core.progress import Progress
from moezoo.core.tokens import IGNORED, NOT_REPLAYED, ExpertMasks
from moezoo.core.traces.replay import Replay
from moezoo.core.training.metrics import RoutingStatistics, routing_statistics

_MANY_EXPERTS = 16


@dataclass(frozen=True)
class Optimum:
    """Comparison with data of known entropy, on the characters whose full relevant context is inside the window.

    Fields:
        characters: number of characters compared.
        loss: the model's mean loss on them, nats.
        best_possible: mean surprisal of the same characters under the exact source, nats; no model is better on
            average.
        entropy_rate: exact entropy rate of the source, nats per character, for orientation.
        excess: loss / best_possible - 1.
    """

    characters: int
    loss: float
    best_possible: float
    entropy_rate: float

    @property
    def excess(self) -> float:
        return self.loss / self.best_possible - 1


@dataclass(frozen=True)
class Evaluation:
    """Held-out metrics of a model.

    Fields:
        validation_loss: mean nats per token, with training routing and no noise.
        bits_per_byte: None if tokens have no text.
        windows: number of windows scored.
        all_windows: number of windows of the data.
        sequence_length: tokens per window.
        routing: load and drops of each MoE layer, with training routing.
        optimum: comparison with the data's entropy, if that is known.
        inference_loss: mean nats per token with inference routing, if it differs from training routing; the loss that
            matters for generation.
        replayed: share of the tokens that a layer's replayed routing is known for, the others being routed freely; None
            without a replay.
    """

    validation_loss: float
    bits_per_byte: float | None
    windows: int
    all_windows: int
    sequence_length: int
    routing: tuple[RoutingStatistics, ...]
    optimum: Optimum | None = None
    inference_loss: float | None = None
    replayed: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON; `replayed` only with a replay."""
        values = asdict(self)
        if self.replayed is None:
            del values["replayed"]
        if self.optimum is not None:
            values["optimum"]["excess"] = self.optimum.excess
        return values


@dataclass(frozen=True)
class ValidationRecord:
    """A line of `metrics.jsonl` (`metrics.Record`) with the result of a validation after `step` updates."""

    step: int
    tokens: int
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as one object for JSON, those of the evaluation at the top level."""
        return {"step": self.step, "tokens": self.tokens, **self.evaluation.to_dict()}


def evaluate(
    model: Model,
    split: AnySplit,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    batch_size: int,
    max_windows: int | None = None,
    grammar: Grammar | None = None,
    first_token: int | None = None,
    without: Sequence[ExpertMasks] | None = None,
    replay: Replay | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Score consecutive windows of a split: all of them, or `max_windows` spread evenly over it.

    Means are over targets that are not IGNORED. Bits per byte = total nats / ln 2 / UTF-8 bytes of these targets; None
    if tokens have no text. Windows are read batch by batch.

    Args:
        model: a built model.
        split: held-out data.
        tokenizer: counts bytes, and decodes windows for the comparison with `grammar`.
        sequence_length: T, tokens predicted per window.
        batch_size: windows per batch, at most.
        max_windows: number of windows, at most; None: all.
        grammar: source of the data, to compare with its entropy.
        first_token: replaces the first token of each window, which is context only, and is no target (`<s>`): models
            that saw it before every text do poorly without it. None: windows are left as they are.
        without: experts that every window does without: masks of one sequence, for each MoE layer.
        replay: routing to force, with training and with inference routing.
        on_progress: progress callback, in windows: before the first batch and after each.

    Raises DataError: windows longer than the model's positions, or a token id outside the model's vocabulary.
    """
    check_length(model.spec, sequence_length, f"windows of {sequence_length} tokens")
    count, batches = evaluation_batches(
        split,
        tokenizer,
        model.spec.num_logits,
        sequence_length=sequence_length,
        batch_size=batch_size,
        max_windows=max_windows,
        first_token=first_token,
    )
    if replay is not None:
        replay.check_sources(split.num_sources)
    sums, report = _Sums(model, tokenizer, grammar, without, replay), on_progress or (lambda what, done, total: None)
    done = 0
    report("evaluating", done, count)
    for batch in batches:
        sums.add(batch)
        done += len(batch.windows)
        report("evaluating", done, count)
    if not sums.num_targets:
        raise DataError(
            f"the {split.name} data has no targets: all tokens of {count} windows are masked; expected tokens "
            f"to predict; {split.source_names}. Use more windows, or other data."
        )
    return sums.evaluation(count, split.num_windows(sequence_length), sequence_length)


class _Sums:
    """Sums over the windows scored so far: nats with training and inference routing, bytes, load and drops."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        grammar: Grammar | None,
        without: Sequence[ExpertMasks] | None,
        replay: Replay | None,
    ):
        self._model, self._tokenizer, self._grammar = model, tokenizer, grammar
        self._without, self._replay = without, replay
        self.num_targets, self._num_replayed, self._nats, self._inference_nats = 0, 0, 0.0, 0.0
        self._bytes: int | None = 0
        self._load: list[NDArray[np.int64]] = []
        self._dropped: list[int] = []
        self._known = np.zeros(3)  # characters, nats and surprisal where the source is known

    def add(self, batch: EvaluationBatch) -> None:
        """Score the windows of a batch."""
        windows, inputs, targets, documents, positions = batch
        masks = None if self._without is None else [own.of_batch(len(inputs)) for own in self._without]
        score = partial(self._model.score, inputs, targets, documents=documents, masks=masks)
        counted = targets != IGNORED
        if self._replay is not None:
            forced = self._replay.forced(positions, inputs)
            score = partial(score, forced=forced)
            known = np.any([own[..., 0] != NOT_REPLAYED for own in forced], axis=0)
            self._num_replayed += int((known & counted).sum())
        scores = score()
        losses = scores.token_losses.astype(np.float64)
        self.num_targets += int(counted.sum())
        self._nats += float(losses[counted].sum())
        if self._model.spec.inference_differs:
            inferred = score(inference=True).token_losses
            self._inference_nats += float(inferred.astype(np.float64)[counted].sum())
        num_bytes = self._tokenizer.byte_count(targets[counted], _begin_texts(windows, self._tokenizer)[counted])
        self._bytes = None if self._bytes is None or num_bytes is None else self._bytes + num_bytes
        first = not self._load
        self._load = scores.load if first else [a + b for a, b in zip(self._load, scores.load, strict=True)]
        self._dropped = scores.dropped if first else [a + b for a, b in zip(self._dropped, scores.dropped, strict=True)]
        if self._grammar is not None:
            losses[~counted] = np.nan
            self._known += _compare_with_source(windows, losses, self._tokenizer, self._grammar)

    def evaluation(self, windows: int, all_windows: int, sequence_length: int) -> Evaluation:
        """Return the means."""
        characters, nats, surprisal = self._known.tolist()
        optimum = None
        if self._grammar is not None and characters:
            rate = self._grammar.entropy().nats_per_character
            optimum = Optimum(int(characters), nats / characters, surprisal / characters, rate)
        return Evaluation(
            validation_loss=self._nats / self.num_targets,
            bits_per_byte=self._nats / math.log(2) / self._bytes if self._bytes else None,
            windows=windows,
            all_windows=all_windows,
            sequence_length=sequence_length,
            routing=routing_statistics(self._model.spec.moe_layers, self._load, self._dropped),
            optimum=optimum,
            inference_loss=self._inference_nats / self.num_targets if self._model.spec.inference_differs else None,
            replayed=None if self._replay is None else self._num_replayed / self.num_targets,
        )


def _begin_texts(windows: NDArray[np.int32], tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Return which targets of windows [n, T + 1] are the first of a text, because of the token before: bool [n, T]."""
    end = tokenizer.end_of_text
    return np.isin(windows[:, :-1], [*tokenizer.first_tokens, *([] if end is None else [end])])


def known_grammar(data: DataConfig) -> Grammar | None:
    """Return the grammar that generates the data, if that is a single built-in dataset with a character tokenizer."""
    match data.validation or data.sources:
        case (DatasetSource(name=name),) if data.tokenizer.kind == "character" and data.documents == "windows":
            return dataset_grammar(name)
    return None


def _compare_with_source(
    windows: NDArray[np.int32], losses: NDArray[np.float64], tokenizer: Tokenizer, grammar: Grammar
) -> NDArray[np.float64]:
    """Return number, summed losses and summed exact surprisal of characters with their full context in the window.

    Characters whose loss is NaN do not count.
    """
    assert isinstance(tokenizer, CharacterTokenizer)
    surprisal = np.stack([grammar.fair_surprisal(tokenizer.decode(window)) for window in windows])
    known = ~np.isnan(surprisal) & ~np.isnan(losses)
    return np.array([known.sum(), losses[known].sum(), surprisal[known].sum()])


def describe_evaluation(evaluation: Evaluation) -> str:
    """Describe the losses in nats per token and bits per byte, and the distance from a known optimum."""
    windows = counted(evaluation.windows, "window")
    if evaluation.windows < evaluation.all_windows:
        windows = f"{evaluation.windows:,} of {evaluation.all_windows:,} windows"
    lines = [
        f"validation loss {evaluation.validation_loss:.4f} nats per token"
        + (f", {evaluation.bits_per_byte:.4f} bits per byte" if evaluation.bits_per_byte is not None else "")
        + f"  ({windows} of {counted(evaluation.sequence_length, 'token')})"
    ]
    if evaluation.inference_loss is not None:
        gap = evaluation.inference_loss - evaluation.validation_loss
        lines.append(f"with inference routing: {evaluation.inference_loss:.4f} nats per token ({gap:+.4f})")
    if evaluation.replayed is not None:
        lines.append(_describe_replay(evaluation.replayed))
    if evaluation.optimum is not None:
        optimum = evaluation.optimum
        lines.append(
            f"on characters with full context in the window: {optimum.loss:.4f} nats, best possible "
            f"{optimum.best_possible:.4f}: {100 * optimum.excess:.1f} % above the optimum  "
            f"({optimum.characters:,} characters)"
        )
    return "\n".join(lines)


def _describe_replay(share: float) -> str:
    if share == 1:
        return "replayed: all tokens"
    # Part of the tokens is not rounded to none or all.
    replayed = f"{min(max(100 * share, 0.1), 99.9):.1f} % of the tokens" if share else "no token"
    return f"replayed: {replayed}; the others are routed freely"


def describe_routing(evaluation: Evaluation) -> list[str]:
    """Describe each MoE layer in a line: load by expert (of many, the least and the most loaded), and drop rate."""
    lines = []
    for row in evaluation.routing:
        loads = [share * len(row.load) for share in row.load]
        shown = "of expert " + ", ".join(f"{expert}: {load:.2f}" for expert, load in enumerate(loads))
        if len(loads) > _MANY_EXPERTS:
            least = loads.index(min(loads))
            shown = f"{min(loads):.2f} (expert {least}) to {max(loads):.2f} (expert {row.worst_expert})"
            shown += f" of {len(loads)} experts"
        lines.append(f"layer {row.layer}: load {shown} (1 is balanced), dropped {100 * row.dropped:.2f} %")
    return lines
