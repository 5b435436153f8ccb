"""The report of a parity check: every comparison as data, one line per failure, and a table for the terminal."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from moezoo.core.parameters.precision import compute_dtype
from moezoo.core.parity.causality import Causality, Mode
from moezoo.core.spec import ModelSpec

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.measure import Measurement
    from rich.table import Table

Kind = Literal["weights", "intermediate", "logits", "loss", "gradient", "update", "moment", "step"]
KINDS: dict[Kind, str] = {
    "weights": "weights as exported",
    "intermediate": "intermediates",
    "logits": "logits",
    "loss": "loss terms",
    "gradient": "gradients",
    "update": "parameter updates",
    "moment": "optimizer moments",
    "step": "step metrics",
}


@dataclass(frozen=True)
class ParityTolerances:
    """Tolerances of a parity check, relative to the largest absolute value of the reference's tensor unless noted.

    Fields:
        intermediate: for every recorded intermediate.
        logits: for the logits.
        loss: for every loss term and the step's gradient norm, relative to its value.
        gradient: for every gradient, and every optimizer moment after the step.
        gradient_floor: lower limit of a gradient's scale, as a share of the largest gradient of any tensor: a gradient
            that is zero in exact arithmetic (a router with K = 1 and renormalized weights, a key bias without
            positions) consists of rounding only. Also for first moments; squared for second moments.
        update: for a parameter's update, in units of the learning rate, beyond one unit in the last place of the
            float32 parameter per float32 side.
        margin: free routing may choose other experts if the gap between the last chosen and the first rejected score is
            at most this share of the former (for softmax, nearly the gap of the logits).
        load: share of assignments for which the step may use other experts than the forward pass.
        reason: why these values.
    """

    intermediate: float = 1e-5
    logits: float = 1e-5
    loss: float = 1e-5
    gradient: float = 2e-5
    gradient_floor: float = 1e-3
    update: float = 1e-4
    margin: float = 2e-4
    load: float = 0.0
    reason: str = (
        "float32: about ten times what 6 layers of 16 experts measure (intermediates 9.5e-7, logits 5.7e-7, loss terms "
        "and gradient norm 1.1e-6, gradients 1.7e-6, updates 2.5e-6); margin: 20 times the logits' tolerance"
    )

    @classmethod
    def of(cls, spec: ModelSpec) -> "ParityTolerances":
        """Return the tolerances for the spec's compute dtype."""
        if compute_dtype(spec) == "float32":
            return cls()
        return cls(
            intermediate=5e-2,
            logits=5e-2,
            loss=5e-3,
            gradient=1e-1,
            update=5e-2,
            margin=3e-2,
            load=2e-2,
            reason=(
                "bfloat16 has 8 bits of precision, so one rounding is 2^-9 = 2e-3 relative, and the frameworks round "
                "in different places; three to ten times what 6 layers of 16 experts measure (intermediates 1.5e-2, "
                "logits 8.6e-3, gradient norm 4e-4, gradients 3.1e-2, updates 1.5e-2, differing choices 3.3e-3)"
            ),
        )

    def widened(self, moved: Mapping[str, float]) -> "ParityTolerances":
        """Return tolerances of at least ten times the effect of one rounding (`Reference.rounding_sensitivity`)."""
        intermediate, logits, gradient = (
            max(getattr(self, name), 10 * moved[name]) for name in ("intermediate", "logits", "gradient")
        )
        margin = max(self.margin, 20 * logits)
        return replace(self, intermediate=intermediate, logits=logits, gradient=gradient, margin=margin)


@dataclass(frozen=True)
class Comparison:
    """Comparison of one tensor or number on two sides.

    Fields:
        pair: `left/right`.
        kind: see KINDS.
        name: of the tensor or number.
        absolute: largest absolute difference.
        relative: the difference that is compared with `tolerance`.
        tolerance: limit of `relative`.

    Both differences are infinite if one side lacks the tensor or has another shape, and NaN if a value is NaN.
    """

    pair: str
    kind: Kind
    name: str
    absolute: float
    relative: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """True if the difference is within the tolerance; NaN is not."""
        return self.relative <= self.tolerance

    @property
    def excess(self) -> float:
        """The difference in units of the tolerance, to sort by severity. NaN counts as infinite."""
        if self.passed and self.tolerance == 0:
            return 0.0
        excess = self.relative / self.tolerance if self.tolerance else math.inf
        return math.inf if math.isnan(excess) else excess


@dataclass(frozen=True)
class RoutingComparison:
    """Comparison of free routing in one MoE layer on two sides.

    Fields:
        pair: `left/right`.
        layer: index in the model.
        tokens: P, number of tokens.
        identical: tokens with the same set of experts.
        downstream: differing tokens that an earlier difference can have affected; they are not judged.
        margin: the largest gap between the last chosen and the first rejected score of the reference, as a share of the
            former, over the differing tokens that are not downstream; None if there are none.
        tolerance: limit of the margin.
    """

    pair: str
    layer: int
    tokens: int
    identical: int
    downstream: int
    margin: float | None
    tolerance: float

    @property
    def share(self) -> float:
        """Share of tokens with the same set of experts."""
        return self.identical / self.tokens

    @property
    def passed(self) -> bool:
        """True if every difference is a near tie, or downstream of one."""
        return self.margin is None or self.margin <= self.tolerance


