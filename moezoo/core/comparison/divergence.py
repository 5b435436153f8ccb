"""Distance of two models' predictions: KL divergence, top-1 agreement and loss."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moezoo.core.comparison.distribution import Distribution, Spread
from moezoo.core.tokens import Floats, Integers

_CHUNK_VALUES = 2**21  # logits converted to float64 at once


@dataclass(frozen=True)
class Effect:
    """Distance of the predictions of a right model from those of a left one, over all targets.

    Fields:
        kl: KL(left || right) of each token, nats.
        top1: share of tokens with the same most likely next token.
        loss: mean loss of the right model minus that of the left one, nats per token.
    """

    kl: Spread
    top1: float
    loss: float


class Divergence:
    """Sums of the distance between two models over the tokens so far."""

    def __init__(self) -> None:
        self._kl = Distribution()
        self._same, self._left_loss, self._right_loss = 0, 0.0, 0.0
        self._left_only, self._left_count = 0.0, 0  # loss of tokens where the right model alone is not finite

    @property
    def left_loss(self) -> float:
        """Mean loss of the left model over all tokens with finite logits of it, nats; NaN without one."""
        count = self._kl.spread().count + self._left_count
        return (self._left_loss + self._left_only) / count if count else float("nan")

    def add(self, left_PV: Floats, right_PV: Floats, target_P: Integers) -> int:
        """Add the predictions of tokens; return the number of tokens left out because a logit is not finite."""
        rows, left_out = max(1, _CHUNK_VALUES // left_PV.shape[1]), 0
        for first in range(0, len(target_P), rows):
            part = slice(first, first + rows)
            left_P, right_P = (np.isfinite(logits_PV[part]).all(-1) for logits_PV in (left_PV, right_PV))
            finite_P, alone_P = left_P & right_P, left_P & ~right_P
            left_out += int((~finite_P).sum())
            self._left_only += _loss(_log_softmax(left_PV[part][alone_P]), target_P[part][alone_P])
            self._left_count += int(alone_P.sum())
            self._add(left_PV[part][finite_P], right_PV[part][finite_P], target_P[part][finite_P])
        return left_out

    def _add(self, left_PV: Floats, right_PV: Floats, target_P: Integers) -> None:
        log_left_PV, log_right_PV = _log_softmax(left_PV), _log_softmax(right_PV)
        self._left_loss += _loss(log_left_PV, target_P)
        self._right_loss += _loss(log_right_PV, target_P)
        self._same += int((left_PV.argmax(-1) == right_PV.argmax(-1)).sum())
        log_right_PV -= log_left_PV
        kl_P = -np.einsum("PV,PV->P", np.exp(log_left_PV), log_right_PV)
        self._kl.add(np.maximum(kl_P, 0.0))

    def effect(self) -> Effect:
        """Return the distance over all tokens so far."""
        kl = self._kl.spread()
        count = max(kl.count, 1)
        return Effect(kl, self._same / count, (self._right_loss - self._left_loss) / count)


def _loss(log_PV: NDArray[np.float64], target_P: Integers) -> float:
    return -float(log_PV[np.arange(len(target_P)), target_P].sum())


def _log_softmax(logits_PV: Floats) -> NDArray[np.float64]:
    shifted_PV = logits_PV.astype(np.float64)
    shifted_PV -= shifted_PV.max(-1, keepdims=True, initial=-np.inf)
    shifted_PV -= np.log(np.exp(shifted_PV).sum(-1, keepdims=True))
    return shifted_PV
