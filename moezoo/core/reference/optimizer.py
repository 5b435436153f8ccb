"""The formulas of the optimizers, and the optimizer step of both backends: clipping, then an update by a rule each."""

import math
from collections.abc import Mapping

import numpy as np

from moezoo.core.config.optimizers import (
    AdafactorConfig,
    AdamWConfig,
    LionConfig,
    MuonAdamW,
    MuonConfig,
    OptimizerConfig,
    SGDConfig,
)
from moezoo.core.config.update_rules import Method, UpdateRule
from moezoo.core.parameters import MatrixAxes
from moezoo.core.reference import Array

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon's iteration: the largest slope at 0 for which singular values end near 1. Source: Jordan."""

MUON_EPSILON = 1e-7
"""Added to the norm by which Muon divides. Source: Jordan's code."""

ADAFACTOR_EPSILONS = 1e-30, 1e-3
"""Added to squared gradients; and the least root mean square of a parameter. Source: arXiv 1804.04235, algorithm 6."""

State = dict[str, Array]
"""What a rule keeps of one parameter, by kind: `first_moment`, ... (`UpdateRule.state_axes`)."""


def zero_state(rules: Mapping[str, UpdateRule], parameters: Mapping[str, Array]) -> State:
    """Return the state before the first step, `first_moment.NAME` and so on: zeros."""
    return {
        f"{kind}.{name}": np.zeros([parameters[name].shape[axis] for axis in axes])
        for name, rule in rules.items()
        for kind, axes in rule.state_axes(parameters[name].ndim).items()
    }


def global_norm(gradients: Mapping[str, Array]) -> float:
    """Return the global gradient norm: the L2 norm of all gradients as one vector."""
    return float(np.sqrt(sum(np.sum(np.square(gradient)) for gradient in gradients.values())))


def optimizer_step(
    config: OptimizerConfig,
    rules: Mapping[str, UpdateRule],
    parameters: Mapping[str, Array],
    gradients: Mapping[str, Array],
    state: State,
    *,
    learning_rate: float,
    update: int,
) -> tuple[dict[str, Array], State]:
    """Apply one update: clip by the global norm, then update each parameter by its rule, with decoupled weight decay.

    `g = g * min(1, clip_norm / (norm + 1e-6))`; `p = p - lr * (direction(g) + weight_decay * p)`, in which lr is
    multiplied by the rule's `learning_rate_scale`.

    Args:
        config: hyperparameters.
        rules, parameters, gradients: by canonical name.
        state: `first_moment.NAME` and so on.
        learning_rate: learning rate of this update.
        update: t, 1 for the first update.

    Returns:
        The new parameters and state.

    Source: clipping: Pascanu et al. 2012, arXiv 1211.5063; decoupled decay: Loshchilov and Hutter 2017,
    arXiv 1711.05101.
    Differs: decay is scaled by the learning rate, as in PyTorch and optax, for every kind; 1e-6 in the clip factor, as
    in PyTorch.
    """
    scale = 1.0 if config.clip_norm is None else min(1.0, config.clip_norm / (global_norm(gradients) + 1e-6))
    new_parameters: dict[str, Array] = {}
    new_state: State = {}
    for name, rule in rules.items():
        value = parameters[name]
        own = {kind: state[f"{kind}.{name}"] for kind in rule.state_axes(value.ndim)}
        step, own = direction(rule.method, rule.matrix, value, scale * gradients[name], own, update)
        new_parameters[name] = value - learning_rate * rule.learning_rate_scale * (step + rule.weight_decay * value)
        new_state |= {f"{kind}.{name}": kept for kind, kept in own.items()}
    return new_parameters, new_state


def direction(
    method: Method, matrix: MatrixAxes | None, value: Array, gradient: Array, state: State, update: int
) -> tuple[Array, State]:
    """Return what an update subtracts, before learning rate and decay, and the new state of the parameter."""
    match method:
        case AdamWConfig() | MuonAdamW():
            return adamw(method, gradient, state, update)
        case MuonConfig():
            assert matrix is not None
            return muon(method, matrix, gradient, state)
        case LionConfig():
            return lion(method, gradient, state)
        case AdafactorConfig():
            assert matrix is not None
            return adafactor(method, matrix, value, gradient, state, update)
        case SGDConfig():
            return sgd(method, gradient, state)


def adamw(config: AdamWConfig | MuonAdamW, gradient: Array, state: State, update: int) -> tuple[Array, State]:
    """Return the direction of AdamW, and its moments: the gradient's mean over its root mean square, bias-corrected.

    `m = b1 m + (1 - b1) g`; `v = b2 v + (1 - b2) g^2`; `m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + epsilon)`.

    Source: Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm 2.
    """
    first = config.beta1 * state["first_moment"] + (1 - config.beta1) * gradient
    second = config.beta2 * state["second_moment"] + (1 - config.beta2) * np.square(gradient)
    corrected_first, corrected_second = first / (1 - config.beta1**update), second / (1 - config.beta2**update)
    step = corrected_first / (np.sqrt(corrected_second) + config.epsilon)
    return step, {"first_moment": first, "second_moment": second}


