"""Mean and quantiles of any number of values in constant memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEAST, _RATIO, _BINS = 1e-12, 1.02, 2300  # 1e-12 to 6e7; two neighboring bins differ by 2 %


@dataclass(frozen=True)
class Spread:
    """Statistics of values that are not negative; quantiles are exact to 2 %, and 0 below 1e-12. NaN without values.

    Fields:
        count: number of values.
        mean, median, p99, max: `p99` is the 99th percentile.
    """

    count: int
    mean: float
    median: float
    p99: float
    max: float


class Distribution:
    """A histogram of values with bins of equal width in the logarithm."""

    def __init__(self) -> None:
        self._counts = np.zeros(_BINS, np.int64)
        self._sum, self._max = 0.0, 0.0

    def add(self, values: NDArray[Any]) -> None:
        """Add values, which are not negative and not NaN; infinity is allowed."""
        if not values.size:
            return
        scaled = np.log(np.maximum(values, _LEAST) / _LEAST) / np.log(_RATIO)
        self._counts += np.bincount(np.minimum(np.ceil(scaled), _BINS - 1).astype(np.int64), minlength=_BINS)
        self._sum += float(values.sum(dtype=np.float64))
        self._max = max(self._max, float(values.max()))

    def spread(self) -> Spread:
        """Return the statistics of all values so far."""
        count = int(self._counts.sum())
        if not count:
            return Spread(0, *[float("nan")] * 4)
        return Spread(count, self._sum / count, self._quantile(0.5), self._quantile(0.99), self._max)

    def _quantile(self, share: float) -> float:
        running = np.cumsum(self._counts)
        place = int(np.searchsorted(running, share * running[-1]))
        return min(_LEAST * _RATIO**place, self._max) if 0 < place < _BINS - 1 else self._max if place else 0.0
