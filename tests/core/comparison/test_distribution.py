"""Statistics in constant memory, and the distance of two models' predictions."""

import numpy as np
import pytest

from moezoo.core.comparison.distribution import Distribution
from moezoo.core.comparison.divergence import Divergence


def test_quantiles_are_exact_to_two_percent():
    values = np.random.default_rng(0).lognormal(-3, 4, 20_000)
    distribution = Distribution()
    for part in np.split(values, 4):
        distribution.add(part)
    found = distribution.spread()
    assert (found.count, found.max) == (20_000, values.max())
    assert found.mean == pytest.approx(values.mean())
    for quantile, value in ((0.5, found.median), (0.99, found.p99)):
        assert value == pytest.approx(np.quantile(values, quantile), rel=0.021)


def test_zeros_infinities_and_nothing():
    distribution = Distribution()
    assert np.isnan(distribution.spread().median)
    distribution.add(np.array([0.0, 0.0, 1e-20, 5.0, np.inf]))
    found = distribution.spread()
    assert (found.median, found.p99, found.max) == (0.0, np.inf, np.inf)


def test_divergence_is_the_formula(monkeypatch):
    monkeypatch.setattr("moezoo.core.comparison.divergence._CHUNK_VALUES", 30)  # 3 tokens at a time
    random = np.random.default_rng(0)
    left, right = (random.normal(size=(8, 10)).astype(np.float32) for _ in range(2))
    target = random.integers(0, 10, 8).astype(np.int32)
    divergence = Divergence()
    assert divergence.add(left, right, target) == 0
    p, q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum(-1, keepdims=True) for x in (left, right))
    kl, rows = (p * np.log(p / q)).sum(-1), np.arange(8)
    effect = divergence.effect()
    assert effect.kl.mean == pytest.approx(kl.mean())
    assert effect.kl.max == pytest.approx(kl.max())
    assert effect.loss == pytest.approx((np.log(p[rows, target]) - np.log(q[rows, target])).mean())
    assert divergence.left_loss == pytest.approx(-np.log(p[rows, target]).mean())
    assert effect.top1 == (p.argmax(-1) == q.argmax(-1)).mean()
