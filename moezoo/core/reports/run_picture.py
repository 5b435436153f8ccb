"""Picture of a training run: loss curves, and heat maps of expert load."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.errors import RunError
from moezoo.core.files import write_atomically
from moezoo.core.training.metrics import read_metrics

INK, PALE = "#22303c", "#8a97a3"
_TRAINING, _VALIDATION, _OPTIMUM = "#2a6f97", "#d1495b", "#3a7d44"
_LARGEST = 1e30  # of a number of the metrics; axes overflow before 1e308
_MAX_COLUMNS = 600  # columns of a heat map; further steps are averaged
_HEAT_MAPS_INCHES, _MIN_HEAT_MAP_INCHES = 5.5, 0.16


@dataclass(frozen=True)
class _Curves:
    """Data of the picture. `load` is per MoE layer [steps, E], relative to a balanced load = 1."""

    step: NDArray[np.float64]
    cross_entropy: NDArray[np.float64]
    validation_step: NDArray[np.float64]
    validation: NDArray[np.float64]
    layers: tuple[int, ...]
    load: tuple[NDArray[np.float64], ...]


def draw_run(metrics_path: Path, out: Path, optimum: float | None) -> list[str]:
    """Draw a run's metrics.jsonl as a PNG.

    At the top: training cross-entropy in nats per token (raw pale, smoothed dark), validation points, and `optimum`
    (nats, the entropy of the source, if known) as a dashed line; bits on the right. Below, for a model with MoE layers:
    one heat map per layer with one row per expert, its load relative to a balanced load of 1.

    Return a line for the user about each damaged line of the metrics, which is left out.

    Raises RunError: metrics without a training step, or damaged; a folder that cannot be written.
    """
    problems: list[str] = []
    curves = _read(metrics_path, problems)
    write_atomically(out, _render(curves, optimum, metrics_path.resolve().parent.name))
    return problems


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path, problems: list[str]) -> _Curves:
    training, validation = [], []
    for row in read_metrics(path, problems):
        try:
            step = _number(row["step"])
            if row.get("cross_entropy") is not None:
                training.append((step, _number(row["cross_entropy"]), row.get("routing") or []))
            if row.get("validation_loss") is not None:
                validation.append((step, _number(row["validation_loss"])))
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"{path} has an invalid line of metrics; got {error!r:.80}; expected `step` and losses as numbers. "
                "Delete the line, or draw another run."
            ) from error
    if not training:
        raise RunError(f"{path} has no training step to draw; expected lines with `cross_entropy`. Train first.")
    layers, load = _loads([(step, routing) for step, _, routing in training], path)
    return _Curves(
        step=np.array([step for step, _, _ in training]),
        cross_entropy=np.array([loss for _, loss, _ in training]),
        validation_step=np.array([step for step, _ in validation]),
        validation=np.array([loss for _, loss in validation]),
        layers=layers,
        load=load,
    )


def _number(value: Any) -> float:
    """Return a number that fits on an axis. Raises ValueError or TypeError."""
    if not abs(value) < _LARGEST:  # NaN fails too
        raise ValueError(value)
    return float(value)


def _loads(rows: Sequence[tuple[float, Any]], path: Path) -> tuple[tuple[int, ...], tuple[NDArray[np.float64], ...]]:
    """Return the MoE layers, and for each the load of every training step relative to a balanced load."""
    if not rows[0][1]:
        return (), ()
    try:
        layers = tuple(int(layer["layer"]) for layer in rows[0][1])
        shares = [np.array([routing[place]["load"] for _, routing in rows], np.float64) for place in range(len(layers))]
        if any(share.ndim != 2 or not (np.abs(share) < _LARGEST).all() for share in shares):
            raise ValueError("a load that is not a list of shares")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} has steps whose `routing` does not match the first step; got {error!r:.80}; expected the same "
            "layers and experts in every step. Draw a run of one model."
        ) from error
    return layers, tuple(share * share.shape[1] for share in shares)


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a centered moving average over a fortieth of the run; the window narrows at both ends to avoid lag."""
    count = len(values)
    index = np.arange(count)
    reach = np.minimum(np.minimum(index, count - 1 - index), _window(count) // 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    smooth: NDArray[np.float64] = (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
    return smooth


def _window(count: int) -> int:
    return max(1, round(count / 40))


# --- drawing ---------------------------------------------------------------------------------------------------------


def _render(curves: _Curves, optimum: float | None, name: str) -> bytes:
    """Render the picture as PNG bytes. `Figure` without pyplot has no global state and needs no display."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [load.shape[1] for load in curves.load]
    wanted = [max(0.42, 0.055 * experts) for experts in rows]
    shrink = min(1.0, _HEAT_MAPS_INCHES / sum(wanted)) if rows else 1.0
    heights = [max(_MIN_HEAT_MAP_INCHES, shrink * inches) for inches in wanted]
    top, between, heading = 3.3, 0.12 if shrink == 1 else 0.06, 0.6 if rows else 0.0
    height = 0.55 + top + heading + sum(heights) + between * max(0, len(rows) - 1) + 0.6
    style: Any = {"font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": PALE, "text.color": INK}
    style |= {"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "svg.fonttype": "none"}
    with rc_context(style):
        figure = Figure(figsize=(8.6, height), dpi=160, facecolor="white")
        FigureCanvasAgg(figure)
        left, width, inch = 0.085, 0.80, 1 / height
        axes = figure.add_axes((left, 1 - (0.55 + top) * inch, width, top * inch))
        _draw_loss(axes, curves, optimum)
        if rows:
            axes.set_xticklabels([])
        figure.text(left, 1 - 0.3 * inch, name, fontsize=12, fontweight="bold", va="center")
        if rows:
            bottom = 1 - (0.55 + top + heading) * inch
            _draw_loads(figure, curves, heights, (left, bottom, width), inch, between)
        else:
            axes.set_xlabel("step")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_loss(axes: Any, curves: _Curves, optimum: float | None) -> None:
    """Draw the loss curves; the loss axis spans all finite values, with a margin."""
    last = float(np.mean(curves.cross_entropy[-_window(len(curves.step)) :]))
    axes.plot(curves.step, curves.cross_entropy, color=_TRAINING, alpha=0.28, linewidth=0.8)
    smooth = _smoothed(curves.cross_entropy)
    marker = "o" if len(curves.step) == 1 else None  # a line through one point is invisible
    label = f"training, {last:.3f} at the end"
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
    shown = [*curves.cross_entropy, *curves.validation, *([] if optimum is None else [optimum])]
    shown = [value for value in shown if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(shown), max(shown)
    margin = 0.06 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)
    _shared_steps(axes, curves)
    axes.set_ylabel("loss (nats per token)")
    axes.grid(axis="y", color=PALE, alpha=0.22, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    bits = axes.secondary_yaxis("right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2)))
    bits.set_ylabel("bits per token", color=PALE)
    bits.tick_params(colors=PALE)
    bits.spines["right"].set_visible(False)


def _draw_loads(
    figure: Any, curves: _Curves, heights: Sequence[float], place: tuple[float, float, float], inch: float, gap: float
) -> None:
    """Draw a heat map per layer. Color is the log of the relative load: half and double are equally far from 1."""
    from matplotlib.colors import LogNorm

    left, top, width = place
    largest = max(2.0, *(float(np.max(load)) for load in curves.load))
    limit = 2.0 ** math.ceil(math.log2(min(largest, 8.0)))
    norm = LogNorm(1 / limit, limit)
    edges = _edges(curves.step)
    y, mesh = top, None
    for place_in_model, (layer, load, height) in enumerate(zip(curves.layers, curves.load, heights, strict=True)):
        y -= height * inch
        axes = figure.add_axes((left, y, width, height * inch))
        columns, load = _columns(edges, load)
        mesh = axes.pcolormesh(
            columns,
            np.arange(load.shape[1] + 1),
            np.clip(load.T, 1 / limit, limit),
            norm=norm,
            cmap="RdBu_r",
            rasterized=True,
        )
        axes.invert_yaxis()
        axes.set_yticks([])
        axes.set_ylabel(f"layer {layer}", rotation=0, ha="right", va="center", labelpad=5)
        axes.tick_params(length=0 if place_in_model + 1 < len(heights) else 3)
        _shared_steps(axes, curves)
        if place_in_model + 1 < len(heights):
            axes.set_xticklabels([])
            y -= gap * inch
        else:
            axes.set_xlabel("step")
        for spine in axes.spines.values():
            spine.set_visible(False)
    experts = sorted({load.shape[1] for load in curves.load})
    rows = " or ".join(map(str, experts))
    figure.text(
        left, top + 0.12 * inch, f"Expert load ({rows} experts per layer, one per row), 1 = balanced", va="bottom"
    )
    bar = figure.add_axes((left + width + 0.03, y, 0.016, top - y))
    colors = figure.colorbar(mesh, cax=bar)
    exponent = int(math.log2(limit))
    values = [2.0**power for power in range(-exponent, exponent + 1)]
    colors.set_ticks(values, labels=[_factor(value, limit) for value in values])
    colors.minorticks_off()
    colors.outline.set_visible(False)
    bar.tick_params(length=2)


def _shared_steps(axes: Any, curves: _Curves) -> None:
    """Set the same linear step axis in all plots; with a constant batch, steps are proportional to tokens and time."""
    from matplotlib.ticker import MaxNLocator

    edges = _edges(curves.step)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    axes.set_xlim(min(0.0, edges[0]) if edges[0] < 0.02 * edges[-1] else edges[0], edges[-1])


def _edges(step: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the borders of heat-map columns: midpoints between steps, and half a distance beyond both ends."""
    if len(step) == 1:
        return np.array([step[0] - 0.5, step[0] + 0.5])
    middle = (step[1:] + step[:-1]) / 2
    return np.concatenate([[2 * step[0] - middle[0]], middle, [2 * step[-1] - middle[-1]]])


def _columns(edges: NDArray[np.float64], load: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Average neighboring columns until there are at most _MAX_COLUMNS."""
    group = math.ceil(len(load) / _MAX_COLUMNS)
    if group == 1:
        return edges, load
    starts = np.arange(0, len(load), group)
    sums = np.add.reduceat(load, starts, axis=0)
    sizes = np.diff(np.append(starts, len(load)))
    return np.append(edges[starts], edges[-1]), sums / sizes[:, None]


def _factor(value: float, limit: float) -> str:
    text = f"{value:g}" if value >= 1 else f"1/{1 / value:g}"
    if value == limit:
        return f"≥ {text}"
    return f"≤ {text}" if value == 1 / limit else text
