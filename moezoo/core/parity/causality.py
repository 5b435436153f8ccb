"""Does a token's output depend on later tokens, or on its neighbours in the batch? Then the model cannot generate.

Writing: writings/parity.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import Integers

Mode = Literal["training", "inference"]
Run = Callable[[Integers, bool], Mapping[str, Any]]
"""`run(tokens, inference)` gives named intermediates in the order of the forward pass."""


@dataclass(frozen=True)
class Causality:
    """What changing tokens moved before them.

    Fields:
        side: reference or backend.
        mode: routing of training, without noise, or of inference.
        first_leak: the first intermediate that moved where it must not, None where none did: causal.
        moved: how far, relative to its largest absolute value.
        tolerance: of `moved`.
    """

    side: str
    mode: Mode
    first_leak: str | None
    moved: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Inference must be causal. Training need not be: expert choice and capacities look at the whole batch."""
        return self.first_leak is None or self.mode == "training"


def check_causality(side: str, run: Run, spec: ModelSpec, tokens: Integers, tolerance: float) -> list[Causality]:
    """Replace the second half of the first sequence; nothing before it, and in no other sequence, may move.

    Args:
        side: what the result is called.
        run: one realization of the model.
        spec: the model; training's routing is checked too where it differs from that of inference.
        tokens: int32 [B, T], B >= 2 for leaks between sequences.
        tolerance: relative; products of other shapes round otherwise, so 0 is too strict.
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
    before: Mapping[str, Any], after: Mapping[str, Any], allowed_BT: Any, tolerance: float
) -> tuple[str | None, float]:
    """The first intermediate that moved elsewhere than allowed, and how far; or None and the largest movement."""
    largest = 0.0
    for name, value in before.items():
        own, other = (np.asarray(values, np.float64).reshape(*allowed_BT.shape, -1) for values in (value, after[name]))
        # Trap: a masked logit is minus infinity on both sides, and their difference is not a number.
        differs = (own != other) & ~allowed_BT[..., None]
        difference = np.abs(np.subtract(own, other, out=np.zeros_like(own), where=differs))
        # Trap: a tensor may start as all zeros, so that only the other one has a size.
        scale = max(np.max(np.abs(values[np.isfinite(values)]), initial=0.0) for values in (own, other))
        moved = float(np.max(difference, initial=0.0) / (scale or 1.0))
        if not moved <= tolerance:
            return name, moved
        largest = max(largest, moved)
    return None, largest
