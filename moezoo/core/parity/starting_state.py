"""State of each kind of optimizer from which a step depends smoothly on the gradient. Writing: writings/parity.md."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.config.optimizers import (
    AdafactorConfig,
    AdamWConfig,
    LionConfig,
    MuonAdamW,
    MuonConfig,
    OptimizerConfig,
    SGDConfig,
)
from moezoo.core.config.update_rules import UpdateRule
from moezoo.core.parameters import MatrixAxes
from moezoo.core.reference.optimizer import global_norm
from moezoo.core.tokens import Floats

Doubles = NDArray[np.float64]


def starting_state(
    config: OptimizerConfig, rules: Mapping[str, UpdateRule], gradients: Mapping[str, NDArray[Any]]
) -> dict[str, Floats]:
    """Return float32 state before a step with these gradients, clipped to g.

    - AdamW: m = g / 2, v = g^2 + s with s = mean(g^2). Adafactor: the means of that v.
    - Muon: m = g / 2 + |g| times a matrix of ones on the diagonal, whose singular values are all far from zero.
    - Lion: m for which the sum whose sign is taken is |g| / 2 + s^1/2 or its negative, by turns: never near zero.
    - SGD: m = g / 2.

    Trap: from zero, the first step of AdamW and Lion is the sign of the gradient, which rounding decides for small
    ones, and that of Muon has directions that rounding decides where the gradient has a low rank.
    """
    norm = global_norm(gradients)
    scale = 1.0 if config.clip_norm is None else min(1.0, config.clip_norm / (norm + 1e-6))
    floor = (1e-3 * scale * norm) ** 2 / sum(value.size for value in gradients.values())
    state: dict[str, Floats] = {}
    for name, rule in rules.items():
        clipped = scale * np.asarray(gradients[name], np.float64)
        spread = max(float(np.mean(clipped**2)), floor, 1e-30)
        for kind, value in _start(rule, clipped, spread).items():
            state[f"{kind}.{name}"] = value.astype(np.float32)
    return state


def _start(rule: UpdateRule, gradient: Doubles, spread: float) -> dict[str, Doubles]:
    half, second = gradient / 2, gradient**2 + spread
    match rule.method:
        case AdamWConfig() | MuonAdamW():
            return {"first_moment": half, "second_moment": second}
        case MuonConfig():
            assert rule.matrix is not None
            return {"first_moment": half + _diagonal(rule.matrix, gradient, spread)}
        case LionConfig(beta1=beta1):
            turns = 1.0 - 2.0 * (np.arange(gradient.size).reshape(gradient.shape) % 2)
            signed = turns * (np.abs(half) + np.sqrt(spread))
            return {"first_moment": (signed - (1 - beta1) * gradient) / max(beta1, 0.1)}
        case SGDConfig(momentum=momentum):
            return {"momentum": half} if momentum else {}
        case AdafactorConfig():
            axes = rule.state_axes(gradient.ndim)
            every = range(gradient.ndim)
            return {
                kind: np.mean(second, axis=tuple(axis for axis in every if axis not in own))
                for kind, own in axes.items()
            }


def _diagonal(matrix: MatrixAxes, gradient: Doubles, spread: float) -> Doubles:
    """Return, for each matrix of a stack, its norm (at least that of numbers of the spread) on the diagonal."""
    count, inputs, outputs = matrix.sizes(gradient.shape)
    norms = np.sqrt(np.sum(gradient.reshape(count, -1) ** 2, axis=1) + spread * inputs * outputs)
    diagonal: Doubles = (norms[:, None, None] * np.eye(inputs, outputs)).reshape(gradient.shape)
    return diagonal
