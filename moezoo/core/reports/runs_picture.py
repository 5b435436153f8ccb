"""Picture of `moezoo plot`: losses, balance, drops and speed of runs over each other, and the load of their experts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.core.config.differences import Difference, value_text
from moezoo.core.errors import RunError, shortened
from moezoo.core.files import write_atomically
from moezoo.core.reports.figures import (
    INK,
    PALE,
    RUN_COLORS,
    axes_at,
    draw_load,
    draw_load_colors,
    edges_of,
    load_limit,
    map_gap,
    map_heights,
    new_figure,
    plain_axes,
    png_of,
    set_limits,
    share_steps,
    text_at,
)
from moezoo.core.reports.run_curves import Curve, RunCurves, smoothed
from moezoo.core.reports.run_table import FinishedRun, RunsReport

_LINES, _MARKERS = ("-", (0, (4, 1.5))), "os^DvPX"
MAX_RUNS = len(_LINES) * len(RUN_COLORS)

# inches
_LEFT, _WIDE, _RIGHT = 0.85, 9.6, 0.75
_ROW, _LOSS, _PANEL, _GAP, _AXIS = 0.22, 2.9, 1.25, 0.62, 0.5
_LETTER = 0.075  # of the tables

_COLUMNS = 3  # panels, and runs with heat maps, beside each other
_MAX_FIELDS = 16  # of the configs; the printed table has all


@dataclass(frozen=True)
class _Pen:
    """A run and its line; `scale` times a step is its place on the horizontal axis that all plots share."""

    run: FinishedRun
    color: str
    line: Any
    marker: str
    scale: float

    @property
    def curves(self) -> RunCurves:
        return self.run.curves

    @property
    def x(self) -> Curve:
        """The places of the logged steps."""
        return self.curves.step * self.scale


_Block = tuple[float, Callable[[Any, float], None]]
"""Part of the page: its inches, and the function that draws it below `top` on a figure."""


def draw_runs(report: RunsReport, out: Path) -> None:
    """Draw runs over each other as a PNG.

    From the top: how each run ended; cross-entropy (raw pale, smoothed dark) with validations as points, hollow with
    inference routing; each weighted auxiliary loss, MaxVio, entropy of the load, dropped assignments and speed,
    smoothed, where the line is the mean of the layers and the band spans them; the load of each run's experts; the
    fields in which the configs differ. The horizontal axis is tokens where the runs' batches differ, else steps.

    Raises RunError: more than MAX_RUNS, or a folder that cannot be written.
    """
    if len(report.runs) > MAX_RUNS:
        raise RunError(f"plot got {len(report.runs)} runs; expected at most {MAX_RUNS} in one picture. Name fewer.")
    write_atomically(out, _render(report))


def _render(report: RunsReport) -> bytes:
    pens, axis = _pens(report.runs)
    blocks = [*_loss_blocks(report, pens, axis), *_panel_blocks(pens, axis), *_map_blocks(pens, axis)]
    blocks += _difference_blocks(pens, report.differences)
    with new_figure(_LEFT + _WIDE + _RIGHT, sum(height for height, _ in blocks)) as figure:
        top = 0.0
        for height, draw in blocks:
            draw(figure, top)
            top += height
        return png_of(figure)


def _pens(runs: Sequence[FinishedRun]) -> tuple[list[_Pen], str]:
    """Return the runs with their lines, and the label of the horizontal axis."""
    batches = [float(run.curves.tokens[-1] / run.curves.step[-1]) for run in runs]
    by_tokens = len(set(batches)) > 1 and all(map(math.isfinite, batches))
    pens = [
        _Pen(
            run=run,
            color=RUN_COLORS[place % len(RUN_COLORS)],
            line=_LINES[place // len(RUN_COLORS)],
            marker=_MARKERS[place % len(_MARKERS)],
            scale=batch / 1e6 if by_tokens else 1.0,
        )
        for place, (run, batch) in enumerate(zip(runs, batches, strict=True))
    ]
    return pens, "million tokens" if by_tokens else "step"


# --- losses ----------------------------------------------------------------------------------------------------------


def _loss_blocks(report: RunsReport, pens: Sequence[_Pen], axis: str) -> list[_Block]:
    return [
        (0.3 + _ROW * (len(pens) + 1) + 0.2, partial(_draw_ends, report, pens)),
        (0.25 + _LOSS + _AXIS, partial(_draw_losses, pens, axis)),
    ]


def _draw_ends(report: RunsReport, pens: Sequence[_Pen], figure: Any, top: float) -> None:
    """Draw the table of runs, which is the legend too."""
    columns, rows = report.table()
    name_wide, wide = _WIDE - 0.95 * len(columns), 0.95
    for row, cells in enumerate([columns, *rows]):
        y = top + 0.3 + row * _ROW
        for column, text in enumerate(cells, start=1):
            right = _LEFT + name_wide + column * wide
            text_at(figure, right, y, text, ha="right", va="center", color=INK if row else PALE)
        if row:
            _draw_name(figure, pens[row - 1], _LEFT, y, name_wide)


def _draw_name(figure: Any, pen: _Pen, left: float, top: float, wide: float) -> None:
    """Draw a run's line, marker and name."""
    axes = axes_at(figure, left, top - 0.08, 0.32, 0.16)
    axes.set_axis_off()
    axes.plot([0, 0.5, 1], [0, 0, 0], color=pen.color, linestyle=pen.line, linewidth=1.8)
    axes.plot([0.5], [0], pen.marker, color=pen.color, markersize=4.5)
    axes.set_xlim(-0.05, 1.05)
    name = shortened(pen.run.name, max(8, int((wide - 0.4) / (1.12 * _LETTER))))
    text_at(figure, left + 0.4, top, name, va="center", fontweight="bold", color=pen.color)


