"""The page of a comparison for the terminal."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moezoo.core.comparison.compare_trace import TraceReport
from moezoo.core.comparison.divergence import Effect
from moezoo.core.comparison.intermediates import PARTS
from moezoo.core.comparison.report import ComparisonReport
from moezoo.core.comparison.routing_changes import RoutingChange
from moezoo.core.comparison.verdict import Verdict
from moezoo.core.errors import counted
from moezoo.core.reports.text import new_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_COLORS = {"equal": "green", "rounding": "green"}
# Columns of the table of parts; the residual stream comes last.
_COLUMNS = {
    "attention": "attention",
    "moe.router.logits": "router",
    "moe.routed": "experts",
    "moe": "MoE",
    "feed_forward": "dense",
    "": "output",
}


def comparison_page(report: ComparisonReport, found: Verdict) -> "RenderableType":
    """Return the verdict, the split of the difference, and tables by layer; for 80 columns."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [
        Text(f"A  {report.a}"),
        Text(f"B  {report.b}"),
        Text(f"{_counts(report)}; loss of A {report.loss:.4f} nats per token", "dim"),
        Text(),
        Text(found.headline, f"bold {_COLORS.get(found.kind, 'yellow')}"),
        *map(Text, found.reasons),
        *(Text(f"The specs differ in {line}.") for line in report.specs),
    ]
    if not report.equal:
        parts += [_split(report)] if report.tokens else []
        if report.routing:
            explained = "arithmetic: both models with A's experts; routing: the rest of the total"
            parts += [Text(explained, "dim")] if report.tokens else []
            parts += [] if report.not_finite else [_routing(report.routing)]
        parts.append(_parts(report))
    return Group(*parts)


def _counts(report: ComparisonReport) -> str:
    tokens, windows = report.tokens + report.not_finite, report.windows
    return f"{counted(tokens, 'token')}, {counted(windows, 'window')}"


def trace_page(report: TraceReport) -> "RenderableType":
    """Return the comparison of a trace with a model; for 80 columns."""
    from rich.console import Group
    from rich.text import Text

    effect = report.routing_effect
    table = new_table("A with", "loss", "change", "KL, nats", "p99", "largest", "same top-1", right=range(1, 7))
    table.add_row("its own experts", f"{report.loss:.4f}")
    numbers = map(_number, (effect.kl.mean, effect.kl.p99, effect.kl.max))
    loss = f"{report.loss + effect.loss:.4f}"
    table.add_row("the trace's", loss, _loss(effect.loss), *numbers, f"{100 * effect.top1:.2f} %")
    return Group(
        Text(f"A      {report.a}"),
        Text(f"trace  {report.trace}"),
        Text(f"{counted(report.replayed, 'token')} with routing", "dim"),
        Text(),
        Text(report.headline, f"bold {'yellow' if report.first_routing else 'green'}"),
        Text("A trace has no logits: the choice of experts is compared, and its effect in A."),
        table,
        _routing(report.routing),
    )


def _split(report: ComparisonReport) -> "Table":
    names = ("KL, nats", "share", "p99", "largest", "same top-1", "loss")
    table = new_table("B from A", *names, right=range(1, len(names) + 1))
    total = report.total.kl.mean

    def share(value: float) -> str:
        return f"{100 * value / total:.0f} %" if total else ""

    def row(name: str, effect: Effect) -> None:
        kl, top1 = effect.kl, f"{100 * effect.top1:.2f} %"
        table.add_row(
            name, _number(kl.mean), share(kl.mean), _number(kl.p99), _number(kl.max), top1, _loss(effect.loss)
        )

    row("total", report.total)
    if not report.routing:  # dense models
        return table
    row("arithmetic", report.arithmetic)
    table.add_row(
        "routing", _number(report.routing_kl), share(report.routing_kl), "", "", "", _loss(report.routing_loss)
    )
    return table


def _routing(layers: Sequence[RoutingChange]) -> "Table":
    names = ("changed", "by itself", "margin of these", "of all")
    table = new_table("experts", *names, right=range(1, 5))
    for layer in layers:
        margins = (_number(spread.median) for spread in (layer.margin, layer.all_margin))
        table.add_row(f"layer {layer.layer}", _share(layer.changed), _share(layer.own), *margins)
    return table


def _parts(report: ComparisonReport) -> "Table":
    """Return relative differences of the intermediates with A's experts, a row per layer."""
    shown = {part: name for part, name in _COLUMNS.items() if any(each.part == PARTS[part] for each in report.parts)}
    found = {(part.layer, part.part): part.relative for part in report.parts}
    table = new_table(
        "with A's experts" if report.routing else "difference", *shown.values(), right=range(1, len(shown) + 1)
    )
    layers = sorted({part.layer for part in report.parts if part.layer is not None})
    outside = [part for part in report.parts if part.layer is None]
    last = [""] * (len(shown) - 1)
    for part in (each for each in outside if each.name == "embedding"):
        table.add_row(part.name, *last, _relative(part.relative))
    for layer in layers:
        values = (found.get((layer, PARTS[part])) for part in shown)
        table.add_row(f"layer {layer}", *("" if value is None else _relative(value) for value in values))
    for part in (each for each in outside if each.name != "embedding"):
        table.add_row(part.name.replace("_", " "), *last, _relative(part.relative))
    return table


def _number(value: float) -> str:
    """Format with three significant digits; nothing for NaN and infinity."""
    if not math.isfinite(value):
        return ""
    return "0" if value == 0 else f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.1e}"


def _loss(value: float) -> str:
    return "0" if value == 0 else f"{value:+.4f}" if abs(value) >= 1e-3 else f"{value:+.1e}"


def _share(value: float) -> str:
    return "0" if value == 0 else f"{100 * value:.2f} %" if value >= 1e-4 else f"{100 * value:.0e} %"


def _relative(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if math.isfinite(value) else "not finite"