@dataclass(frozen=True)
class ParityReport:
    """All comparisons of a parity check.

    Fields:
        where: path or name of the model.
        batch_size, sequence_length: B and T of the tokens.
        pairs: every two sides as `left/right`; the reference is always on the left.
        facts: per backend, its device and implementation choices.
        routing: comparisons of free routing, per pair and MoE layer.
        comparisons: all other comparisons, with forced routing, in the order of computation.
        first_difference: per pair, the first intermediate beyond its tolerance in the order of the forward pass.
        tolerances: those applied.
        notes: assumptions, and where the weights come from.
        causality: causality checks of every side.
    """

    where: str
    batch_size: int
    sequence_length: int
    pairs: tuple[str, ...]
    facts: Mapping[str, Mapping[str, str]]
    routing: tuple[RoutingComparison, ...]
    comparisons: tuple[Comparison, ...]
    first_difference: Mapping[str, str | None]
    tolerances: ParityTolerances
    notes: tuple[str, ...] = ()
    causality: tuple[Causality, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """One line per failure: per pair the first differing intermediate, routing, then the worst of each kind."""
        lines: list[str] = []
        for pair in self.pairs:
            failed = [row for row in self.comparisons if row.pair == pair and not row.passed]
            for row in failed:
                if row.name == self.first_difference[pair] and row.kind == "intermediate":
                    lines.append(f"{pair}: the first intermediate that differs is {_sentence(row)}")
            for routing in self.routing:
                if routing.pair == pair and not routing.passed:
                    lines.append(
                        f"{pair}: layers.{routing.layer}.moe chose other experts for "
                        f"{routing.tokens - routing.identical} of {routing.tokens} tokens, with a score "
                        f"margin of up to {routing.margin:.1e} (tolerance {routing.tolerance:.0e})"
                    )
            for kind in KINDS:
                of_kind = [row for row in failed if row.kind == kind]
                if of_kind and kind != "intermediate":
                    worst = max(of_kind, key=lambda row: row.excess)
                    lines.append(f"{pair}: {len(of_kind)} of {KINDS[kind]} differ, worst {_sentence(worst)}")
        for check in self.causality:
            if not check.passed:
                lines.append(f"{check.side}: {check.mode} is not causal; {_leak(check)}")
        return tuple(lines)

    @property
    def passed(self) -> bool:
        """True if everything is within its tolerance."""
        checks: tuple[Comparison | RoutingComparison | Causality, ...] = (
            *self.comparisons,
            *self.routing,
            *self.causality,
        )
        return all(check.passed for check in checks)

    def causal(self, mode: Mode) -> str | None:
        """Return `causal`, or describe the first leak of the first side that has one; None if it was not checked."""
        checks = [check for check in self.causality if check.mode == mode]
        leaks = [check for check in checks if check.first_leak is not None]
        return _leak(leaks[0]) if leaks else "causal" if checks else None

    def worst(self, pair: str, kind: Kind) -> Comparison | None:
        """Return the comparison of a kind with the largest difference relative to its tolerance."""
        rows = [row for row in self.comparisons if row.pair == pair and row.kind == kind]
        return max(rows, key=lambda row: row.excess) if rows else None

    def to_json(self) -> str:
        """Return the report as JSON text; infinities and NaN are the strings "inf" and "nan"."""
        content = {
            "where": self.where,
            "passed": self.passed,
            "failures": self.failures,
            "first_difference": dict(self.first_difference),
            "notes": self.notes,
            "batch_size": self.batch_size,
            "sequence_length": self.sequence_length,
            "pairs": self.pairs,
            "facts": {name: dict(facts) for name, facts in self.facts.items()},
            "tolerances": asdict(self.tolerances),
            "routing": [{**asdict(row), "share": row.share, "passed": row.passed} for row in self.routing],
            "causality": [{**asdict(check), "passed": check.passed} for check in self.causality],
            "comparisons": [{**asdict(row), "passed": row.passed} for row in self.comparisons],
        }
        return json.dumps(json_safe(content), indent=2, allow_nan=False)

    def table(self, show_all: bool = False) -> "RenderableType":
        """Return the report for a terminal, worst rows first; `show_all` adds every intermediate, loss and gradient."""
        from rich.console import Group
        from rich.text import Text

        verdict = Text("agree", "bold green") if self.passed else Text("differ", "bold red")
        sides = ", ".join(["float64 reference", *self.facts])
        title = Text.assemble((self.where, "bold"), f": {sides} ", verdict)
        title.append(f"   {self.batch_size} x {self.sequence_length} tokens", "dim")
        parts: list[RenderableType] = [title, self._summary()]
        if self.routing:
            parts.append(self._routing_table())
        parts.extend(self._causality_lines())
        if show_all:
            shown: tuple[Kind, ...] = ("intermediate", "loss", "gradient", "update")
            parts.extend(self._details(kind) for kind in shown)
        parts.extend(Text(f"note: {note}", "dim") for note in self.notes)
        parts.extend(Text(f"FAILED {line}", "red") for line in self.failures)
        return Group(*parts)

    def _summary(self) -> "Table":
        table = _table("largest\ndifference", *self.pairs, "limit", "worst at")
        rows = []
        for kind, name in KINDS.items():
            worst = [found for pair in self.pairs if (found := self.worst(pair, kind))]
            if worst:
                rows.append((max(worst, key=lambda row: row.excess), name, kind))
        for worst_row, name, kind in sorted(rows, key=lambda row: -row[0].excess):
            cells = [_cell(self.worst(pair, kind)) for pair in self.pairs]
            table.add_row(name, *cells, f"{worst_row.tolerance:.0e}", _Name(worst_row.name))
        return table

    def _routing_table(self) -> "Table":
        table = _table("free routing:\nsame experts", *self.pairs, "largest margin\nof a difference")
        rows: dict[int, list[RoutingComparison]] = {}
        for row in self.routing:
            rows.setdefault(row.layer, []).append(row)
        for layer, of_layer in sorted(rows.items(), key=lambda item: min(row.share for row in item[1])):
            margins = [row.margin for row in of_layer if row.margin is not None]
            shares = [f"[{'green' if row.passed else 'bold red'}]{_share(row)}" for row in of_layer]
            table.add_row(f"layers.{layer}.moe", *shares, f"{max(margins):.1e}" if margins else "")
        return table

    def _causality_lines(self) -> Iterable["RenderableType"]:
        from rich.text import Text

        for mode in ("inference", "training"):
            verdict = self.causal(mode)
            if verdict is not None:
                good = "green" if verdict == "causal" else "yellow" if mode == "training" else "bold red"
                yield Text.assemble(f"{mode}: ", (verdict, good))

    def _details(self, kind: Kind) -> "Table":
        table = _table(KINDS[kind], *self.pairs, "largest\nabsolute")
        rows: dict[str, dict[str, Comparison]] = {}
        for row in self.comparisons:
            if row.kind == kind:
                rows.setdefault(row.name, {})[row.pair] = row
        in_order: Iterable[tuple[str, dict[str, Comparison]]] = rows.items()
        if kind != "intermediate":  # intermediates stay in the order of the forward pass
            in_order = sorted(rows.items(), key=lambda item: -max(row.excess for row in item[1].values()))
        for name, by_pair in in_order:
            largest = max(row.absolute for row in by_pair.values())
            table.add_row(_Name(name), *[_cell(by_pair.get(pair)) for pair in self.pairs], f"{largest:.1e}")
        return table


def _leak(check: Causality) -> str:
    return f"{check.first_leak} depends on later tokens or other sequences ({check.side}, changes by {check.moved:.1e})"


def _sentence(row: Comparison) -> str:
    if math.isinf(row.relative):
        return f"{row.name}: missing on one side, of another shape, or infinite"
    unit = " learning rates" if row.kind == "update" else ""
    return f"{row.name}: {row.relative:.1e}{unit} (tolerance {row.tolerance:.0e}; absolute {row.absolute:.1e})"


def json_safe(content: Any) -> Any:
    """Convert nested values for JSON: infinities and NaN become strings."""
    match content:
        case float() if not math.isfinite(content):
            return str(content)
        case dict():
            return {name: json_safe(value) for name, value in content.items()}
        case list() | tuple():
            return [json_safe(value) for value in content]
    return content


def _table(first: str, *others: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column(first)
    for name in others:
        is_name = name == "worst at"
        heading = name.replace("/", "\n/ ")
        table.add_column(heading, justify="left" if is_name else "right", no_wrap=not is_name)
    return table


def _cell(row: Comparison | None) -> str:
    if row is None:
        return ""
    text = "0" if row.relative == 0 else f"{row.relative:.1e}"
    return f"[green]{text}" if row.passed else f"[bold red]{text}"


def _share(row: RoutingComparison) -> str:
    return "all" if row.identical == row.tokens else f"{row.identical} of {row.tokens}"


class _Name:
    """The name of a tensor in a table, which breaks after dots and underscores where the terminal is narrow."""

    def __init__(self, name: str):
        self._pieces = re.findall(r"[^._]*[._]|[^._]+$", name)

    def __rich_measure__(self, console: "Console", options: "ConsoleOptions") -> "Measurement":
        from rich.measure import Measurement

        return Measurement(max(map(len, self._pieces)), sum(map(len, self._pieces)))

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> Iterable["RenderableType"]:
        from rich.text import Text

        lines = [""]
        for piece in self._pieces:
            if len(lines[-1]) + len(piece) > options.max_width:
                lines.append("")
            lines[-1] += piece
        yield Text("\n".join(line for line in lines if line))


def names_in_order(first: Sequence[str], others: Iterable[str]) -> list[str]:
    """Return `first`, then the names of `others` that are not in it."""
    return list(dict.fromkeys([*first, *others]))
