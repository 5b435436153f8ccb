"""A trace that another program wrote, and what its file does not say.

Files of other programs have experts, and often token ids; never margins or runners-up. Which layers of the model the
routing is of, and how many experts those have, no format says: a model or options must.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.errors import DataError, shown
from moezoo.core.spec import ModelSpec
from moezoo.core.traces.trace import RoutingTrace, TraceInfo, TraceRows, trace_of

IntegerArray = NDArray[np.integer[Any]]
Layers = tuple[int, ...]

_MAX_TOKEN = 2**31 - 1
_MAX_FIRST = 2**21  # tokens before the first that a file has; more than any model's context
_ASK = "Name the model with --model, or use --layers, --experts and --top-k."


@dataclass(frozen=True)
class Known:
    """Facts about the model that routed, from a model or from options; None if unknown.

    Fields:
        layers: indices of the MoE layers.
        num_experts: number of experts, of all MoE layers or of each.
        top_k: experts per token, the most of any layer.
        depth: number of all layers, without experts too.
        model: path or hub id.
    """

    layers: Layers | None = None
    num_experts: tuple[int, ...] | None = None
    top_k: int | None = None
    depth: int | None = None
    model: str | None = None

    def info(self, layers: Layers, writer: str, where: str, domain: str) -> TraceInfo:
        """Return the description of a trace of MoE layers. Raises DataError: their numbers of experts are unknown."""
        if self.num_experts is None:
            raise DataError(f"{where} does not say how many experts a layer has. {_ASK}")
        counts = self.num_experts * (len(layers) if len(self.num_experts) == 1 else 1)
        if len(counts) != len(layers) or not all(0 < count <= 2**15 for count in counts):
            raise DataError(f"{where} has {len(layers)} MoE layers; got {len(counts)} numbers of experts. {_ASK}")
        return TraceInfo(layers=layers, num_experts=counts, domains=(domain,), model=self.model, written_by=writer)

    def rows_of_layers(self, num_rows: int, where: str) -> tuple[Layers, Layers]:
        """Return the MoE layers, and the rows of a file's axis of layers that are theirs.

        The axis has the MoE layers, or all layers. Raises DataError: it has neither, or the layers are unknown.
        """
        if self.layers is None:
            raise DataError(f"{where} has the routing of {num_rows} layers, but not which layers of a model. {_ASK}")
        if num_rows == len(self.layers):
            return self.layers, tuple(range(num_rows))
        if num_rows == self.depth or (self.depth is None and num_rows > self.layers[-1]):
            return self.layers, self.layers
        depth = "" if self.depth is None else f" or all {self.depth} layers"
        raise DataError(
            f"{where} has the routing of {num_rows} layers; expected {len(self.layers)} MoE layers{depth}. Use the "
            "model that routed."
        )


def known_of(spec: ModelSpec, model: str) -> Known:
    """Return the facts about a model that a file of routing does not say."""
    if not spec.moes:
        raise DataError(f"{model} has no MoE layer, so it routes nothing; expected the model that routed.")
    moes = [moe for _, moe in spec.moes]
    return Known(
        layers=spec.moe_layers,
        num_experts=tuple(moe.num_choices for moe in moes),
        top_k=max(moe.router.top_k for moe in moes),
        depth=len(spec.all_layers),
        model=model,
    )


@dataclass
class Foreign:
    """A trace that another program wrote, read a part at a time.

    Fields:
        info: its description.
        rows: its rows, in parts; all have the same columns.
        notes: one-line remarks for the user about what the file lacks; complete when the rows have been read.
    """

    info: TraceInfo
    rows: Iterable[TraceRows]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """The routing of one sequence as an engine returns it.

    Fields:
        expert: integers [rows, layers of the file, K], of the tokens from `first` on; rows may be missing at the end.
        tokens: ids of prompt and answer; None if unknown.
        num_prompt: tokens of the prompt; None if unknown.
        num_tokens: of prompt and answer; None if unknown: as many as there are rows.
        first: index of the token that the first row is of.
        loss: nats of each token, NaN where unknown; None if there are none.
        continues: these tokens are of the same document as those of the request before.
    """

    expert: IntegerArray
    tokens: Sequence[int] | None = None
    num_prompt: int | None = None
    num_tokens: int | None = None
    first: int = 0
    loss: Sequence[float] | None = None
    continues: bool = False


class RequestReader:
    """Turns requests into the rows of a trace, each a document; counts what is missing for the notes."""

    def __init__(self, known: Known, writer: str, where: str, domain: str) -> None:
        self._known, self._where, self._writer, self._domain = known, where, writer, domain
        self._documents = self._unknown = self._repeated = 0
        self._columns: set[str] | None = None
        self.info: TraceInfo | None = None
        self._picked: Layers = ()
        self._axis = 0

    def open(self, num_rows: int) -> TraceInfo:
        """Return the description of the trace of a file with `num_rows` layers. Raises DataError."""
        layers, self._picked = self._known.rows_of_layers(num_rows, self._where)
        self.info = self._known.info(layers, self._writer, self._where, self._domain)
        return self.info

    def rows(self, request: Request, place: str) -> TraceRows:
        """Return the rows of a request; `place` names it in errors. Raises DataError: invalid or inconsistent."""
        info = self.info or self.open(request.expert.shape[1])
        where = f"{place} of {self._where}" if place else self._where
        if self._documents and request.expert.shape[1] != self._axis:
            raise DataError(f"{where} has {request.expert.shape[1]} layers; expected {self._axis}, as before.")
        self._axis = request.expert.shape[1]
        if request.first > _MAX_FIRST:
            raise DataError(f"{where} begins at token {request.first}; expected at most {_MAX_FIRST}. Record it again.")
        routed = request.first + len(request.expert)
        count = routed if request.num_tokens is None else request.num_tokens
        if routed > count:
            raise DataError(f"{where} has the routing of {routed} tokens, but {count} tokens. Write it again.")
        expert, repeated = checked_experts(request.expert[:, self._picked], info, where)
        self._repeated += repeated
        self._unknown += count - len(expert)
        whole = np.full((count, *expert.shape[1:]), -1, np.int16)
        whole[request.first : routed] = expert
        columns: dict[str, Any] = {}
        if request.tokens is not None:
            columns["token"] = checked_tokens(request.tokens, count, where)
        if request.loss is not None:
            columns["loss"] = np.asarray(request.loss, np.float32)
        if request.num_prompt is not None:
            columns["generated"] = (np.arange(count) >= request.num_prompt).astype(np.uint8)
        if self._columns is not None and columns.keys() != self._columns:
            odd = ", ".join(sorted(columns.keys() ^ self._columns))
            raise DataError(f"{where} differs from those before it in whether it has {odd}; expected all or none.")
        self._columns = set(columns)
        self._documents += not request.continues
        document = np.full(count, self._documents - 1, np.int32)
        return TraceRows(whole, document=document, domain=np.zeros(count, np.int16), **columns)

    def notes(self) -> list[str]:
        """Return what the trace lacks, one line each."""
        lacks = {"weight", "margin", "runner_up", "dropped", "token", "loss", "generated"} - (self._columns or set())
        found = [f"the file has no {', '.join(sorted(lacks))}, so the trace has none"]
        if self._unknown:
            have = "token has" if self._unknown == 1 else "tokens have"
            found.append(f"{self._unknown:,} {have} no routing in the file (-1 in the trace)")
        if self._repeated:
            found.append(
                f"{self._repeated:,} rows named an expert twice, which no router does: padding, or not recorded; they "
                "are -1 in the trace"
            )
        return found

    def read(self, requests: Iterable[tuple[str, Request]]) -> Foreign:
        """Return the trace of requests with their places. Raises DataError: there are none, or the first is invalid."""
        several = iter(requests)
        first = next((self.rows(request, place) for place, request in several), None)
        if first is None or self.info is None:
            raise DataError(f"{self._where} has no routing; expected at least one sequence. Record it again.")
        foreign = Foreign(self.info, ())

        def rows() -> Iterator[TraceRows]:
            yield first
            for place, request in several:
                yield self.rows(request, place)
            foreign.notes += self.notes()

        foreign.rows = rows()
        return foreign


def checked_experts(expert: IntegerArray, info: TraceInfo, where: str) -> tuple[NDArray[np.int16], int]:
    """Return experts [T, L, K] as int16, and how many rows named an expert twice, which become -1.

    Raises DataError: a value that is neither -1 nor an expert of its layer.
    """
    count_L = np.array(info.num_experts)[:, None]
    wrong = (expert < -1) | (expert >= count_L)
    if wrong.any():
        token, layer, slot = (int(index) for index in np.argwhere(wrong)[0])
        raise DataError(
            f"{where} sends token {token} to expert {expert[token, layer, slot]} in layer {info.layers[layer]}; "
            f"expected -1 or one of {info.num_experts[layer]} experts. Use the model that routed."
        )
    ordered = np.sort(expert, axis=-1)
    repeated = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(-1)
    return np.where(repeated[..., None], -1, expert).astype(np.int16), int(repeated.sum())


def checked_tokens(tokens: Sequence[int] | IntegerArray, count: int, where: str) -> NDArray[np.int32]:
    """Return token ids as int32 [count]. Raises DataError: not ids, or another number of them."""
    if isinstance(tokens, np.ndarray):
        wrong = tokens[(tokens < 0) | (tokens > _MAX_TOKEN)].tolist()
    else:
        wrong = [token for token in tokens if type(token) is not int or not 0 <= token <= _MAX_TOKEN]
    if wrong or len(tokens) != count:
        got = f"the token id {shown(wrong[0], 60)}" if wrong else f"{len(tokens)} token ids for {count} tokens"
        raise DataError(f"{where} has {got}; expected a token id, from 0, for each token. Record it again.")
    return np.asarray(tokens, np.int32)


def documents(trace: RoutingTrace) -> Iterator[TraceRows]:
    """Yield the rows of each document of a trace; the whole trace if it has no column of documents."""
    parts: list[TraceRows] = []
    for chunk in trace.chunks():
        number = chunk.document
        borders = [] if number is None else (np.flatnonzero(np.diff(number)) + 1).tolist()
        for first, last in zip([0, *borders], [*borders, len(chunk)], strict=True):
            piece = TraceRows(**{name: column[first:last] for name, column in chunk.columns.items()})
            before = parts[-1].document if parts else None
            if before is not None and piece.document is not None and before[-1] != piece.document[0]:
                yield _joined(parts)
                parts = []
            parts.append(piece)
    if parts:
        yield _joined(parts)


def document_lengths(trace: RoutingTrace) -> list[int]:
    """Return the number of tokens of each document."""
    if not trace.has("document"):
        return [trace.num_tokens]
    borders = (np.flatnonzero(np.diff(trace.column("document"))) + 1).tolist()
    return [last - first for first, last in itertools.pairwise([0, *borders, trace.num_tokens])]


def _joined(parts: list[TraceRows]) -> TraceRows:
    names = parts[0].columns
    return TraceRows(**{name: np.concatenate([part.columns[name] for part in parts]) for name in names})


def lost(trace: RoutingTrace, kept: Iterable[str], writer: str) -> list[str]:
    """Return a note about the columns of a trace that a format has no place for; none if it keeps all."""
    names = [name for name in trace.source.shapes if name not in {"expert", *kept}]
    return [f"{writer}'s format has no place for: {', '.join(sorted(names))}"] if names else []


def all_layers(expert: NDArray[np.int16], layers: Layers, depth: int, dense: int) -> NDArray[np.int16]:
    """Return experts [T, depth, K] of all layers: those of the MoE layers, and `dense` in the others."""
    whole = np.full((len(expert), depth, expert.shape[2]), dense, np.int16)
    whole[:, layers] = expert
    return whole


def checked_trace(info: TraceInfo, rows: TraceRows, where: str) -> TraceRows:
    """Return rows whose shapes and values have been checked. Raises DataError."""
    return trace_of(info, rows, where=where).rows()
