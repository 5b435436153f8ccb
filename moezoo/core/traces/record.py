"""Record a routing trace: run a model over data window by window, and write what its routers chose.

Every token is recorded once, as an input of the window in which it is new. The losses are those of an evaluation of the
same data. The last token of a text is only predicted: its routing is unknown, unless the model continues the text.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.backend import Model, check_length
from moezoo.core.data.batch import NOWHERE
from moezoo.core.data.evaluation_windows import EvaluationBatch, evaluation_batches
from moezoo.core.data.packed_split import PackedSplit
from moezoo.core.data.prebatched import PrebatchedSplit
from moezoo.core.data.splits import Split
from moezoo.core.data.tokenizers import Tokenizer
from moezoo.core.errors import DataError
from moezoo.core.layer_routing import LayerRouting
from moezoo.core.progress import Progress
from moezoo.core.tokens import IGNORED, PADDING, Integers
from moezoo.core.traces.continuations import RecordOptions, continue_documents, continued_documents
from moezoo.core.traces.margins import cutoff_names, cutoffs_of, margins
from moezoo.core.traces.places import Places, SourceRows, place_rows, rows_of, runs
from moezoo.core.traces.trace import RoutingTrace, TraceInfo, trace_of
from moezoo.core.traces.trace_data import TracedData
from moezoo.core.traces.trace_file import TraceWriter, open_trace, write_trace


def recorded_trace(
    model: Model,
    data: Sequence[TracedData],
    tokenizer: Tokenizer,
    path: str | Path | None,
    info: TraceInfo,
    options: RecordOptions,
    on_progress: Progress | None = None,
) -> RoutingTrace:
    """Return a recorded trace: that of a file; of None, in memory. Arguments and errors are those of `record_trace`."""
    if path is not None:
        record_trace(model, data, tokenizer, path, info, options, on_progress)
        return open_trace(path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.safetensors"
        record_trace(model, data, tokenizer, file, info, options, on_progress)
        read = open_trace(file)
        return trace_of(info, read.rows(), read.texts)


def record_trace(
    model: Model,
    data: Sequence[TracedData],
    tokenizer: Tokenizer,
    path: str | Path,
    info: TraceInfo,
    options: RecordOptions,
    on_progress: Progress | None = None,
) -> None:
    """Run a model over data and write its routing into a file, in memory that does not grow with the text.

    Args:
        model: a built model with an MoE layer.
        data: splits, of which each source is a domain.
        tokenizer: for the texts of the tokens, and the borders of documents.
        path: the file.
        info: description of the trace; `inference` says how tokens are routed, but generated ones are always routed as
            in generation.
        options: lengths, and generation.
        on_progress: progress callback, in tokens.

    Raises DataError: as `evaluate`; or prompts that leave no position for what is generated.
    """
    report = on_progress or (lambda what, done, total: None)
    length = options.sequence_length + options.generate
    check_length(model.spec, length, f"windows of {options.sequence_length} tokens")
    sources = rows_of(data)
    every = [source for own in sources for source in own]
    with write_trace(path, info) as writer:
        if options.generate:
            continue_documents(model, every, options, report)
        count, done = place_rows(every), 0
        top_k = max(moe.num_slots for _, moe in model.spec.moes)
        writer.reserve(count, len(model.spec.moes), top_k)
        recorder = _Recorder(model, tokenizer, writer, top_k, info.inference)
        for traced, own in zip(data, sources, strict=True):
            recorder.begin(traced, own)
            for batch in _batches(model, traced, tokenizer, options):
                report("recording", done, count)
                done += recorder.add(batch)
        for source in every if options.generate else ():
            for first, continued in continued_documents(source, options):
                report("recording", done, count)
                done += recorder.add_generated(source, first, continued)
        report("recording", done, count)
        writer.texts.update(token_texts(tokenizer, sorted(recorder.ids)))


def _batches(
    model: Model, traced: TracedData, tokenizer: Tokenizer, options: RecordOptions
) -> Iterator[EvaluationBatch]:
    """Return the batches of an evaluation of a split."""
    length = options.sequence_length
    if not isinstance(traced.split, PrebatchedSplit):
        length = max(1, min(length, traced.split.num_tokens - 1))
    _, batches = evaluation_batches(
        traced.split,
        tokenizer,
        model.spec.vocab,
        sequence_length=length,
        batch_size=options.batch_size,
        first_token=options.first_token,
    )
    return batches


class _Recorder:
    """Writes the routing of batches."""

    def __init__(self, model: Model, tokenizer: Tokenizer, writer: TraceWriter, top_k: int, inference: bool):
        self._model, self._writer, self._top_k, self._inference = model, writer, top_k, inference
        names = cutoff_names(model.spec)
        self._cutoffs = cutoffs_of(model.spec, model.export_parameters(names)) if names else {}
        self._borders = _Borders(tokenizer)
        self._sources: list[SourceRows] = []
        self.ids: set[int] = set()

    def begin(self, traced: TracedData, sources: list[SourceRows]) -> None:
        """Begin the next split, with these sources."""
        self._sources = sources
        self._borders.begin(sources, known=not isinstance(traced.split, Split))
        self._predicts_last = isinstance(traced.split, Split | PackedSplit)

    def add(self, batch: EvaluationBatch) -> int:
        """Record a batch; return the number of its tokens that are new."""
        real = None if batch.documents is None else batch.documents != PADDING
        scores = self._model.score(
            batch.inputs, batch.targets, inference=self._inference, documents=batch.documents, routing=True
        )
        columns = self._columns(scores.routing, self._inference, real)
        counted, losses = batch.targets != IGNORED, scores.token_losses
        source_of, new = batch.positions.source, 0
        for number in np.unique(source_of).tolist():
            own = source_of == number
            place = batch.positions.place[own].ravel()
            values = {name: column[own].reshape(-1, *column.shape[2:]) for name, column in columns.items()}
            values["token"] = batch.inputs[own].ravel()
            new += self._put_inputs(number, place, batch.windows[own, :-1].ravel(), values)
            for first, last in runs(np.where(counted[own].ravel(), place, NOWHERE)):
                row = int(self._sources[number].rows(place[first : first + 1] + 1)[0])
                self._writer.put(row, {"loss": losses[own].ravel()[first:last]})
        self.ids.update(np.unique(batch.inputs).tolist())
        return new

    def _put_inputs(self, number: int, place: Places, tokens: Integers, values: dict[str, NDArray[Any]]) -> int:
        """Write the columns of a source's inputs, and tokens that are only predicted; return the number of tokens."""
        source, new = self._sources[number], 0
        for first, last in runs(place):
            self._put(
                number, place[first:last], tokens[first:last], {k: each[first:last] for k, each in values.items()}
            )
            new += last - first
            following = place[last - 1 : last] + 1
            if self._predicts_last and source.ends[source.document(following)[0]] == following[0] + 1:
                final = source.tokens(int(following[0]), 1)
                self._put(number, following, final, {"token": final})
                self.ids.add(int(final[0]))
                new += 1
        return new

    def add_generated(self, source: SourceRows, first: int, continued: Sequence[tuple[Integers, Integers]]) -> int:
        """Record what was generated after the documents from number `first` on: (prompt, generated) of each."""
        length = max(len(prompt) + len(new) for prompt, new in continued)
        tokens, targets = np.zeros((len(continued), length), np.int32), np.full((len(continued), length), IGNORED)
        for row, (prompt, new) in enumerate(continued):
            tokens[row, : len(prompt) + len(new)] = np.concatenate([prompt, new])
            targets[row, len(prompt) - 1 : len(prompt) - 1 + len(new)] = new
        targets = targets.astype(np.int32)
        scores = self._model.score(tokens[:, :-1], targets[:, :-1], inference=True, routing=True)
        columns = self._columns(scores.routing, True, None)
        for row, (prompt, new) in enumerate(continued):
            if not len(new):
                continue
            last = len(prompt) - 1  # of the prompt: it has not been an input so far
            routed = {name: column[row, last : last + len(new)] for name, column in columns.items()}
            at = int(source.rows(source.ends[first + row : first + row + 1] - 1)[0])
            size = len(new)
            own: dict[str, NDArray[Any]] = {"token": new, "loss": scores.token_losses[row, last : last + size]}
            own |= {"generated": np.ones(size), "domain": np.full(size, source.domain)}
            self._writer.put(at + 1, own | {"document": np.full(size, source.number + first + row)})
            self._writer.put(at, routed)  # the last one generated is no input: its routing is unknown
            self.ids.update(new.tolist())
        return sum(len(new) for _, new in continued)

    def _columns(
        self, routings: Sequence[LayerRouting], inference: bool, real: NDArray[np.bool_] | None
    ) -> dict[str, NDArray[Any]]:
        """Return the columns of routing, [B, T, L] or [B, T, L, K]. `real`: False for padding."""
        shape = (*routings[0].expert.shape[:2], len(routings))
        columns: dict[str, NDArray[Any]] = {
            "expert": np.full((*shape, self._top_k), -1, np.int16),
            "weight": np.zeros((*shape, self._top_k), np.float32),
            "dropped": np.zeros((*shape, self._top_k), np.uint8),
            "margin": np.empty(shape, np.float32),
            "runner_up": np.empty(shape, np.int16),
        }
        for index, ((layer, moe), own) in enumerate(zip(self._model.spec.moes, routings, strict=True)):
            tokens = np.s_[:] if real is None else real
            if np.isnan(own.selection[tokens]).any() or not np.isfinite(own.weight[tokens]).all():
                raise DataError(
                    f"the router of layer {layer} gives NaN or infinity, which chooses no experts: nothing to trace. "
                    "`moezoo doctor --forward` finds the reason."
                )
            for name in ("expert", "weight", "dropped"):
                columns[name][..., index, : moe.num_slots] = getattr(own, name)
            found = margins(moe.router, own, inference=inference, real=real, cutoff_E=self._cutoffs.get(layer))
            columns["margin"][..., index], columns["runner_up"][..., index] = found
        return columns

    def _put(self, number: int, place: Places, tokens: Integers, columns: dict[str, NDArray[Any]]) -> None:
        """Write columns of consecutive places of a document, with its number; `tokens` are those of the data."""
        source = self._sources[number]
        documents = self._borders.documents(number, place, tokens)
        columns |= {"document": documents, "domain": np.full(len(place), source.domain)}
        self._writer.put(int(source.rows(place[:1])[0]), columns)


