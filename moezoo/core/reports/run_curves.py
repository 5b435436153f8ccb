"""Curves of a training run, read from its metrics.jsonl: losses, balance of the experts, drops, speed, validations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.errors import RunError
from moezoo.core.training.metrics import read_metrics

Curve = NDArray[np.float64]

_LARGEST = 1e30  # of a number of the metrics; axes overflow before 1e308


@dataclass(frozen=True)
class RunCurves:
    """Numbers of the n logged steps of a run, and of its v validations. NaN: the line does not have the number.

    Fields:
        step, tokens, cross_entropy, tokens_per_second: [n].
        weighted: contribution of each auxiliary loss to the loss by name, [n].
        layers: indices of the M MoE layers.
        load: per MoE layer [n, E], relative to a balanced load = 1.
        dropped: share of assignments beyond capacity, [n, M].
        validation_step, validation: nats per token, [v].
        inference: the same with inference routing, if it differs, [v].
        optimum: entropy of the source in nats per character, if it is known.
    """

    step: Curve
    tokens: Curve
    cross_entropy: Curve
    tokens_per_second: Curve
    weighted: Mapping[str, Curve]
    layers: tuple[int, ...]
    load: tuple[Curve, ...]
    dropped: Curve
    validation_step: Curve
    validation: Curve
    inference: Curve
    optimum: float | None

    @property
    def max_vio(self) -> Curve:
        """MaxVio of each MoE layer, [n, M]: the largest load over the balanced one, less 1. arXiv 2408.15664."""
        return self._of_layers([load.max(axis=1) - 1 for load in self.load])

    @property
    def entropy(self) -> Curve:
        """Entropy of the load of each MoE layer over that of a balanced load, [n, M]: 1 is balanced, 0 one expert."""
        return self._of_layers([_entropy(load / load.shape[1]) for load in self.load])

    def _of_layers(self, columns: Sequence[Curve]) -> Curve:
        return np.stack(columns, axis=1) if columns else np.zeros((len(self.step), 0))


def read_curves(path: Path, problems: list[str]) -> RunCurves:
    """Read a metrics.jsonl; a line for the user about each damaged line, which is left out, is added to `problems`.

    Raises RunError: metrics without a training step, or numbers that fit on no axis.
    """
    training, validation = [], []
    for row in read_metrics(path, problems):
        try:
            numbers = {name: _number(row[name]) for name in _numeric(row)}
            if row.get("cross_entropy") is not None:
                training.append((numbers, row.get("routing") or []))
            if row.get("validation_loss") is not None:
                validation.append((numbers, row))
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"{path} has an invalid line of metrics; got {error!r:.80}; expected `step` and losses as numbers. "
                "Delete the line, or draw another run."
            ) from error
    if not training:
        raise RunError(f"{path} has no training step to draw; expected lines with `cross_entropy`. Train first.")
    layers, load, dropped = _routing([routing for _, routing in training], path)
    steps, checks = [numbers for numbers, _ in training], [numbers for numbers, _ in validation]
    names = dict.fromkeys(name for numbers in steps for name in numbers if name.endswith("_weighted"))
    optimum = next((row["optimum"]["entropy_rate"] for _, row in reversed(validation) if row.get("optimum")), None)
    return RunCurves(
        step=_curve(steps, "step"),
        tokens=_curve(steps, "tokens"),
        cross_entropy=_curve(steps, "cross_entropy"),
        tokens_per_second=_curve(steps, "tokens_per_second"),
        weighted={name.removesuffix("_weighted"): _curve(steps, name) for name in names},
        layers=layers,
        load=load,
        dropped=dropped,
        validation_step=_curve(checks, "step"),
        validation=_curve(checks, "validation_loss"),
        inference=_curve(checks, "inference_loss"),
        optimum=optimum,
    )


_NAMES = ("tokens", "cross_entropy", "tokens_per_second", "validation_loss", "inference_loss")


def _numeric(row: Mapping[str, Any]) -> list[str]:
    """Return the names of the numbers of a line that are drawn; null is none. Each line has a step."""
    wanted = [name for name in row if name in _NAMES or name.endswith("_weighted")]
    return ["step", *(name for name in wanted if row[name] is not None)]


def _number(value: Any) -> float:
    """Return a number that fits on an axis. Raises ValueError or TypeError."""
    if not abs(value) < _LARGEST:  # NaN fails too
        raise ValueError(value)
    return float(value)


def _curve(rows: Sequence[Mapping[str, float]], name: str) -> Curve:
    return np.array([row.get(name, np.nan) for row in rows], np.float64)


def _routing(rows: Sequence[Any], path: Path) -> tuple[tuple[int, ...], tuple[Curve, ...], Curve]:
    """Return the MoE layers, the load of each in every training step, and the dropped shares."""
    if not rows[0]:
        return (), (), np.zeros((len(rows), 0))
    try:
        layers = tuple(int(layer["layer"]) for layer in rows[0])
        shares = [np.array([routing[place]["load"] for routing in rows], np.float64) for place in range(len(layers))]
        if any(share.ndim != 2 or not (np.abs(share) < _LARGEST).all() for share in shares):
            raise ValueError("a load that is not a list of shares")
        dropped = [[_number(routing[place].get("dropped", 0.0)) for place in range(len(layers))] for routing in rows]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} has steps whose `routing` does not match the first step; got {error!r:.80}; expected the same "
            "layers and experts in every step. Draw a run of one model."
        ) from error
    return layers, tuple(share * share.shape[1] for share in shares), np.array(dropped)


def _entropy(share: Curve) -> Curve:
    """Return the entropy of shares [n, E] over log E, [n]; 1 for a single expert."""
    experts = share.shape[1]
    if experts == 1:
        return np.ones(len(share))
    surprisal = -np.log(share, out=np.zeros_like(share), where=share > 0)
    relative: Curve = (share * surprisal).sum(axis=1) / np.log(experts)
    return relative


def window(count: int) -> int:
    """Return the number of steps over which a curve of `count` steps is smoothed: a fortieth."""
    return max(1, round(count / 40))


def smoothed(values: Curve) -> Curve:
    """Return a centered moving average over a fortieth of the run; the window narrows at both ends to avoid lag.

    NaN is left out of the averages; NaN where a window has nothing else.
    """
    count = len(values)
    index = np.arange(count)
    reach = np.minimum(np.minimum(index, count - 1 - index), window(count) // 2)
    first, last = index - reach, index + reach + 1
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    number = counts[last] - counts[first]
    smooth: Curve = np.divide(sums[last] - sums[first], number, out=np.full(count, np.nan), where=number > 0)
    return smooth


def at_end(values: Curve) -> float:
    """Return the mean of a curve's last fortieth, NaN if nothing there is known."""
    last = values[-window(len(values)) :]
    known = last[np.isfinite(last)]
    return float(known.mean()) if len(known) else float("nan")
