"""Compare a model with a routing trace, of another engine for instance: the choice of experts alone.

A trace has no logits. But its routing can be replayed, so it is known how much of a difference the routing makes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.core.backend import Model
from moezoo.core.comparison.compared_data import windows_of_split
from moezoo.core.comparison.divergence import Divergence, Effect
from moezoo.core.comparison.routing_changes import LayerChanges, RoutingChange
from moezoo.core.comparison.side import Side
from moezoo.core.cost.fits import check_scoring
from moezoo.core.data.batch import NOWHERE, Positions
from moezoo.core.data.evaluation_windows import EvaluationBatch
from moezoo.core.data.packed_split import DocumentSource, PackedSplit
from moezoo.core.data.splits import WHOLE, Split, SplitSource
from moezoo.core.data.token_shards import Tokens, check_range, open_npy
from moezoo.core.parity.report import ParityTolerances, json_safe
from moezoo.core.progress import Progress
from moezoo.core.tokens import IGNORED, NOT_REPLAYED, PADDING, UNUSED, Integers
from moezoo.core.traces.formats.foreign import documents
from moezoo.core.traces.replay import Replay
from moezoo.core.traces.trace import RoutingTrace

_MOST_TOKENS = 2048
_LENGTHS = 64  # sequences are padded to multiples of this, so that few lengths are compiled

TracedBatch = tuple[EvaluationBatch, list[Integers]]
"""Windows, and the trace's experts of their inputs, as forced routing."""


