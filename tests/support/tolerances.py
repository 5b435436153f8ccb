"""Every tolerance of the tests, a row each with its reason, and the one way to compare.

A tolerance is relative to the largest magnitude of the expected tensor:
`max |actual - expected| <= relative * max |expected|`.
Element by element it would have to be wide, because sums that cancel leave rounding errors as large as their terms.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """How far apart two tensors may be, relative to the larger one's largest magnitude, and why."""

    relative: float
    reason: str


EXACT = Tolerance(0.0, "integers, and values that are only moved")
FLOAT64 = Tolerance(1e-12, "the same formula twice in float64, in another order of sums")
FINITE_DIFFERENCE = Tolerance(
    1e-7, "central differences with step 1e-5 in float64: error about step^2, and 1e-16 / step"
)
FLOAT32 = Tolerance(1e-5, "one operation or layer in float32 against float64: eps 6e-8 times some hundred roundings")
FLOAT32_GRADIENT = Tolerance(1e-5, "as FLOAT32; measured 2e-6 for the worst tensor of a four-layer model (facts.md)")
FLOAT32_UPDATE = Tolerance(5e-4, "an update of 1e-2, read off as the difference of weights near 1 (eps 6e-8, twice)")
FLOAT32_TRAINING = Tolerance(1e-4, "20 updates: each multiplies earlier differences; measured 5e-6 (facts.md)")
TRAINED_LOGITS = Tolerance(
    2e-4, "logits after 20 updates of Adam, which divides a gradient near 0 by its own size; measured 7e-5"
)
BFLOAT16 = Tolerance(3e-2, "eps 2^-9 = 2e-3 a rounding, about ten roundings one after the other in a layer")
BFLOAT16_LOSS = Tolerance(1e-2, "a mean over tokens of errors as in BFLOAT16, which partly cancel")
BFLOAT16_GRADIENT = Tolerance(6e-2, "the roundings of the forward pass and as many again on the way back")
BFLOAT16_TRAINING = Tolerance(2e-2, "20 updates from gradients as in BFLOAT16_GRADIENT, and free routing")

ROUTING_MARGIN = 1e-5
"""Two scores nearer than this may change places between two realizations: FLOAT32 times a score of one."""


def assert_close(actual, expected, tolerance: Tolerance, what: str = "value") -> None:
    """Same shape, finite, and no further apart than the tolerance."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert np.all(np.isfinite(actual)), f"{what} is not finite"
    if actual.size == 0:
        return
    largest = np.max(np.abs(expected))
    difference = np.max(np.abs(actual - expected))
    assert difference <= tolerance.relative * largest, (
        f"{what}: largest difference {difference:.3g} is {difference / max(largest, 1e-300):.3g} of the largest "
        f"magnitude {largest:.3g}; allowed {tolerance.relative:.0e} ({tolerance.reason})"
    )


def assert_all_close(actual, expected, tolerance: Tolerance) -> None:
    """`assert_close` for each name of two dicts with the same names; reports every name that fails, not the first."""
    assert sorted(actual) == sorted(expected)
    problems = []
    for name in expected:
        try:
            assert_close(actual[name], expected[name], tolerance, name)
        except AssertionError as error:
            problems.append(str(error).splitlines()[0])
    assert not problems, "\n".join(problems)