class _Borders:
    """Numbers of documents: known from the data, or found at the tokens that end or begin them."""

    def __init__(self, tokenizer: Tokenizer):
        end = tokenizer.end_of_text
        self._ends, self._begins = (() if end is None else (end,)), (tokenizer.first_tokens if end is None else ())
        self._next = 0  # number of the next document

    def begin(self, sources: Sequence[SourceRows], *, known: bool) -> None:
        """Begin a split."""
        self._sources, self._known = sources, known
        self._current: tuple[int, int] | None = None  # source and last token
        for source in sources if known else ():
            source.number = self._next
            self._next += len(source.ends)

    def documents(self, number: int, place: Places, tokens: Integers) -> NDArray[np.int64]:
        """Return the number of the document of each token, at consecutive places of source `number` of the split."""
        source = self._sources[number]
        if self._known:
            return source.number + source.document(place)
        begins = np.isin(tokens, self._begins)
        begins[1:] |= np.isin(tokens[:-1], self._ends)
        begins[0] |= self._current is None or self._current[0] != number or self._current[1] in self._ends
        found: NDArray[np.int64] = self._next - 1 + np.cumsum(begins)
        source.number, self._current = int(found[-1]), (number, int(tokens[-1]))
        self._next = source.number + 1
        return found


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> dict[int, str]:
    """Return the text of each token id, as inside of a text; none if the tokenizer has no texts.

    Trap: some tokenizers leave out the space before the first word, so each is decoded after another token.
    """
    if not ids or tokenizer.kind == "ids":
        return {}
    before = next((token for token in ids if tokenizer.decode([token]).isalnum()), None)
    if before is None:
        return {token: tokenizer.decode([token]) for token in ids}
    prefix = tokenizer.decode([before])
    return {token: tokenizer.decode([before, token]).removeprefix(prefix) for token in ids}