def _draw_losses(pens: Sequence[_Pen], axis: str, figure: Any, top: float) -> None:
    """Draw cross-entropy and validation: the whole runs on the left, from the middle of the shortest on the right."""
    wide = 0.58 * _WIDE
    whole = axes_at(figure, _LEFT, top + 0.25, wide, _LOSS)
    late = axes_at(figure, _LEFT + wide + _GAP, top + 0.25, _WIDE - wide - _GAP, _LOSS)
    first, last = _span(pens)
    middle = min(float(pen.x[-1] + pen.x[0]) / 2 for pen in pens)
    hollow = ", hollow with inference routing" if any(np.isfinite(pen.curves.inference).any() for pen in pens) else ""
    for axes, start, title in (
        (whole, first, f"Cross-entropy (lines) and validation (points{hollow}), nats per token"),
        (late, middle, "The same, later steps"),
    ):
        shown: list[float] = []
        for pen in pens:
            shown += _draw_loss(axes, pen, start)
        for optimum in sorted({pen.curves.optimum for pen in pens if pen.curves.optimum is not None}):
            axes.axhline(optimum, color=PALE, linestyle=(0, (5, 3)), linewidth=1.2)
            style: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            label = f"entropy of the source {optimum:.3f}"
            axes.annotate(label, (0.99, optimum), (0, -2), ha="right", va="top", fontsize=7, color=PALE, **style)
            shown.append(optimum)
        set_limits(axes, shown)
        plain_axes(axes)
        share_steps(axes, start, last, 7, whole=axis == "step")
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel(axis)


def _draw_loss(axes: Any, pen: _Pen, start: float) -> list[float]:
    """Draw the losses of a run, and return those that are seen in axes that begin at `start`."""
    curves, checks = pen.curves, pen.curves.validation_step * pen.scale
    smooth = smoothed(curves.cross_entropy)
    axes.plot(pen.x, curves.cross_entropy, color=pen.color, alpha=0.22, linewidth=0.7)
    marker = pen.marker if len(pen.x) == 1 else None  # a line through one point is invisible
    axes.plot(pen.x, smooth, color=pen.color, linestyle=pen.line, linewidth=1.6, marker=marker)
    seen = [*smooth[pen.x >= start]]
    for values, face in ((curves.validation, pen.color), (curves.inference, "white")):
        edge = "white" if face == pen.color else pen.color
        style: Any = {"markersize": 5, "markerfacecolor": face, "markeredgecolor": edge, "markeredgewidth": 0.8}
        shown = checks >= start
        axes.plot(checks[shown], values[shown], pen.marker, zorder=3, clip_on=False, **style)
        seen += [*values[shown]]
    return seen


