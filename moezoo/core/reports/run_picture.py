"""Picture that training draws of its run: loss curves, and heat maps of expert load."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.core.files import write_atomically
from moezoo.core.reports.figures import (
    PALE,
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
from moezoo.core.reports.run_curves import RunCurves, at_end, read_curves, smoothed

_TRAINING, _VALIDATION, _OPTIMUM = "#2a6f97", "#d1495b", "#3a7d44"
_WIDTH, _LEFT, _WIDE = 8.6, 0.92, 6.7  # inches: of the figure, left of the axes, of the axes
_TITLE, _LOSS, _HEADING = 0.55, 3.3, 0.6


def draw_run(metrics_path: Path, out: Path, optimum: float | None) -> list[str]:
    """Draw a run's metrics.jsonl as a PNG.

    At the top: training cross-entropy in nats per token (raw pale, smoothed dark), validation points, and `optimum`
    (nats, the entropy of the source, if known) as a dashed line; bits on the right. Below, for a model with MoE layers:
    one heat map per layer with one row per expert, its load relative to a balanced load of 1.

    Return a line for the user about each damaged line of the metrics, which is left out.

    Raises RunError: metrics without a training step, or damaged; a folder that cannot be written.
    """
    problems: list[str] = []
    curves = read_curves(metrics_path, problems)
    write_atomically(out, _render(curves, optimum, metrics_path.resolve().parent.name))
    return problems


def _render(curves: RunCurves, optimum: float | None, name: str) -> bytes:
    """Render the picture as PNG bytes."""
    heights = map_heights([load.shape[1] for load in curves.load])
    gap = map_gap(len(heights))
    maps = _HEADING + sum(heights) + gap * (len(heights) - 1) if heights else 0.0
    with new_figure(_WIDTH, _TITLE + _LOSS + maps + 0.6) as figure:
        axes = axes_at(figure, _LEFT, _TITLE, _WIDE, _LOSS)
        _draw_loss(axes, curves, optimum)
        text_at(figure, _LEFT, 0.3, name, fontsize=12, fontweight="bold", va="center")
        if heights:
            axes.set_xticklabels([])
            _draw_loads(figure, curves, heights, gap)
        else:
            axes.set_xlabel("step")
        return png_of(figure)


def _draw_loss(axes: Any, curves: RunCurves, optimum: float | None) -> None:
    """Draw the loss curves; the loss axis spans all finite values, with a margin."""
    axes.plot(curves.step, curves.cross_entropy, color=_TRAINING, alpha=0.28, linewidth=0.8)
    marker = "o" if len(curves.step) == 1 else None  # a line through one point is invisible
    label = f"training, {at_end(curves.cross_entropy):.3f} at the end"
    smooth = smoothed(curves.cross_entropy)
    axes.plot(curves.step, smooth, marker=marker, color=_TRAINING, linewidth=1.8, label=label)
    if len(curves.validation):
        axes.plot(
            curves.validation_step,
            curves.validation,
            "o",
            color=_VALIDATION,
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            label=f"validation, {curves.validation[-1]:.3f} at the end",
            zorder=3,
            clip_on=False,
        )
    if optimum is not None:
        axes.axhline(
            optimum, color=_OPTIMUM, linestyle=(0, (5, 3)), linewidth=1.4, label=f"entropy of the source, {optimum:.3f}"
        )
    set_limits(axes, [*curves.cross_entropy, *curves.validation, *([] if optimum is None else [optimum])])
    _share_steps(axes, curves)
    axes.set_ylabel("loss (nats per token)")
    plain_axes(axes)
    axes.legend(frameon=False, loc="upper right")
    bits = axes.secondary_yaxis("right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2)))
    bits.set_ylabel("bits per token", color=PALE)
    bits.tick_params(colors=PALE)
    bits.spines["right"].set_visible(False)


def _draw_loads(figure: Any, curves: RunCurves, heights: list[float], gap: float) -> None:
    """Draw a heat map per layer, and the scale of colors."""
    limit = load_limit(curves.load)
    first = top = _TITLE + _LOSS + _HEADING
    mesh: Any = None
    for place, (layer, load, height) in enumerate(zip(curves.layers, curves.load, heights, strict=True)):
        axes = axes_at(figure, _LEFT, top, _WIDE, height)
        mesh = draw_load(axes, curves.step, load, limit, height)
        axes.text(-0.035, 0.5, f"layer {layer}", transform=axes.transAxes, ha="right", va="center")
        _share_steps(axes, curves)
        top += height + gap
        if place + 1 < len(heights):
            axes.tick_params(axis="x", length=0)
            axes.set_xticklabels([])
        else:
            axes.set_xlabel("step")
    experts = " or ".join(str(number) for number in sorted({load.shape[1] for load in curves.load}))
    heading = f"Expert load ({experts} experts per layer, one per row), 1 = balanced"
    text_at(figure, _LEFT, first - 0.12, heading, va="bottom")
    draw_load_colors(figure, mesh, limit, (_LEFT + _WIDE + 0.26, first, 0.14, top - gap - first))


def _share_steps(axes: Any, curves: RunCurves) -> None:
    edges: Any = edges_of(np.asarray(curves.step))
    share_steps(axes, edges[0], edges[-1])
