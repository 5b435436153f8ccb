"""Causality check: the output at a position must not depend on later tokens or on other sequences of the batch.

A model that fails it under inference routing cannot generate. Writing: writings/parity.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import Integers

Mode = Literal["training", "inference"]
Run = Callable[[Integers, bool], Mapping[str, NDArray[Any]]]
"""`run(tokens, inference)` returns named intermediates in the order of the forward pass."""


@dataclass(frozen=True)
class Causality:
    """Result of a causality check of one side.

    Fields:
        side: `reference` or the name of a backend.
        mode: training routing, without noise, or inference routing.
        first_leak: the first intermediate that changed at a position where it must not; None: causal.
        moved: its change relative to its largest absolute value; without a leak, the largest change of any.
        tolerance: limit of `moved`.
    """

    side: str
    mode: Mode
    first_leak: str | None
    moved: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """True unless inference leaks. Training may leak: expert choice and capacity depend on the whole batch."""
        return self.first_leak is None or self.mode == "training"


def check_causality(side: str, run: Run, spec: ModelSpec, tokens: Integers, tolerance: float) -> list[Causality]:
    """Change the second half of the first sequence, and check that no other position of the batch changes.

    Args:
        side: name for the result.
        run: an implementation of the model.
        spec: the model; training routing is checked too if it differs from inference routing.
        tokens: int32 [B, T]; B >= 2 detects leaks between sequences.
        tolerance: relative; 0 is too strict, because products of other shapes round differently.
    """
    start = tokens.shape[1] // 2
    changed = tokens.copy()
    changed[0, start:] = (changed[0, start:] + 1) % spec.vocab
    allowed_BT = np.zeros(tokens.shape, bool)
    allowed_BT[0, start:] = True
    modes: tuple[Mode, ...] = ("training", "inference") if spec.inference_differs else ("inference",)
    results = []
    for mode in modes:
        before, after = run(tokens, mode == "inference"), run(changed, mode == "inference")
        leak, moved = _first_leak(before, after, allowed_BT, tolerance)
        results.append(Causality(side, mode, leak, moved, tolerance))
    return results


def _first_leak(
    before: Mapping[str, NDArray[Any]],
    after: Mapping[str, NDArray[Any]],
    allowed_BT: NDArray[np.bool_],
    tolerance: float,
) -> tuple[str | None, float]:
    """Return the first intermediate that changed where it must not and its change, or None and the largest change."""
    largest = 0.0
    for name, value in before.items():
        own, other = (np.asarray(values, np.float64).reshape(*allowed_BT.shape, -1) for values in (value, after[name]))
        # Trap: a masked logit is minus infinity in both runs, and their difference would be NaN.
        differs = (own != other) & ~allowed_BT[..., None]
        difference = np.abs(np.subtract(own, other, out=np.zeros_like(own), where=differs))
        # Trap: one of the tensors may be all zeros, so take the scale from both.
        scale = max(np.max(np.abs(values[np.isfinite(values)]), initial=0.0) for values in (own, other))
        moved = float(np.max(difference, initial=0.0) / (scale or 1.0))
        if not moved <= tolerance:
            return name, moved
        largest = max(largest, moved)
    return None, largest
