"""Warnings while a run trains: experts without tokens, unbalanced layers, loss spikes. Each is given once.

Steps are judged in windows of WINDOW steps, so that the noise of single batches does not count.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WINDOW = 100
"""Steps of a window."""

MAX_VIO = 2.0
"""MaxVio of a window's summed load above which a layer is unbalanced: an expert with three times the balanced load."""

SPIKE_DEVIATIONS, SPIKE_SHARE = 10.0, 0.05
"""A loss is a spike if it is above the last window's median by more than so many median absolute deviations, and by
more than this share of the median, which matters where the losses of a window hardly differ. Of losses that are
normally distributed, one in 10**11 is 10 deviations (6.7 sigma) above."""

_SHOWN = 8  # experts or layers of a line


class Watch:
    """Observer of the steps of one process.

    Args:
        layers: indices of the MoE layers, for the warnings.
    """

    def __init__(self, layers: Sequence[int]):
        self._layers = layers
        self._found: list[str] = []
        self._losses: list[float] = []
        self._load: list[NDArray[np.int64]] = []
        self._idle: set[tuple[int, int]] = set()  # layer and expert, warned about
        self._unbalanced: set[int] = set()
        self._median, self._allowed = np.inf, np.inf  # of the last window
        self._largest_spike = 1.0  # rise over the allowed one, of the spikes warned about

    def add(self, step: int, loss: float, load: Sequence[NDArray[np.int64]]) -> None:
        """Add a finished step: its loss, and int64 [E] per MoE layer, the assignments to each expert."""
        self._check_spike(step, loss)
        self._losses.append(loss)
        self._load = (
            [*load] if not self._load else [sums + counts for sums, counts in zip(self._load, load, strict=True)]
        )
        if len(self._losses) == WINDOW:
            self._end_window(step)

    def warnings(self) -> list[str]:
        """Return the new warnings, a line each."""
        found, self._found = self._found, []
        return found

    def _check_spike(self, step: int, loss: float) -> None:
        """Warn about a spike that is larger than all before."""
        if loss - self._median > self._allowed * self._largest_spike:
            self._largest_spike = (loss - self._median) / self._allowed
            self._found.append(
                f"warning: loss {loss:.4f} at step {step} is a spike: the median of steps {self._window} was "
                f"{self._median:.4f}; only larger spikes are reported from here on"
            )

    def _end_window(self, step: int) -> None:
        losses = np.array(self._losses)
        self._window = f"{step - WINDOW + 1}-{step}"
        self._median = float(np.median(losses))
        deviation = float(np.median(np.abs(losses - self._median)))
        self._allowed = max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * abs(self._median))
        self._check_idle()
        self._check_balance()
        self._losses, self._load = [], []

    def _check_idle(self) -> None:
        """Warn about experts without tokens in the whole window, all layers in one line."""
        parts = []
        for layer, counts in zip(self._layers, self._load, strict=True):
            idle = [int(expert) for expert in np.flatnonzero(counts == 0) if (layer, int(expert)) not in self._idle]
            self._idle.update((layer, expert) for expert in idle)
            if idle:
                parts.append(f"{_listed(idle, 'expert')} of {len(counts)} in layer {layer}")
        if parts:
            self._found.append(f"warning: no token in steps {self._window} for {_few(parts)}")

    def _check_balance(self) -> None:
        """Warn about unbalanced layers, all in one line."""
        parts = []
        for layer, counts in zip(self._layers, self._load, strict=True):
            max_vio = float(counts.max() / counts.mean()) - 1 if counts.any() else 0.0
            if max_vio > MAX_VIO and layer not in self._unbalanced:
                self._unbalanced.add(layer)
                parts.append(f"layer {layer}: {max_vio:.2f} (expert {int(counts.argmax())})")
        if parts:
            self._found.append(f"warning: MaxVio above {MAX_VIO:g} in steps {self._window}: {_few(parts)}")


def _listed(numbers: Sequence[int], word: str) -> str:
    return f"{word}{'s' if len(numbers) > 1 else ''} {_few([str(number) for number in numbers])}"


def _few(parts: Sequence[str]) -> str:
    """Join the first parts with commas, and say how many more there are."""
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return ", ".join(parts[:_SHOWN]) + more
