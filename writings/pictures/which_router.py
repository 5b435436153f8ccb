"""Draws writings/pictures/which_router.png from run folders: python writings/pictures/which_router.py RUN...

Left: training cross-entropy, smoothed over 100 steps, and the final validation loss as a point. Right: for each
run with a mixture, the load of its experts on the validation data relative to a fair share, a point for each expert of
each layer.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from moezoo.core.training.metrics import read_metrics

_COLORS = ("#22303c", "#2a6f97", "#d1495b", "#3a7d44", "#e09f3e", "#7b5ea7", "#1a9e96", "#8a97a3", "#b5651d")


def main(runs: list[Path]) -> None:
    figure, (curves, loads) = plt.subplots(1, 2, figsize=(13, 5.2), width_ratios=(1.25, 1))
    names: list[str] = []
    for color, run in zip(_COLORS, runs, strict=False):
        rows = read_metrics(run / "metrics.jsonl")
        training = [(row["step"], row["cross_entropy"]) for row in rows if "cross_entropy" in row]
        final = [row for row in rows if row.get("validation_loss") is not None][-1]
        step, loss = np.array(training).T
        window = np.ones(10) / 10
        smooth = np.convolve(loss, window, mode="valid")
        name = run.name.removesuffix("_jax")
        label = f"{name}  {final['validation_loss']:.3f}"
        curves.plot(step[9:], smooth, color=color, linewidth=1.3, label=label)
        curves.plot([final["step"] * 1.02], [final["validation_loss"]], "o", color=color, markersize=5, clip_on=False)
        if final["routing"]:
            names.append(name)
            for layer in final["routing"]:
                share = np.array(layer["load"]) * len(layer["load"])
                place = len(names) - 1 + 0.16 * (layer["layer"] - 1.5)
                loads.plot(share, np.full(len(share), place), "o", color=color, markersize=3.2, alpha=0.75)
    curves.set(xlabel="step", ylabel="cross-entropy, nats per character", ylim=(1.35, 2.2), xlim=(0, None))
    curves.legend(title="run, final validation loss", frameon=False, fontsize=9)
    curves.set_title("Training (lines) and final validation (points)", loc="left", fontsize=11)
    loads.axvline(1, color="#8a97a3", linewidth=0.8)
    loads.set(yticks=range(len(names)), yticklabels=names, xlabel="load of an expert (1: fair share)", xlim=(0, None))
    loads.invert_yaxis()
    loads.set_title("Expert load on validation text, layer by layer", loc="left", fontsize=11)
    for axes in (curves, loads):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
