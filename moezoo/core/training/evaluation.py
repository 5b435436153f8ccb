"""How good a model is on held-out data: nats a token, bits a byte, expert load, distance from a known optimum."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.backend import Model, check_length
from moezoo.core.config.data import DataConfig, DatasetSource
from moezoo.core.data.datasets import dataset_grammar
from moezoo.core.data.grammar.grammar import Grammar
from moezoo.core.data.prebatched import ReadyBatches
from moezoo.core.data.prepare import Split
from moezoo.core.data.token_store import check_range
from moezoo.core.data.tokenizers import CharacterTokenizer, Tokenizer
from moezoo.core.tokens import IGNORED
from moezoo.core.training.metrics import routing_statistics

if TYPE_CHECKING:
    pass

MAX_WINDOWS = 4096


@dataclass(frozen=True)
class Optimum:
    """Comparison with data whose entropy is known, on characters whose past the window shows whole.

    Fields:
        characters: how many characters were compared.
        loss: the model's mean nats on them.
        best_possible: mean nats that the exact source gives these same characters; no model is better on average.
        entropy_rate: exact nats per character of the endless source, for orientation.
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
    """Held-out loss of `windows` windows of `sequence_length` tokens, by the routing of training without noise.

    `inference_loss`: by the routing of inference, where that is another one; what generation lives on.
    """

    validation_loss: float
    bits_per_byte: float | None
    windows: int
    sequence_length: int
    routing: list[dict[str, Any]]
    optimum: Optimum | None = None
    inference_loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        if self.optimum is not None:
            values["optimum"]["excess"] = self.optimum.excess
        return values


def evaluate(
    model: Model,
    split: Split | ReadyBatches,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    batch_size: int,
    max_windows: int = MAX_WINDOWS,
    grammar: Grammar | None = None,
    first_token: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score consecutive windows of a split, all of them or `max_windows` spread evenly over it.

    Means are over the targets that count. Bits per byte = total nats / ln 2 / UTF-8 bytes of these; None where tokens
    have no text. With `first_token` each window begins with it, and its own T tokens are what is predicted.

    Raises DataError: windows longer than learned positions, a token id outside the model's vocabulary.
    """
    check_length(model.spec, sequence_length, f"windows of {sequence_length}")
    windows = np.asarray(split.windows(sequence_length, max_windows))
    if first_token is not None:  # windows follow each other every T tokens, so this leaves none out and none twice
        windows = np.insert(windows[:, :-1], 0, first_token, axis=1)
    check_range(windows[windows != IGNORED], model.spec.vocab, "data to evaluate on")
    batch_size = _batch_that_divides(len(windows), batch_size)
    losses = np.empty((len(windows), sequence_length), np.float64)
    inference_losses = np.empty_like(losses) if model.spec.inference_differs else None
    load: list[NDArray[np.int64]] = []
    dropped: list[int] = []
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        scores = model.score(batch[:, :-1], batch[:, 1:])
        losses[start : start + len(batch)] = scores.token_losses
        if inference_losses is not None:
            inferred = model.score(batch[:, :-1], batch[:, 1:], inference=True)
            inference_losses[start : start + len(batch)] = inferred.token_losses
        load = [a + b for a, b in zip(load, scores.load, strict=True)] if load else scores.load
        dropped = [a + b for a, b in zip(dropped, scores.dropped, strict=True)] if dropped else scores.dropped
        if on_progress is not None:
            on_progress(start + len(batch), len(windows))
    counts = windows[:, 1:] != IGNORED
    num_bytes = tokenizer.byte_count(windows[:, 1:][counts])
    return Evaluation(
        validation_loss=float(losses[counts].mean()),
        bits_per_byte=float(losses.sum() / math.log(2) / num_bytes) if num_bytes else None,
        windows=len(windows),
        sequence_length=sequence_length,
        routing=routing_statistics(model.spec.moe_layers, load, dropped),
        optimum=_compare(windows, losses, tokenizer, grammar) if grammar is not None else None,
        inference_loss=None if inference_losses is None else float(inference_losses[counts].mean()),
    )


def known_grammar(data: DataConfig) -> Grammar | None:
    """The grammar behind the data, where it is one built-in dataset read by characters."""
    match data.sources:
        case (DatasetSource(name=name),) if data.tokenizer.kind == "character":
            return dataset_grammar(name)
    return None


def _compare(
    windows: NDArray[np.int32], losses: NDArray[np.float64], tokenizer: Tokenizer, grammar: Grammar
) -> Optimum | None:
    assert isinstance(tokenizer, CharacterTokenizer)
    best = np.stack([grammar.fair_surprisal(tokenizer.decode(window)) for window in windows])
    fair = ~np.isnan(best)
    if not fair.any():
        return None
    return Optimum(
        characters=int(fair.sum()),
        loss=float(losses[fair].mean()),
        best_possible=float(best[fair].mean()),
        entropy_rate=grammar.entropy().nats_per_character,
    )


def _batch_that_divides(count: int, batch_size: int) -> int:
    """The largest divisor of `count` up to `batch_size`, unless less than half of it: one shape compiles once."""
    divisor = next(size for size in range(min(batch_size, count), 0, -1) if count % size == 0)
    return divisor if 2 * divisor >= min(batch_size, count) else min(batch_size, count)


_MANY_EXPERTS = 16


def describe_evaluation(evaluation: Evaluation) -> str:
    """Validation loss in nats and bits per byte, and the distance from the optimum where it is known."""
    lines = [
        f"validation loss {evaluation.validation_loss:.4f} nats per token"
        + (f", {evaluation.bits_per_byte:.4f} bits per byte" if evaluation.bits_per_byte is not None else "")
        + f"  ({evaluation.windows} windows of {evaluation.sequence_length} tokens)"
    ]
    if evaluation.inference_loss is not None:
        gap = evaluation.inference_loss - evaluation.validation_loss
        lines.append(f"by the routing of inference: {evaluation.inference_loss:.4f} nats per token ({gap:+.4f})")
    if evaluation.optimum is not None:
        optimum = evaluation.optimum
        lines.append(
            f"where the window shows the whole past that matters: {optimum.loss:.4f} nats, best possible "
            f"{optimum.best_possible:.4f}: {100 * optimum.excess:.1f} % above the optimum  "
            f"({optimum.characters:,} characters)"
        )
    return "\n".join(lines)


def describe_routing(evaluation: Evaluation) -> list[str]:
    """A line a layer: the load of each expert, or of many the most and the least; and what was dropped."""
    lines = []
    for row in evaluation.routing:
        loads = [share * len(row["load"]) for share in row["load"]]
        shown = " ".join(f"{load:.2f}" for load in loads)
        if len(loads) > _MANY_EXPERTS:
            shown = f"{min(loads):.2f} to {max(loads):.2f} of {len(loads)} experts"
        lines.append(f"layer {row['layer']}: load {shown} (1 is balanced), dropped {100 * row['dropped']:.2f} %")
    return lines
