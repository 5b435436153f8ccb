"""Optimizers, by optax where its mathematics is the reference's. Spec: moezoo.core.reference.optimizer.

AdamW, Lion and SGD are optax's. Muon and Adafactor are not: `optax.contrib.muon` corrects the bias of the momentum and
of the newest gradient by different factors before it adds them, and `optax.adafactor` factors the two largest axes,
of an expert stack E x D perhaps.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import optax

from moezoo.core.config.optimizers import (
    AdafactorConfig,
    AdamWConfig,
    LionConfig,
    MuonAdamW,
    MuonConfig,
    OptimizerConfig,
    SGDConfig,
)
from moezoo.core.config.update_rules import UpdateRule, state_axes
from moezoo.core.parameters import MatrixAxes
from moezoo.core.reference.optimizer import ADAFACTOR_EPSILONS, MUON_EPSILON, NEWTON_SCHULZ, muon_scale

Arrays = dict[str, jax.Array]


class _State(NamedTuple):
    """Number of updates done, and what the rules keep: by kind (`first_moment`, ...), then by parameter."""

    updates: jax.Array
    kept: dict[str, Arrays]


def make_optimizer(rules: Mapping[str, UpdateRule]) -> "_Optimizer":
    """Spec: moezoo.core.reference.optimizer.optimizer_step, without clipping. `rules`: by name of each array."""
    return _Optimizer(rules)


class _Optimizer:
    def __init__(self, rules: Mapping[str, UpdateRule]):
        self._rules = dict(rules)

    def init(self, parameters: Mapping[str, jax.Array]) -> _State:
        """Return the state before the first step."""
        shapes = {name: value.shape for name, value in parameters.items()}
        kept = {
            kind: {name: jnp.zeros([shapes[name][axis] for axis in axes]) for name, axes in own.items()}
            for kind, own in state_axes(self._rules, {name: len(shape) for name, shape in shapes.items()}).items()
        }
        return _State(jnp.zeros([], jnp.int32), kept)

    def update(
        self, parameters: Arrays, gradients: Arrays, state: _State, learning_rate: jax.Array
    ) -> tuple[Arrays, _State]:
        """Return the parameters and the state after one update."""
        updated: Arrays = {}
        kept: dict[str, Arrays] = {kind: {} for kind in state.kept}
        for name, rule in self._rules.items():
            value, own = parameters[name], {kind: held[name] for kind, held in state.kept.items() if name in held}
            step, own = _direction(rule, value, gradients[name], own, state.updates)
            step = step + rule.weight_decay * value if rule.weight_decay else step
            updated[name] = value - rule.learning_rate_scale * learning_rate * step
            for kind, array in own.items():
                kept[kind][name] = array
        return updated, _State(optax.safe_increment(state.updates), kept)


def global_norm(gradients: Any) -> jax.Array:
    """Spec: moezoo.core.reference.optimizer.global_norm."""
    norm: jax.Array = optax.tree.norm(gradients)
    return norm


def clip(config: OptimizerConfig, gradients: Any, norm: jax.Array) -> Any:
    """Clip gradients of that global norm; as moezoo.core.reference.optimizer.optimizer_step does it."""
    if config.clip_norm is None:
        return gradients
    scale = jnp.minimum(1.0, config.clip_norm / (norm + 1e-6))
    return jax.tree.map(lambda gradient: gradient * scale, gradients)


def newton_schulz(matrices: jax.Array, steps: int) -> jax.Array:
    """Spec: moezoo.core.reference.optimizer.newton_schulz."""
    a, b, c = NEWTON_SCHULZ
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = jnp.swapaxes(matrices, -1, -2) if transposed else matrices
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + MUON_EPSILON)
    for _ in range(steps):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return jnp.swapaxes(x, -1, -2) if transposed else x


def _direction(
    rule: UpdateRule, value: jax.Array, gradient: jax.Array, state: Arrays, count: jax.Array
) -> tuple[jax.Array, Arrays]:
    method = rule.method
    found: Any
    match method:
        case AdamWConfig() | MuonAdamW():
            adam = optax.ScaleByAdamState(count, state["first_moment"], state["second_moment"])
            step, found = optax.scale_by_adam(method.beta1, method.beta2, method.epsilon).update(gradient, adam)
            return step, {"first_moment": found.mu, "second_moment": found.nu}
        case MuonConfig():
            assert rule.matrix is not None
            return _muon(method, rule.matrix, gradient, state)
        case LionConfig():
            lion = optax.ScaleByLionState(count, state["first_moment"])
            step, found = optax.scale_by_lion(method.beta1, method.beta2).update(gradient, lion)
            return step, {"first_moment": found.mu}
        case AdafactorConfig():
            assert rule.matrix is not None
            return _adafactor(method, rule.matrix, value, gradient, state, count)
        case SGDConfig():
            if not method.momentum:
                return gradient, {}
            trace = optax.trace(method.momentum, method.nesterov)
            step, found = trace.update(gradient, optax.TraceState(state["momentum"]))
            return step, {"momentum": found.trace}
        case _:
            assert_never(method)


def _muon(config: MuonConfig, matrix: MatrixAxes, gradient: jax.Array, state: Arrays) -> tuple[jax.Array, Arrays]:
    """Spec: moezoo.core.reference.optimizer.muon."""
    first = config.momentum * state["first_moment"] + (1 - config.momentum) * gradient
    ahead = config.momentum * first + (1 - config.momentum) * gradient if config.nesterov else first
    stack, _, _ = matrix.split(gradient.shape)
    _, inputs, outputs = matrix.sizes(gradient.shape)
    orthogonal = newton_schulz(ahead.reshape(*stack, inputs, outputs), config.newton_schulz_steps)
    return muon_scale(config, inputs, outputs) * orthogonal.reshape(gradient.shape), {"first_moment": first}


def _adafactor(
    config: AdafactorConfig,
    matrix: MatrixAxes,
    value: jax.Array,
    gradient: jax.Array,
    state: Arrays,
    count: jax.Array,
) -> tuple[jax.Array, Arrays]:
    """Spec: moezoo.core.reference.optimizer.adafactor."""
    _, inputs, outputs = matrix.split(tuple(range(gradient.ndim)))
    weight = (count + 1).astype(jnp.float32) ** -config.decay_exponent
    square = jnp.square(gradient) + ADAFACTOR_EPSILONS[0]

    def kept(kind: str, newest: jax.Array) -> jax.Array:
        return (1 - weight) * state[kind].reshape(newest.shape) + weight * newest

    if outputs:
        of_inputs = kept("second_moment_of_inputs", jnp.mean(square, axis=outputs, keepdims=True))
        of_outputs = kept("second_moment_of_outputs", jnp.mean(square, axis=inputs, keepdims=True))
        relative = of_inputs / jnp.mean(of_inputs, axis=inputs, keepdims=True)
        # Trap: the product of the two means would be below the least float32.
        step = gradient * jax.lax.rsqrt(relative) * jax.lax.rsqrt(of_outputs)
        found = {"second_moment_of_inputs": of_inputs, "second_moment_of_outputs": of_outputs}
    else:
        second = kept("second_moment", square)
        step, found = gradient * jax.lax.rsqrt(second), {"second_moment": second}
    step = step / jnp.maximum(1.0, _rms(step, inputs + outputs) / config.update_clip)
    if config.scale_by_parameter:
        step = step * jnp.maximum(ADAFACTOR_EPSILONS[1], _rms(value, inputs + outputs))
    return step, {kind: array.reshape(state[kind].shape) for kind, array in found.items()}


def _rms(values: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(values), axis=axes, keepdims=True))