@dataclass(frozen=True)
class TraceReport:
    """Comparison of a trace with model A.

    Fields:
        a: path, backend and precision of the model.
        trace: file and origin of the trace.
        tokens: number of targets compared.
        replayed: number of tokens whose routing the trace has, in every MoE layer.
        loss: mean loss of A, nats per token.
        routing_effect: distance of A with the trace's experts from A with its own.
        routing: by MoE layer, change of the experts from the trace to A.
    """

    a: str
    trace: str
    tokens: int
    replayed: int
    loss: float
    routing_effect: Effect
    routing: tuple[RoutingChange, ...]

    @property
    def first_routing(self) -> RoutingChange | None:
        """The first layer whose router prefers other experts than the trace's by more than rounding."""
        return next((layer for layer in self.routing if layer.beyond), None)

    @property
    def headline(self) -> str:
        """The verdict in a line."""
        first = self.first_routing
        if first is not None:
            return f"routing, starting in layer {first.layer}: {'near ties' if first.near_ties else 'not near ties'}"
        if any(layer.changed for layer in self.routing):
            return "rounding: where tokens have other experts, it is at ties within rounding"
        return f"equal: the same experts for all {self.replayed:,} tokens"

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data; infinities and NaN are strings."""
        content: dict[str, Any] = json_safe({"verdict": self.headline, **asdict(self)})
        return content


def compare_trace(
    a: Side, trace: RoutingTrace, num_windows: int, batches: Iterable[TracedBatch], on_progress: Progress
) -> TraceReport:
    """Compare the routing of a model with a trace, batch by batch.

    A trace of moezoo is compared with the kind of routing that it recorded, others with that of inference.
    """
    inference = trace.info.inference or trace.info.written_by != "moezoo"
    margin = ParityTolerances.of(a.model.spec).margin
    layers = [LayerChanges(layer, moe, margin) for layer, moe in a.model.spec.moes]
    effect, done, replayed = Divergence(), 0, 0
    on_progress("comparing windows", 0, num_windows)
    for batch, forced in batches:
        replayed += _add(a.model, batch, forced, inference, layers, effect)
        done += len(batch.windows)
        on_progress("comparing windows", done, num_windows)
    found, info = effect.effect(), trace.info
    origin = ", ".join(filter(None, (info.written_by, info.model, info.backend, info.compute)))
    return TraceReport(
        a=a.describe(),
        trace=f"{trace.where} ({origin})",
        tokens=found.kl.count,
        replayed=replayed,
        loss=effect.left_loss,
        routing_effect=found,
        routing=tuple(layer.change() for layer in layers),
    )


def _add(
    model: Model,
    batch: EvaluationBatch,
    forced: list[Integers],
    inference: bool,
    layers: list[LayerChanges],
    effect: Divergence,
) -> int:
    """Add a batch, and return the number of its tokens that are replayed."""
    options: dict[str, Any] = {"inference": inference, "documents": batch.documents}
    own, replayed = model.forward(batch.inputs, **options), model.forward(batch.inputs, forced=forced, **options)
    counted_P = (batch.targets != IGNORED).reshape(-1)
    left_PV, right_PV = (output.logits.reshape(len(counted_P), -1)[counted_P] for output in (own, replayed))
    effect.add(left_PV, right_PV, batch.targets.reshape(-1)[counted_P])
    known_P = np.ones(batch.inputs.size, bool)
    for layer, expert, free, with_trace in zip(layers, forced, own.routing, replayed.routing, strict=True):
        known = expert[..., 0] != NOT_REPLAYED
        known_P &= known.reshape(-1)
        layer.add(np.where(known[..., None], expert, UNUSED), free.expert, with_trace, with_trace, known.reshape(-1))
    return int(known_P.sum())


def batches_of_data(batches: Iterator[EvaluationBatch], replay: Replay) -> Iterator[TracedBatch]:
    """Yield windows of the data that a trace was recorded of, with its experts. Raises DataError: other data."""
    for batch in batches:
        yield batch, replay.forced(batch.positions, batch.inputs)


def windows_of_text(
    a: Side, trace: RoutingTrace, folder: Path, length: int | None, batch_size: int | None, max_windows: int | None
) -> tuple[int, Iterator[TracedBatch]]:
    """Return the number of windows of the text that moezoo recorded a trace of, and their batches.

    The text is read from the trace, without what was generated, and cut as it was for the recording if A's data keeps
    documents apart as then. Its token ids are written into `folder`, a file for each domain.

    Raises what `windows_of_split` raises. The batches raise DataError: a token outside the vocabulary.
    """
    trace.require("token", "domain", "document", purpose="a comparison without --data")
    domain, text = trace.column("domain"), np.ones(trace.num_tokens, bool)
    if trace.has("generated"):
        text = trace.column("generated") == 0
    separate = a.config.data.documents == "separate" or not text.all()  # documents that are continued are separate
    token, document = trace.column("token"), trace.column("document")
    found = [index for index in range(len(trace.info.domains)) if (text & (domain == index)).any()]
    count, parts = 0, list[Iterator[TracedBatch]]()
    for place, index in enumerate(found):
        most = None
        if max_windows is not None:
            most = (place + 1) * max_windows // len(found) - place * max_windows // len(found)
        if most == 0:
            continue
        own = text & (domain == index)
        ids = _saved(folder / f"{index}.npy", token[own], a.model.spec.vocab, trace.info.domains[index])
        split = _split_of_text(trace.info.domains[index], ids, document[own] if separate else None)
        wanted = length or trace.info.sequence_length or a.config.training.sequence_length
        windows, batches = windows_of_split(
            a,
            a,
            split,
            sequence_length=max(1, min(wanted, split.num_tokens - 1)),
            batch_size=batch_size,
            max_windows=most,
        )
        count += windows
        parts.append(batches_of_data(batches, Replay(trace, a.model.spec, [trace.info.domains[index]])))
    return count, chain.from_iterable(parts)


def _saved(file: Path, token: Integers, vocab: int, name: str) -> Tokens:
    np.save(file, token)
    return Tokens([open_npy(file, name)], vocab, name)


def _split_of_text(name: str, tokens: Tokens, document: Integers | None) -> Split | PackedSplit:
    """Return a split of tokens; of whole documents, if `document` has their numbers."""
    if document is None:
        return Split(WHOLE, (SplitSource(name, tokens, 0, len(tokens), 1.0),))
    start = np.flatnonzero(np.diff(document, prepend=document[:1] - 1))
    length = np.diff(start, append=len(document))
    return PackedSplit(WHOLE, (DocumentSource(name, tokens, start, length, float(len(document))),))


def windows_of_trace(
    a: Side, trace: RoutingTrace, replay: Replay, length: int | None, max_windows: int | None
) -> tuple[int, Iterator[TracedBatch]]:
    """Return the number of windows of a trace's own documents, and the windows one by one; the first `max_windows`.

    Each document begins a window. One of more than `length` tokens is cut, and every part begins without context. None:
    the model's maximum length, or 2048.

    Raises OutOfMemoryError: the logits of a window do not fit. The windows raise DataError: a token outside the
    vocabulary.
    """
    length = length or a.model.spec.max_length or _MOST_TOKENS
    number = trace.column("document") if trace.has("document") else np.zeros(trace.num_tokens, np.int32)
    sizes = np.diff(np.flatnonzero(np.diff(number, prepend=number[:1] - 1, append=number[-1:] + 1)))
    count = int((-(-sizes // length)).sum())
    count = count if max_windows is None else min(count, max_windows)
    most = min(length, -(-int(sizes.max(initial=1)) // _LENGTHS) * _LENGTHS)
    check_scoring(a.model.spec, 1, most, a.devices, allow_overcommit=a.allow_overcommit)
    return count, islice(_windows_of_trace(trace, replay, length, a.model.spec.vocab), count)


def _windows_of_trace(trace: RoutingTrace, replay: Replay, length: int, vocab: int) -> Iterator[TracedBatch]:
    first = 0
    for rows in documents(trace):
        assert rows.token is not None
        check_range(rows.token, vocab, trace.where)
        for start in range(0, len(rows), length):
            input_T, target_T = rows.token[start : start + length], rows.token[start + 1 : start + length + 1]
            padded = -(-len(input_T) // _LENGTHS) * _LENGTHS
            tokens, targets = np.zeros((1, padded), np.int32), np.full((1, padded), IGNORED, np.int32)
            tokens[0, : len(input_T)], targets[0, : len(target_T)] = input_T, target_T
            place = np.arange(padded)[None]
            row = np.where(place < len(input_T), first + start + place, NOWHERE).astype(np.int64)
            documents_T = np.where(row == NOWHERE, PADDING, 0).astype(np.int32)
            positions = Positions(np.zeros(1, np.int64), row)
            batch = EvaluationBatch(np.pad(tokens, ((0, 0), (0, 1))), tokens, targets, documents_T, positions)
            yield batch, replay.forced_rows(row, tokens)
        first += len(rows)