def _span(pens: Sequence[_Pen]) -> tuple[float, float]:
    """Return both ends of the horizontal axis."""
    edges = [edges_of(pen.x) for pen in pens]
    return min(float(edge[0]) for edge in edges), max(float(edge[-1]) for edge in edges)


# --- panels ----------------------------------------------------------------------------------------------------------


def _panel_blocks(pens: Sequence[_Pen], axis: str) -> list[_Block]:
    """Return the rows of small plots, each of a quantity that at least one run has."""
    terms = dict.fromkeys(name for pen in pens for name in pen.curves.weighted)
    found: list[tuple[str, Callable[[RunCurves], Curve]]] = [
        (f"{name}, weighted", partial(_weighted, name)) for name in terms
    ]
    if any(pen.curves.layers for pen in pens):
        found.append(("MaxVio: largest load over the mean, less 1", lambda curves: curves.max_vio))
        found.append(("Entropy of the load, 1 = balanced", lambda curves: curves.entropy))
    if any((pen.curves.dropped > 0).any() for pen in pens):
        found.append(("Dropped assignments, %", lambda curves: 100 * curves.dropped))
    found.append(("Thousand tokens per second", lambda curves: curves.tokens_per_second[:, None] / 1000))
    starts = range(0, len(found), _COLUMNS)
    return [
        (0.3 + _PANEL + _AXIS, partial(_draw_panels, pens, found[start : start + _COLUMNS], axis)) for start in starts
    ]


def _weighted(name: str, curves: RunCurves) -> Curve:
    """Return a weighted term as [n, 1]; [n, 0] if the run does not have it."""
    values = curves.weighted.get(name)
    return np.zeros((len(curves.step), 0)) if values is None else values[:, None]


def _draw_panels(
    pens: Sequence[_Pen],
    panels: Sequence[tuple[str, Callable[[RunCurves], Curve]]],
    axis: str,
    figure: Any,
    top: float,
) -> None:
    """Draw a row of small plots. Limits leave out the highest hundredth: the first steps, before experts settle."""
    wide = (_WIDE - (_COLUMNS - 1) * _GAP) / _COLUMNS
    for column, (title, values_of) in enumerate(panels):
        axes = axes_at(figure, _LEFT + column * (wide + _GAP), top + 0.3, wide, _PANEL)
        shown: list[float] = []
        for pen in pens:
            values = values_of(pen.curves)
            if not values.shape[1]:
                continue
            smooth = np.stack([smoothed(layer) for layer in values.T], axis=1)
            marker = pen.marker if len(pen.x) == 1 else None
            mean = smooth.mean(axis=1)
            axes.plot(pen.x, mean, color=pen.color, linestyle=pen.line, linewidth=1.3, marker=marker, markersize=3)
            axes.fill_between(pen.x, smooth.min(axis=1), smooth.max(axis=1), color=pen.color, alpha=0.15, linewidth=0)
            known = smooth[np.isfinite(smooth)]
            shown += [known.min(), np.percentile(known, 99)] if len(known) else []
        set_limits(axes, shown)
        plain_axes(axes)
        share_steps(axes, *_span(pens), 4, whole=axis == "step")
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel(axis, fontsize=7.5)
        axes.tick_params(labelsize=7.5)


# --- heat maps -------------------------------------------------------------------------------------------------------


