"""Plot of the sweep over the number of experts at equal active FLOPs."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moezoo.bench.results import Row
from moezoo.core.files import make_folder, write_atomically
from moezoo.core.reports.figures import INK, PALE

_COLORS = {"jax": "#2a6f97", "mlx": "#d1495b", "limit": PALE}
_OTHERS = ("#3a7d44", "#b07d2b", "#6b4e9b", "#4a9a9a", "#8c5a4a")


def draw_sweep(rows: Sequence[Row], out: Path) -> None:
    """Plot seconds relative to the fewest experts: training on the left, the MoE layer's forward pass on the right.

    Both axes are logarithmic; each contender has a line. Raises RunError if the folder cannot be written.
    """
    make_folder(out.parent)
    write_atomically(out, _render(rows))


def points(rows: Sequence[Row], what: str, contender: str) -> list[tuple[int, float]]:
    """Return (number of experts, relative seconds) of one line; `what` is `train` or `forward`."""
    return [
        (int(row.case.split()[1]), row.relative)
        for row in rows
        if row.mode == "experts" and row.contender == contender and row.case.startswith(what) and row.relative
    ]


def _render(rows: Sequence[Row]) -> bytes:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": PALE, "text.color": INK}
    style |= {"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    with rc_context(style):
        figure = Figure(figsize=(8.6, 3.9), dpi=160, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        _draw(left, rows, "train", "training step")
        _draw(right, rows, "forward", "forward pass of the MoE layer")
        left.set_ylabel("time relative to the fewest experts")
        figure.suptitle("More experts at equal active FLOPs", x=0.01, ha="left", fontsize=12, fontweight="bold")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: Any, rows: Sequence[Row], what: str, title: str) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    others = iter(_OTHERS)
    ticks: set[int] = set()
    lowest, highest = 1.0, 1.5
    for name in dict.fromkeys(row.contender for row in rows):
        line = points(rows, what, name)
        if name == "limit" or not line:
            continue
        experts, times = zip(*line, strict=True)
        ticks |= set(experts)
        lowest, highest = min(lowest, *times), max(highest, *times)
        own = name in _COLORS
        color = _COLORS[name] if own else next(others, PALE)
        label = f"{name}, x{times[-1]:.2f}"
        axes.plot(experts, times, "o-" if own else "o--", color=color, label=label, markersize=4, linewidth=1.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted(ticks), labels=[str(tick) for tick in sorted(ticks)])
    levels = [level for level in (0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16) if 0.95 * lowest <= level <= 1.05 * highest]
    axes.set_yticks(levels, labels=[f"x{level:g}" for level in levels])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("experts")
    axes.grid(axis="y", color=PALE, alpha=0.22, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
