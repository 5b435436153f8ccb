"""A routing trace: for each token and MoE layer, the chosen experts, their weights and how near the choice was.

Dimensions: N tokens, L MoE layers, K experts per token (the most of any layer). Writing: writings/traces.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from moezoo.core.errors import DataError
from moezoo.core.tokens import Column, Floats, Integers

COLUMNS: Mapping[str, tuple[type[np.generic], str]] = {
    "expert": (np.int16, "NLK"),
    "weight": (np.float32, "NLK"),
    "dropped": (np.uint8, "NLK"),
    "margin": (np.float32, "NL"),
    "runner_up": (np.int16, "NL"),
    "token": (np.int32, "N"),
    "loss": (np.float32, "N"),
    "document": (np.int32, "N"),
    "domain": (np.int16, "N"),
    "generated": (np.uint8, "N"),
}
"""Dtype and axes of each column. `expert` is always there; the others may be missing in a trace of another program."""

_CHUNK_TOKENS = 4096


class TraceInfo(BaseModel):
    """Description of a trace, stored in the metadata of its file.

    Fields:
        layers: index in the model of each traced MoE layer.
        num_experts: number of experts of each, zero-computation experts included.
        domains: names of the texts that the tokens come from; `domain` has their indices.
        sequence_length: tokens per window of the forward passes; None if unknown.
        inference: routed as in generation; else as in training, without noise.
        model, backend, compute: path or hub id, backend, and dtype of activations; None if unknown.
        spec_sha256, weights_sha256: hashes of the ModelSpec and of the weights; None if unknown.
        written_by: the program that wrote the routing: `moezoo`, or the name of a foreign format.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[int, ...] = Field(min_length=1)
    num_experts: tuple[int, ...]
    domains: tuple[str, ...] = ("text",)
    sequence_length: int | None = None
    inference: bool = False
    model: str | None = None
    spec_sha256: str | None = None
    weights_sha256: str | None = None
    backend: str | None = None
    compute: str | None = None
    written_by: str = "moezoo"

    @model_validator(mode="after")
    def _consistent(self) -> "TraceInfo":
        if len(self.num_experts) != len(self.layers) or not all(0 < count <= 2**15 for count in self.num_experts):
            raise ValueError(f"num_experts has {len(self.num_experts)} counts for {len(self.layers)} layers")
        if list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"layers {list(self.layers)!s:.80} are not ascending indices")
        return self


@dataclass(frozen=True)
class TraceRows:
    """Columns of consecutive tokens. A column that the trace lacks is None.

    Fields:
        expert: int16 [N, L, K], by falling weight; -1 in an unused slot. A row that is all -1 is of a token whose
            routing is unknown (it was not recorded), or if it has a runner-up, of one that went to no expert.
        weight: float32 [N, L, K], combine weights; 0 in an unused slot and for a dropped assignment.
        dropped: uint8 [N, L, K], 1 for an assignment beyond its expert's capacity.
        margin: float32 [N, L], gap between the last chosen expert and the best one not chosen, as a share
            (`core.reference.choice.Choice.margin_P`); infinite where there was no other choice.
        runner_up: int16 [N, L], the best expert not chosen; -1 where there is none.
        token: int32 [N], ids of the tokens.
        loss: float32 [N], nats of predicting this token from those before it; NaN for a token without a prediction.
        document: int32 [N], number of the document, ascending.
        domain: int16 [N], index into `TraceInfo.domains`.
        generated: uint8 [N], 1 for a token that the model generated.
    """

    expert: Column
    weight: Floats | None = None
    dropped: Column | None = None
    margin: Floats | None = None
    runner_up: Column | None = None
    token: Integers | None = None
    loss: Floats | None = None
    document: Integers | None = None
    domain: Column | None = None
    generated: Column | None = None

    @property
    def columns(self) -> dict[str, Column]:
        """The columns that are there, by name."""
        found = {name: getattr(self, name) for name in COLUMNS}
        return {name: column for name, column in found.items() if column is not None}

    def __len__(self) -> int:
        return len(self.expert)


