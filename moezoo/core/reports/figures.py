"""Style of all pictures: colors, figures without global state, axes placed in inches, PNG bytes, heat maps of load."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

INK, PALE = "#22303c", "#8a97a3"

RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colors that color-blind people can tell apart on white. Source: Okabe and Ito 2008, without the yellow."""

_MAX_COLUMNS = 600  # columns of a heat map; further steps are averaged
_MAPS_INCHES, _MIN_MAP_INCHES, _EXPERT_INCHES = 5.5, 0.16, 0.1
_NUMBER_POINTS = 6.0


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Any]:
    """Yield a figure of so many inches; what is drawn in the block has the style of all pictures.

    `Figure` without pyplot has no global state and needs no display.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": PALE, "text.color": INK}
    style |= {"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    with rc_context(style):
        figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure


def png_of(figure: Any) -> bytes:
    """Return a figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def axes_at(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Add axes at a place in inches from the figure's upper left corner."""
    wide, high = figure.get_size_inches()
    return figure.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high))


def text_at(figure: Any, left: float, top: float, text: str, **style: Any) -> None:
    """Write text at a place in inches from the figure's upper left corner."""
    wide, high = figure.get_size_inches()
    figure.text(left / wide, 1 - top / high, text, **style)


def plain_axes(axes: Any) -> None:
    """Leave the left and lower border and faint horizontal lines."""
    axes.grid(axis="y", color=PALE, alpha=0.22, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def set_limits(axes: Any, values: Sequence[float]) -> None:
    """Let the vertical axis span all finite values, with a margin."""
    shown = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(shown), max(shown)
    is_constant = high - low <= 1e-6 * abs(high)
    margin = (abs(high) / 10 or 0.5) if is_constant else 0.06 * (high - low)
    axes.set_ylim(low - margin, high + margin)


def edges_of(step: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the borders of heat-map columns: midpoints between steps, and half a distance beyond both ends."""
    if len(step) == 1:
        return np.array([step[0] - 0.5, step[0] + 0.5])
    middle = (step[1:] + step[:-1]) / 2
    return np.concatenate([[2 * step[0] - middle[0]], middle, [2 * step[-1] - middle[-1]]])


def share_steps(axes: Any, first: float, last: float, ticks: int = 9, *, whole: bool = True) -> None:
    """Set the same linear step axis in all plots; with a constant batch, steps are proportional to tokens and time.

    `whole`: label whole numbers only.
    """
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=whole, min_n_ticks=1))
    axes.set_xlim(min(0.0, first) if first < 0.02 * last else first, last)


# --- heat maps of expert load ----------------------------------------------------------------------------------------


def map_heights(experts: Sequence[int]) -> list[float]:
    """Return the inches of each layer's heat map, from its number of experts; all fit on a page."""
    wanted = [max(0.42, _EXPERT_INCHES * number) for number in experts]
    shrink = min(1.0, _MAPS_INCHES / sum(wanted)) if wanted else 1.0
    return [max(_MIN_MAP_INCHES, shrink * inches) for inches in wanted]


def map_gap(layers: int) -> float:
    """Return the inches between the heat maps of two layers."""
    return 0.1 if layers <= 8 else 0.05


def load_limit(loads: Sequence[NDArray[np.float64]]) -> float:
    """Return the largest relative load that colors tell apart: a power of two from 2 to 8."""
    largest = max([2.0, *(float(np.max(load)) for load in loads)])
    return float(2.0 ** math.ceil(math.log2(min(largest, 8.0))))


def draw_load(axes: Any, step: NDArray[np.float64], load: NDArray[np.float64], limit: float, height: float) -> Any:
    """Draw a layer's relative load [n, E] over steps [n] with the experts' numbers, in axes of so many inches.

    Color is the log of the load: half and double are equally far from 1. Return what `draw_load_colors` takes.
    """
    from matplotlib.colors import LogNorm

    columns, shown = _averaged(edges_of(step), load)
    mesh = axes.pcolormesh(
        columns,
        np.arange(load.shape[1] + 1),
        np.clip(shown.T, 1 / limit, limit),
        norm=LogNorm(1 / limit, limit),
        cmap="RdBu_r",
        rasterized=True,
    )
    axes.invert_yaxis()
    numbered = _numbered_experts(load.shape[1], height)
    axes.set_yticks([number + 0.5 for number in numbered], labels=[str(number) for number in numbered])
    axes.tick_params(axis="y", length=0, pad=2, labelsize=_NUMBER_POINTS, labelcolor=PALE)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def _numbered_experts(experts: int, height: float) -> list[int]:
    """Return the experts whose numbers fit beside a heat map of so many inches: every one, every 2nd, 4th, ..."""
    every = 1
    while every * height * 72 / experts < 1.1 * _NUMBER_POINTS:
        every *= 2
    return [] if every >= experts > 1 else list(range(0, experts, every))


def draw_load_colors(figure: Any, mesh: Any, limit: float, place: tuple[float, float, float, float]) -> None:
    """Draw the scale of colors at left, top, width and height in inches."""
    bar = axes_at(figure, *place)
    colors = figure.colorbar(mesh, cax=bar)
    exponent = int(math.log2(limit))
    values = [2.0**power for power in range(-exponent, exponent + 1)]
    colors.set_ticks(values, labels=[_factor(value, limit) for value in values])
    colors.minorticks_off()
    colors.outline.set_visible(False)
    bar.tick_params(length=2)


def _averaged(edges: NDArray[np.float64], load: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
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