def _map_blocks(pens: Sequence[_Pen], axis: str) -> list[_Block]:
    """Return rows of heat maps: runs beside each other, the layers of a run below each other."""
    drawn = [pen for pen in pens if pen.curves.load]
    limit, span = load_limit([load for pen in drawn for load in pen.curves.load]), _span(pens)
    rows = [drawn[start : start + _COLUMNS] for start in range(0, len(drawn), _COLUMNS)]
    columns = min(len(drawn), _COLUMNS)
    tallest = [max(sum(heights) + map_gap(len(heights)) * len(heights) for heights in _heights(row)) for row in rows]
    return [
        (0.6 + tall + _AXIS, partial(_draw_maps, row, columns, limit, span, axis))
        for row, tall in zip(rows, tallest, strict=True)
    ]


def _heights(pens: Sequence[_Pen]) -> list[list[float]]:
    return [map_heights([load.shape[1] for load in pen.curves.load]) for pen in pens]


def _draw_maps(
    pens: Sequence[_Pen], columns: int, limit: float, span: tuple[float, float], axis: str, figure: Any, top: float
) -> None:
    text_at(figure, _LEFT, top + 0.2, "Load of each expert, 1 = balanced", va="center")
    wide = (_WIDE - (columns - 1) * _GAP) / columns
    mesh: Any = None
    for column, (pen, heights) in enumerate(zip(pens, _heights(pens), strict=True)):
        left, below = _LEFT + column * (wide + _GAP), top + 0.6
        _draw_name(figure, pen, left, top + 0.44, wide)
        for layer, load, height in zip(pen.curves.layers, pen.curves.load, heights, strict=True):
            axes = axes_at(figure, left, below, wide, height)
            mesh = draw_load(axes, pen.x, load, limit, height)
            name = f"layer {layer}" if column == 0 else f"{layer}"
            axes.text(-0.24 / wide, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize=8)
            share_steps(axes, *span, 4 if columns > 1 else 9, whole=axis == "step")
            axes.tick_params(axis="x", length=0, labelbottom=False)
            below += height + map_gap(len(heights))
        axes.tick_params(axis="x", length=3, labelbottom=True)
        axes.set_xlabel(axis)
    tall = min(2.0, max(sum(heights) for heights in _heights(pens)))
    draw_load_colors(figure, mesh, limit, (_LEFT + _WIDE + 0.14, top + 0.6, 0.12, tall))


# --- configs ---------------------------------------------------------------------------------------------------------


def _difference_blocks(pens: Sequence[_Pen], differences: Sequence[Difference]) -> list[_Block]:
    """Return the table of fields in which the configs differ, if any."""
    if not differences:
        return [(0.1, lambda figure, top: None)]
    rows = min(len(differences), _MAX_FIELDS + 1)
    return [(0.3 + _ROW * (rows + 1) + 0.1, partial(_draw_differences, pens, differences))]


def _draw_differences(pens: Sequence[_Pen], differences: Sequence[Difference], figure: Any, top: float) -> None:
    longest = max(len(path) for path, _ in differences[:_MAX_FIELDS])
    path_wide = min(4.2, max(1.6, longest * _LETTER + 0.2))
    wide = min(3.4, (_WIDE - path_wide) / len(pens))
    text_at(figure, _LEFT, top + 0.2, "Config", va="center", color=PALE)
    for column, pen in enumerate(pens):
        _draw_name(figure, pen, _LEFT + path_wide + column * wide, top + 0.2, wide)
    for row, (path, values) in enumerate(differences[:_MAX_FIELDS], start=1):
        y = top + 0.2 + row * _ROW
        text_at(figure, _LEFT, y, shortened(path, int(path_wide / _LETTER)), va="center", fontsize=8)
        for column, value in enumerate(values):
            text = value_text(value, max(6, int((wide - 0.1) / _LETTER)))
            text_at(figure, _LEFT + path_wide + column * wide, y, text, va="center", fontsize=8)
    if len(differences) > _MAX_FIELDS:
        y = top + 0.2 + (_MAX_FIELDS + 1) * _ROW
        text = f"and {len(differences) - _MAX_FIELDS} more fields, which are printed"
        text_at(figure, _LEFT, y, text, va="center", fontsize=8, color=PALE)
