"""AdamW with gradient clipping, the optimizer step of both backends."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from moezoo.core.config.training import OptimizerConfig
from moezoo.core.reference import Array


class Moments(NamedTuple):
    """AdamW's moving averages of the gradient and of its square, by canonical name."""

    first: dict[str, Array]
    second: dict[str, Array]


def zero_moments(parameters: dict[str, Array]) -> Moments:
    """Return both moments before the first step: zeros."""
    zeros = {name: np.zeros_like(value) for name, value in parameters.items()}
    return Moments(zeros, dict(zeros))


def global_norm(gradients: dict[str, Array]) -> float:
    """Return the global gradient norm: the L2 norm of all gradients as one vector."""
    return float(np.sqrt(sum(np.sum(np.square(gradient)) for gradient in gradients.values())))


def adamw(
    config: OptimizerConfig,
    parameters: dict[str, Array],
    gradients: dict[str, Array],
    moments: Moments,
    *,
    learning_rate: float,
    update: int,
    decayed: Collection[str],
) -> tuple[dict[str, Array], Moments]:
    """Apply one update: clip by the global norm, then AdamW with bias correction and decoupled weight decay.

    `g = g * min(1, clip_norm / (norm + 1e-6))`; `m = b1 m + (1 - b1) g`; `v = b2 v + (1 - b2) g^2`;
    `p = p - lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + epsilon) + weight_decay * p)`.

    Args:
        config: hyperparameters.
        parameters, gradients, moments: by canonical name.
        learning_rate: learning rate of this update.
        update: t, 1 for the first update.
        decayed: names of the parameters with weight decay.

    Returns:
        The new parameters and moments.

    Source: Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm 2; clipping: Pascanu et al. 2012, arXiv 1211.5063.
    Differs: decay is scaled by the learning rate, as in PyTorch and optax; 1e-6 in the clip factor, as in PyTorch.
    """
    scale = 1.0 if config.clip_norm is None else min(1.0, config.clip_norm / (global_norm(gradients) + 1e-6))
    new_parameters, first, second = {}, {}, {}
    for name, value in parameters.items():
        gradient = gradients[name] * scale
        first[name] = config.beta1 * moments.first[name] + (1 - config.beta1) * gradient
        second[name] = config.beta2 * moments.second[name] + (1 - config.beta2) * np.square(gradient)
        corrected_first = first[name] / (1 - config.beta1**update)
        corrected_second = second[name] / (1 - config.beta2**update)
        direction = corrected_first / (np.sqrt(corrected_second) + config.epsilon)
        if name in decayed:
            direction = direction + config.weight_decay * value
        new_parameters[name] = value - learning_rate * direction
    return new_parameters, Moments(first, second)
