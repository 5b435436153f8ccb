"""Pictures of the measures of routing traces: load, domains, co-activation, saturation, cache."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.analysis.analyze import Analysis, TraceAnalysis
from moezoo.core.analysis.expert_cache import CacheResult, ExpertSizes
from moezoo.core.files import make_folder, write_atomically
from moezoo.core.reports.figures import INK, PALE, new_figure, plain_axes, png_of

_POLICY_COLORS = {"best": "#22303c", "static": "#e09f3e", "lfu": "#2a6f97", "lru": "#d1495b"}
_MATRICES = 4  # of co-activation in one picture
_NUMBERED = 12  # experts up to which a matrix has its numbers written in
_LARGEST_RATIO = 4.0

Draw = Callable[[Any], None]


def draw_analysis(
    folder: Path, analysis: Analysis, caches: Sequence[CacheResult] = (), sizes: ExpertSizes | None = None
) -> list[Path]:
    """Write the pictures that the traces have data for as PNG; return their paths. Raises RunError: cannot write."""
    make_folder(folder)
    written = []
    for name, size, draw in _pictures(analysis, caches, sizes):
        written.append(folder / f"{name}.png")
        write_atomically(written[-1], _rendered(size, draw))
    return written


def _pictures(
    analysis: Analysis, caches: Sequence[CacheResult], sizes: ExpertSizes | None
) -> Iterator[tuple[str, tuple[float, float], Draw]]:
    """Yield name, size in inches and drawing function of each picture."""
    last = analysis.last
    height = min(6.0, 0.28 * last.trace.num_layers)
    yield "load", (8.6, 1.6 + height), partial(_draw_load, last)
    if last.domains is not None:
        panels = len(last.domains[0].names)
        yield "domains", (8.6, 1.0 + (0.7 + height) * panels), partial(_draw_domains, last)
    shown = min(_MATRICES, last.trace.num_layers)
    yield "coactivation", (8.6, 4.4 * -(-shown // 2)), partial(_draw_pairs, last)
    if analysis.saturation:
        yield "saturation", (8.6, 4.2), partial(_draw_saturation, analysis)
    if caches and sizes is not None:
        yield "cache", (8.6, 4.4), partial(_draw_cache, caches, sizes)


def _rendered(size: tuple[float, float], draw: Draw) -> bytes:
    """Render a picture as PNG bytes."""
    with new_figure(*size) as figure:
        figure.set_layout_engine("constrained")
        draw(figure)
        return png_of(figure)


def _draw_load(last: TraceAnalysis, figure: Any) -> None:
    axes = figure.subplots()
    table = _table(last, [layer.load * len(layer.load) for layer in last.load])
    mesh = _heat_map(axes, last, table, "RdBu_r", _log_norm())
    axes.set_title("Load of the experts: times an equal share", loc="left")
    _ratio_bar(figure, mesh, axes)


def _draw_domains(last: TraceAnalysis, figure: Any) -> None:
    names = () if last.domains is None else last.domains[0].names
    axes = np.atleast_1d(figure.subplots(len(names), 1, sharex=True))
    mesh = None
    for place, (name, own) in enumerate(zip(names, axes, strict=True)):
        rows = []
        for layer in last.domains or ():
            mean = layer.share.mean(axis=0)
            rows.append(np.divide(layer.share[place], mean, out=np.ones_like(mean), where=mean > 0))
        mesh = _heat_map(own, last, _table(last, rows), "PuOr_r", _log_norm())
        own.set_title(f"{name}: share of its tokens that choose an expert, times the mean of all texts", loc="left")
        if place + 1 < len(names):
            own.set_xlabel("")
    _ratio_bar(figure, mesh, list(axes))


def _draw_pairs(last: TraceAnalysis, figure: Any) -> None:
    """Draw N(i and j) / N(i) of up to four layers, evenly spread."""
    number = min(_MATRICES, last.trace.num_layers)
    places = np.unique(np.linspace(0, last.trace.num_layers - 1, number).round().astype(int))
    axes = np.atleast_1d(figure.subplots(-(-len(places) // 2), min(2, len(places)))).ravel()
    matrices = [_without_diagonal(last, place) for place in places]
    largest = max((float(np.nanmax(matrix)) for matrix in matrices if np.isfinite(matrix).any()), default=1.0) or 1.0
    mesh = None
    for own, place, matrix in zip(axes, places, matrices, strict=False):
        mesh = own.imshow(100 * matrix, cmap="viridis", vmin=0, vmax=100 * largest)
        own.set_title(f"layer {last.trace.info.layers[place]}", loc="left")
        own.set_ylabel("of the tokens of expert")
        own.set_xlabel("choose also expert")
        if len(matrix) <= _NUMBERED:
            own.set_xticks(range(len(matrix)))
            own.set_yticks(range(len(matrix)))
            for row, column in np.argwhere(np.isfinite(matrix)).tolist():
                value = float(matrix[row, column])
                color = "white" if value < 0.6 * largest else "black"
                own.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=7)
    for own in axes[len(places) :]:
        own.set_visible(False)
    bar = figure.colorbar(mesh, ax=list(axes), shrink=0.7)
    bar.set_label("co-activation in %", color=INK)
    bar.outline.set_visible(False)


def _without_diagonal(last: TraceAnalysis, place: int) -> NDArray[np.float64]:
    number = last.trace.info.num_experts[place]
    matrix: NDArray[np.float64] = last.coactivation.within[place, :number, :number].copy()
    np.fill_diagonal(matrix, np.nan)
    return matrix


def _draw_saturation(analysis: Analysis, figure: Any) -> None:
    axes = figure.subplots()
    names = [Path(each.where).stem for each in analysis.saturation]
    table = np.array([each.all_experts for each in analysis.saturation])
    chance = np.array([each.chance for each in analysis.saturation]).mean(axis=1)
    layers = analysis.last.trace.info.layers
    for place, layer in enumerate(layers):
        color = _color(place, len(layers))
        axes.plot(range(len(names)), 100 * table[:, place], "o-", color=color, label=f"layer {layer}", markersize=4)
    axes.plot(range(len(names)), 100 * chance, ":", color=PALE, label="by chance")
    axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 5 else 0)
    axes.set(ylim=(0, 100), ylabel="% of the last experts")
    axes.set_title(
        f"Router saturation: experts that the last trace ({Path(analysis.last.trace.where).stem}) chooses too"
    )
    plain_axes(axes)
    axes.legend(frameon=False, fontsize=8, ncols=1 + len(layers) // 10, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_cache(caches: Sequence[CacheResult], sizes: ExpertSizes, figure: Any) -> None:
    axes = figure.subplots()
    total = sizes.total_bytes
    for policy in dict.fromkeys(each.policy for each in caches):
        own = sorted((each for each in caches if each.policy == policy), key=lambda each: each.cache_bytes)
        held = [100 * min(1.0, each.cache_bytes / total) for each in own]
        line = "o--" if policy == "static" else "o-"
        axes.plot(held, [100 * each.hit_rate for each in own], line, color=_POLICY_COLORS[policy], label=policy)
    axes.plot([0, 100], [0, 100], ":", color=PALE, label="equal use")
    axes.set(xlabel="size of the cache, % of all experts", ylabel="hits, % of the chosen experts")
    axes.set(xlim=(0, 102), ylim=(0, 102))
    axes.set_title(
        f"Expert cache, {'shared by all layers' if caches[0].is_shared else 'an equal part for each layer'}", loc="left"
    )
    plain_axes(axes)
    axes.legend(frameon=False, loc="lower right")


def _table(last: TraceAnalysis, rows: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return rows of experts as a table [L, E]; NaN where a layer has fewer experts."""
    table = np.full((len(rows), max(last.trace.info.num_experts)), np.nan)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table


def _log_norm() -> Any:
    from matplotlib.colors import LogNorm

    return LogNorm(1 / _LARGEST_RATIO, _LARGEST_RATIO)


def _heat_map(axes: Any, last: TraceAnalysis, table: NDArray[np.float64], cmap: str, norm: Any) -> Any:
    """Draw a table of ratios; the colors end at a quarter and four times."""
    clipped = np.clip(table, 1 / _LARGEST_RATIO, _LARGEST_RATIO)
    mesh = axes.imshow(clipped, cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")
    layers = last.trace.info.layers
    step = -(-len(layers) // 24)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set(xlabel="expert", ylabel="layer")
    axes.tick_params(length=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def _ratio_bar(figure: Any, mesh: Any, axes: Any) -> None:
    bar = figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["≤ 1/4", "1/2", "1", "2", "≥ 4"])
    bar.minorticks_off()
    bar.outline.set_visible(False)


def _color(place: int, number: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * place / max(1, number - 1))