def muon(config: MuonConfig, matrix: MatrixAxes, gradient: Array, state: State) -> tuple[Array, State]:
    """Return the direction of Muon, and its momentum: for each matrix of a stack, nearly its nearest orthogonal one.

    `m = b m + (1 - b) g`; `u = (1 - b) g + b m` with Nesterov's momentum, else `m`; `s * newton_schulz(u)`, with u as
    matrices of inputs x outputs. s is `0.2 sqrt(max(inputs, outputs))`, for which numbers move as far as AdamW's do, or
    `sqrt(max(1, outputs / inputs))` (`original`).

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon, and his code, github.com/KellerJordan/Muon; scale
    `match_rms_adamw`: Liu et al. 2025, arXiv 2502.16982, section 2.2.
    Differs: float32 in the backends, where the sources compute in bfloat16.
    """
    first = config.momentum * state["first_moment"] + (1 - config.momentum) * gradient
    ahead = config.momentum * first + (1 - config.momentum) * gradient if config.nesterov else first
    stack, _, _ = matrix.split(gradient.shape)
    _, inputs, outputs = matrix.sizes(gradient.shape)
    orthogonal = newton_schulz(ahead.reshape(*stack, inputs, outputs), config.newton_schulz_steps)
    return muon_scale(config, inputs, outputs) * orthogonal.reshape(gradient.shape), {"first_moment": first}


def muon_scale(config: MuonConfig, inputs: int, outputs: int) -> float:
    """Return the factor of the orthogonal matrix in a Muon update."""
    if config.update_scale == "original":
        return math.sqrt(max(1.0, outputs / inputs))
    return 0.2 * math.sqrt(max(inputs, outputs))


def newton_schulz(matrices: Array, steps: int) -> Array:
    """Return matrices [..., rows, columns] with singular values near 1, and the same singular vectors.

    `X = X / (|X| + 1e-7)` with the Frobenius norm; then in each step `A = X X^T`, `X = a X + (b A + c A A) X`. A matrix
    with more rows than columns is transposed meanwhile. After five steps, singular values above 0.0015 of the norm are
    between 0.68 and 1.21.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    """
    a, b, c = NEWTON_SCHULZ
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = np.swapaxes(matrices, -1, -2) if transposed else matrices
    x = x / (np.sqrt(np.sum(np.square(x), axis=(-2, -1), keepdims=True)) + MUON_EPSILON)
    for _ in range(steps):
        gram = x @ np.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return np.swapaxes(x, -1, -2) if transposed else x


def lion(config: LionConfig, gradient: Array, state: State) -> tuple[Array, State]:
    """Return the direction of Lion, and its momentum.

    `sign(b1 m + (1 - b1) g)`, then `m = b2 m + (1 - b2) g`. Source: Chen et al. 2023, arXiv 2302.06675, algorithm 2.
    """
    first = state["first_moment"]
    step = np.sign(config.beta1 * first + (1 - config.beta1) * gradient)
    return step, {"first_moment": config.beta2 * first + (1 - config.beta2) * gradient}


def adafactor(
    config: AdafactorConfig, matrix: MatrixAxes, value: Array, gradient: Array, state: State, update: int
) -> tuple[Array, State]:
    """Return the direction of Adafactor, and its means of the squared gradient, of each matrix of a stack by itself.

    With `b = 1 - t^-decay_exponent` and `q = g^2 + 1e-30`: `r = b r + (1 - b) mean(q over outputs)` and
    `c = b c + (1 - b) mean(q over inputs)`; `v = r c / mean(r)`; of what is no matrix, `v = b v + (1 - b) q`. Then
    `u = g / sqrt(v)`, `u = u / max(1, rms(u) / update_clip)`, and, with `scale_by_parameter`, `max(1e-3, rms(p)) u`.

    Source: Shazeer and Stern 2018, arXiv 1804.04235, algorithms 2, 4 and 5.
    Differs: means in place of sums in r and c, which gives the same v; the learning rate is that of the schedule, and
    decay is not multiplied by `rms(p)`; no momentum. A stack's matrices, and the three axes of a projection to heads,
    are the parameter table's: other implementations take the last two axes, or the two largest.
    """
    every = tuple(range(gradient.ndim))
    _, inputs, outputs = matrix.split(every)
    weight, square = update**-config.decay_exponent, np.square(gradient) + ADAFACTOR_EPSILONS[0]

    def kept(kind: str, newest: Array) -> Array:
        return (1 - weight) * state[kind].reshape(newest.shape) + weight * newest

    if outputs:
        of_inputs = kept("second_moment_of_inputs", np.mean(square, axis=outputs, keepdims=True))
        of_outputs = kept("second_moment_of_outputs", np.mean(square, axis=inputs, keepdims=True))
        second = of_inputs / np.mean(of_inputs, axis=inputs, keepdims=True) * of_outputs
        found = {"second_moment_of_inputs": of_inputs, "second_moment_of_outputs": of_outputs}
    else:
        second = kept("second_moment", square)
        found = {"second_moment": second}
    step = gradient / np.sqrt(second)
    step = step / np.maximum(1.0, _rms(step, inputs + outputs) / config.update_clip)
    if config.scale_by_parameter:
        step = step * np.maximum(ADAFACTOR_EPSILONS[1], _rms(value, inputs + outputs))
    return step, {kind: array.reshape(state[kind].shape) for kind, array in found.items()}


def _rms(values: Array, axes: tuple[int, ...]) -> Array:
    return np.sqrt(np.mean(np.square(values), axis=axes, keepdims=True))


def sgd(config: SGDConfig, gradient: Array, state: State) -> tuple[Array, State]:
    """Return the direction of gradient descent, and its momentum.

    `m = b m + g`; `g + b m` with Nesterov's momentum, else `m`; without momentum `g`, and no state.

    Source: Sutskever et al. 2013, On the importance of initialization and momentum in deep learning, as PyTorch has it.
    Differs: decay is decoupled (arXiv 1711.05101, algorithm 1), not part of g.
    """
    if not config.momentum:
        return gradient, {}
    momentum = config.momentum * state["momentum"] + gradient
    return gradient + config.momentum * momentum if config.nesterov else momentum, {"momentum": momentum}
