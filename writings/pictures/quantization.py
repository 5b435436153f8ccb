"""Draws writings/pictures/quantization.png and prints its table: python writings/pictures/quantization.py RUN TEXT.

The run's newest checkpoint is quantized at 8 to 2 bits with the router in floats, at 8 bits, and at the width of the
rest, and compared with its own floats on the last tenth of TEXT: Kullback-Leibler divergence of the next-token
distributions, loss, and the share of (token, layer) pairs whose set of experts changes.
"""

import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

import moezoo
from moezoo.api import LoadedModel
from moezoo.core.huggingface.recipe import recipe_of_options
from moezoo.core.runs.convert_layout import convert_layout

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BITS, GROUP, LENGTH, WINDOWS = (8, 6, 4, 3, 2), 64, 128, 64
ROUTERS = {"float": "#22303c", "8 bits": "#2a6f97", "same bits": "#d1495b"}


class Answer(NamedTuple):
    """Log-probabilities [P, V], loss in nats, and sorted experts [L, P, K]."""

    log_p: np.ndarray
    loss: float
    experts: np.ndarray


def answer(model: LoadedModel, windows: np.ndarray) -> Answer:
    log_p, experts = [], []
    for rows in np.array_split(windows, 8):
        output = model.forward(rows[:, :-1])
        logits = output.logits.astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        log_p.append(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
        experts.append([np.sort(layer.expert, axis=-1) for layer in output.routing])
    joined = np.concatenate(log_p)
    loss = -np.take_along_axis(joined, windows[:, 1:, None], axis=-1).mean()
    stacked = np.concatenate(experts, axis=1)
    return Answer(
        joined.reshape(-1, joined.shape[-1]), float(loss), stacked.reshape(len(stacked), -1, stacked.shape[-1])
    )


def main(run: Path, text: Path) -> None:
    floats = moezoo.load(run, backend="jax")
    ids = np.asarray(floats.tokenizer.encode(text.read_text(encoding="utf-8")), np.int32)
    held_out = ids[-len(ids) // 10 :]
    starts = np.linspace(0, len(held_out) - LENGTH - 1, WINDOWS).astype(int)
    windows = np.stack([held_out[start : start + LENGTH + 1] for start in starts])
    exact = answer(floats, windows)
    print(f"floats: loss {exact.loss:.4f}")
    rows: dict[str, list[tuple[float, float]]] = {router: [] for router in ROUTERS}
    for bits in BITS:
        for router in ROUTERS:
            width = {"float": "float", "8 bits": "8bit", "same bits": f"{bits}bit"}[router]
            with tempfile.TemporaryDirectory() as folder:
                recipe = recipe_of_options(f"{bits}bit", None, GROUP, width, None)
                convert_layout(run, Path(folder) / "codes", recipe=recipe)
                found = answer(moezoo.load(Path(folder) / "codes", backend="jax"), windows)
            divergence = float((np.exp(exact.log_p) * (exact.log_p - found.log_p)).sum(axis=-1).mean())
            changed = (found.experts != exact.experts).any(axis=-1).mean(axis=1)
            rows[router].append((divergence, float(changed.mean())))
            by_layer = " ".join(f"{share:.1%}" for share in changed)
            print(f"| {bits} | {router} | {divergence:.2g} | {found.loss:.4f} | {changed.mean():.2%} | {by_layer} |")
    draw(rows, Path(__file__).with_suffix(".png"))


def draw(rows: dict[str, list[tuple[float, float]]], out: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2))
    titles = ("KL divergence from the floats, nats per token", "token and layer pairs with other experts")
    for place, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        for router, color in ROUTERS.items():
            values = [row[place] for row in rows[router]]
            axes.plot(range(len(BITS)), values, "o-", color=color, markersize=4, linewidth=1.3, label=router)
        axes.set(yscale="log", xticks=range(len(BITS)), xticklabels=BITS, xlabel=f"bits, groups of {GROUP}")
        axes.set_title(title, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(title="router", frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
