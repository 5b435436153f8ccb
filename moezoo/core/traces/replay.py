"""Replay a routing trace: the experts to force for the tokens of a batch.

The choice is replayed; weights are computed from live logits, so the router keeps its gradient (rollout routing replay,
R3). A token that the trace does not have, or whose routing it does not know, is routed freely.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moezoo.core.backend import checked_tokens
from moezoo.core.data.batch import NOWHERE, Positions
from moezoo.core.errors import DataError
from moezoo.core.spec import ModelSpec, SparseMixerChoiceSpec
from moezoo.core.tokens import NOT_REPLAYED, UNUSED, Integers
from moezoo.core.traces.places import Places, runs
from moezoo.core.traces.trace import RoutingTrace


def forced_routing(
    spec: ModelSpec,
    expert: NDArray[np.signedinteger],
    where: str = "the routing to replay",
    runner_up: NDArray[np.signedinteger] | None = None,
) -> list[Integers]:
    """Return experts [..., L, K] as forced routing: int32 [..., K] per MoE layer, K as the layer has slots.

    A row of -1 is routed freely; but with a runner-up it is of a token that went to no expert, and goes to none.

    Raises DataError: the numbers of layers, experts or slots do not fit.
    """
    layers = spec.moes
    if expert.ndim < 2 or expert.shape[-2] != len(layers):
        raise DataError(
            f"{where} is {list(expert.shape)}; expected [..., {len(layers)} MoE layers, experts per token]. Use the "
            "routing of this model."
        )
    found = []
    for index, (layer, moe) in enumerate(layers):
        if isinstance(moe.router.choice, SparseMixerChoiceSpec):
            raise DataError(
                f"layer {layer} of the model has choice sparsemixer, whose experts are drawn one after the other: a "
                "trace has them by weight, so it cannot be replayed. Use another model."
            )
        own = expert[..., index, :].astype(np.int32)
        kept, rest = own[..., : moe.num_slots], own[..., moe.num_slots :]
        if own.size and (own.max() >= moe.num_choices or (rest != UNUSED).any()):
            got = f"expert {own.max()}" if own.max() >= moe.num_choices else f"{own.shape[-1]} experts for a token"
            raise DataError(
                f"{where} has {got} in layer {layer}; expected {moe.num_slots} of {moe.num_choices} experts. Use the "
                "routing of this model."
            )
        forced = np.full((*own.shape[:-1], moe.num_slots), UNUSED, np.int32)
        forced[..., : kept.shape[-1]] = kept
        unknown = (own == UNUSED).all(axis=-1)
        if runner_up is not None:
            unknown &= runner_up[..., index] < 0
        forced[unknown] = NOT_REPLAYED
        found.append(forced)
    return found


class Replay:
    """A trace, as forced routing for batches of the data that it was recorded of."""

    def __init__(self, trace: RoutingTrace, spec: ModelSpec, names: Sequence[str] | None = None):
        """`names`: of the sources of the data, to find their domains; None: the domains in their order.

        Raises DataError: the trace is of another model, or its domains are not the sources.
        """
        counts = tuple(moe.num_choices for _, moe in spec.moes)
        if trace.info.num_experts != counts:
            raise DataError(
                f"{trace.where} has {_list(trace.info.num_experts)} experts by layer, but the model has "
                f"{_list(counts) or 'none'}. Use the trace of a model like it."
            )
        trace.require("token", purpose="a replay")
        self._trace, self._spec = trace, spec
        self._names = list(trace.info.domains) if names is None else list(names)
        # Rows of text: what the model generated is no data.
        generated = trace.column("generated") if trace.has("generated") else np.zeros(0, np.uint8)
        self._row_of_text = np.flatnonzero(generated == 0) if generated.any() else None
        domain = trace.column("domain") if trace.has("domain") else np.zeros(trace.num_tokens, np.int16)
        domain = domain if self._row_of_text is None else domain[self._row_of_text]
        self._first = [int(np.searchsorted(domain, k)) for k in range(len(trace.info.domains) + 1)]
        self._domains = [self._domain(name, index) for index, name in enumerate(self._names)]

    def check_sources(self, count: int) -> None:
        """Raise DataError if the data has another number of sources than the trace has domains for."""
        if count != len(self._domains):
            raise DataError(
                f"{self._trace.where} has {len(self._domains)} domains ({', '.join(self._names):.200}), but the data "
                f"has {count} sources. Record a trace of the same data."
            )

    def forced(self, positions: Positions, tokens: Integers) -> list[Integers]:
        """Return the experts of tokens [n, T] at these positions: int32 [n, T, K] per MoE layer.

        Raises DataError: a token is another one in the trace.
        """
        return self.forced_rows(self._rows(positions), tokens)

    def forced_rows(self, rows: Places, tokens: Integers) -> list[Integers]:
        """Return the experts of tokens [n, T] in these rows of the trace, or NOWHERE; as `forced`."""
        row = rows.ravel()
        expert = np.full((row.size, self._trace.num_layers, self._trace.top_k), UNUSED, np.int16)
        runner_up = np.full((row.size, self._trace.num_layers), UNUSED, np.int16)
        for first, last in runs(row):
            start, stop = int(row[first]), int(row[first]) + last - first
            self._check_tokens(tokens.ravel()[first:last], self._trace.column("token", start, stop), start)
            expert[first:last] = self._trace.column("expert", start, stop)
            if self._trace.has("runner_up"):
                runner_up[first:last] = self._trace.column("runner_up", start, stop)
        expert, runner_up = (values.reshape(*tokens.shape, *values.shape[1:]) for values in (expert, runner_up))
        return forced_routing(self._spec, expert, self._trace.where, runner_up)

    def _rows(self, positions: Positions) -> Places:
        """Return the row of each token; NOWHERE if it has none."""
        domain = np.array(self._domains)[positions.source]
        first, end = np.array(self._first)[domain][:, None], np.array(self._first)[domain + 1][:, None]
        text = first + positions.place
        known = (positions.place != NOWHERE) & (text < end)
        if self._row_of_text is None:
            return np.where(known, text, NOWHERE)
        return np.where(known, self._row_of_text[np.where(known, text, 0)], NOWHERE)

    def _check_tokens(self, tokens: Integers, traced: Integers, start: int) -> None:
        wrong = np.flatnonzero(tokens != traced)
        if len(wrong):
            length = self._trace.info.sequence_length
            raise DataError(
                f"{self._trace.where} has token {traced[wrong[0]]} in row {start + wrong[0]}, where the data has "
                f"{tokens[wrong[0]]}; expected the same tokens. Use the data that the trace was recorded of"
                + (f", with sequences of {length} tokens." if length else ".")
                + self._about_documents()
            )

    def _about_documents(self) -> str:
        """Return what to know about documents if a trace was continued: only these are always separate."""
        return "" if self._row_of_text is None else " It has generated tokens, so its documents are separate."

    def _domain(self, name: str, index: int) -> int:
        domains = self._trace.info.domains
        if name in domains:
            return domains.index(name)
        if len(domains) != len(self._names):
            raise DataError(
                f"{self._trace.where} has no domain {name!r:.80}; it has {', '.join(domains):.200}. Name the file as "
                "its domain, or record a trace of it alone."
            )
        return index


def forced_for(replay: RoutingTrace | Integers, spec: ModelSpec, tokens: Integers) -> list[Integers]:
    """Return forced routing of tokens [B, T] from experts [B, T, L, K], or from a trace whose first rows they are.

    Rows that the model generated count too. Raises DataError: as `forced_routing` and Replay.
    """
    if isinstance(replay, RoutingTrace):
        row = np.arange(tokens.size)
        rows = np.where(row < replay.num_tokens, row, NOWHERE).reshape(tokens.shape)
        return Replay(replay, spec).forced_rows(rows, tokens)
    expert = np.asarray(replay)
    if expert.dtype.kind not in "iu" or expert.shape[:2] != tokens.shape:
        raise DataError(
            f"replay is {expert.dtype} {list(expert.shape)} for tokens {list(tokens.shape)}; expected integers "
            "[B, T, layers, experts per token], or a RoutingTrace. Use the routing of these tokens."
        )
    forced = forced_routing(spec, expert)
    ordered = np.sort(expert, axis=-1)
    wrong = (ordered < UNUSED).any(-1) | ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(-1)
    if wrong.any():
        got = expert[wrong][0].tolist()
        raise DataError(
            f"replay sends a token to the experts {got}; expected different ones, or -1. Use what was routed."
        )
    return forced


def replayed_windows(
    trace: RoutingTrace, spec: ModelSpec, batch_size: int, length: int
) -> tuple[Integers, list[Integers]]:
    """Return B windows int32 [B, T + 1] of a trace's first rows, and forced routing of their inputs.

    T is `length`, or less where the trace is shorter. Raises DataError: as Replay, or a token outside the vocabulary.
    """
    length = min(length, (trace.num_tokens - 1) // batch_size)
    if length < 1:
        raise DataError(
            f"{trace.where} has {trace.num_tokens} tokens; expected at least {batch_size + 1}, for {batch_size} "
            "sequences. Record a longer one."
        )
    rows = np.arange(batch_size)[:, None] * length + np.arange(length + 1)
    trace.require("token", purpose="a replay")
    windows = checked_tokens(spec, trace.column("token", 0, int(rows[-1, -1]) + 1)[rows], f"token of {trace.where}")
    return windows, Replay(trace, spec).forced_rows(rows[:, :-1], windows[:, :-1])


def _list(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 and counts else ", ".join(map(str, counts))[:80]