class ColumnReader(Protocol):
    """Source of a trace's columns: arrays, or a file that is read in parts."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, first: int, last: int) -> Column:
        """Return the rows first, ..., last - 1 of a column."""
        ...


@dataclass(frozen=True)
class _Arrays:
    """Columns in memory."""

    columns: Mapping[str, Column]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: column.shape for name, column in self.columns.items()}

    def read(self, name: str, first: int, last: int) -> Column:
        return self.columns[name][first:last]


@dataclass(frozen=True)
class RoutingTrace:
    """A routing trace, in memory (`trace_of`) or in a file (`trace_file.open_trace`), whose rows are read in parts.

    Fields:
        info: layers, experts, domains and origin.
        source: the columns.
        texts: text by token id, of the ids that occur; empty if unknown.
        where: the file, for errors.
    """

    info: TraceInfo
    source: ColumnReader
    texts: Mapping[int, str] = field(default_factory=dict)
    where: str = "the trace"

    def __post_init__(self) -> None:
        """Check names and shapes of the columns. Raises DataError."""
        shapes = dict(self.source.shapes)
        if "expert" not in shapes or len(shapes["expert"]) != 3 or shapes["expert"][1] != len(self.info.layers):
            raise DataError(
                f"{self.where} has `expert` of shape {list(shapes.get('expert', ()))}; expected [tokens, "
                f"{len(self.info.layers)} layers, top_k]. Record or convert it again."
            )
        sizes = dict(zip("NLK", shapes["expert"], strict=True))
        for name, shape in shapes.items():
            if name not in COLUMNS or shape != tuple(sizes[axis] for axis in COLUMNS[name][1]):
                wanted = [sizes[axis] for axis in COLUMNS[name][1]] if name in COLUMNS else "no such column"
                raise DataError(
                    f"{self.where} has {name!r:.80} of shape {list(shape)!s:.80}; expected {wanted}. Record or "
                    "convert it again."
                )

    @property
    def num_tokens(self) -> int:
        """N, number of tokens."""
        return self.source.shapes["expert"][0]

    @property
    def num_layers(self) -> int:
        """L, number of MoE layers."""
        return len(self.info.layers)

    @property
    def top_k(self) -> int:
        """K, experts per token."""
        return self.source.shapes["expert"][2]

    def has(self, name: str) -> bool:
        """Return whether the trace has a column."""
        return name in self.source.shapes

    def require(self, *names: str, purpose: str) -> None:
        """Check that the trace has the columns that a purpose needs. Raises DataError."""
        missing = [name for name in names if not self.has(name)]
        if missing:
            raise DataError(
                f"{self.where} has no {', '.join(missing)}, which {purpose} needs (written by {self.info.written_by}); "
                "expected a trace with it. Record one with `moezoo trace`."
            )

    def rows(self, first: int = 0, last: int | None = None) -> TraceRows:
        """Return the columns of the tokens first, ..., last - 1; all by default. Raises DataError: invalid values."""
        last = self.num_tokens if last is None else min(last, self.num_tokens)
        read = {name: self.column(name, first, last) for name in COLUMNS if self.has(name)}
        return TraceRows(**read)

    def column(self, name: str, first: int = 0, last: int | None = None) -> Column:
        """Return a column of the tokens first, ..., last - 1; all by default.

        Raises DataError: the trace has no such column, or it has invalid values.
        """
        self.require(name, purpose="this")
        values = self.source.read(name, first, self.num_tokens if last is None else min(last, self.num_tokens))
        self._check(name, values)
        return values

    def chunks(self, size: int = _CHUNK_TOKENS) -> Iterator[TraceRows]:
        """Yield all rows in order, `size` tokens at a time."""
        for first in range(0, self.num_tokens, size):
            yield self.rows(first, first + size)

    def text(self, token: int) -> str:
        """Return the text of a token id; `<id>` if it is unknown."""
        return self.texts.get(token, f"<{token}>")

    def renamed(self, where: str) -> "RoutingTrace":
        """Return the trace with another name for errors."""
        return replace(self, where=where)

    def _check(self, name: str, values: Column) -> None:
        """Check the values of a column, which a file of another program may have wrong. Raises DataError."""
        if name in ("expert", "runner_up"):
            count_L = np.array(self.info.num_experts)
            wrong = (values < -1) | (values >= (count_L[:, None] if name == "expert" else count_L))
            expected = "-1 or an expert of its layer"
        elif name in ("dropped", "generated"):
            wrong, expected = values > 1, "0 or 1"
        elif name == "domain":
            wrong, expected = (values < 0) | (values >= len(self.info.domains)), f"one of {len(self.info.domains)}"
        elif name in ("token", "document"):
            wrong, expected = values < 0, "0 or more"
        elif name == "weight":
            wrong, expected = ~np.isfinite(values), "a finite number"
        else:
            return
        if wrong.any():
            place = tuple(int(index) for index in np.argwhere(wrong)[0])
            raise DataError(
                f"{self.where} has {name}[{', '.join(map(str, place))}] = {values[place]}; expected {expected}. Record "
                "or convert it again."
            )


def trace_of(
    info: TraceInfo, rows: TraceRows, texts: Mapping[int, str] | None = None, where: str = "the trace"
) -> RoutingTrace:
    """Return a trace of rows in memory; columns get their dtype. Raises DataError: shapes that do not match."""
    columns = {name: np.asarray(column, COLUMNS[name][0]) for name, column in rows.columns.items()}
    return RoutingTrace(info, _Arrays(columns), texts or {}, where)
