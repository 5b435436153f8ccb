"""Optimizers, by MLX where its mathematics is the reference's. Spec: moezoo.core.reference.optimizer.

AdamW (in blocks on x86), Lion, and SGD without decay are MLX's. Its Muon makes one matrix E x (D F) of an expert stack,
and adds decay to the gradient; its Adafactor factors the last two axes, of a projection to heads N x H.
"""

from collections.abc import Iterator, Mapping
from typing import Any, assert_never

import mlx.core as mx
from mlx import optimizers
from mlx.utils import tree_map

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
from moezoo.core.reference.optimizer import ADAFACTOR_EPSILONS, MUON_EPSILON, NEWTON_SCHULZ, muon_scale
from moezoo.mlx_backend.arrays import canonical_name
from moezoo.mlx_backend.kernels.x86 import pays
from moezoo.mlx_backend.kernels.x86.optimizer import adamw_kind, norm
from moezoo.mlx_backend.runtime.typed import flatten


def make_optimizer(rules: Mapping[str, UpdateRule]) -> "_Optimizer":
    """Spec: moezoo.core.reference.optimizer.optimizer_step, without clipping. `rules`: by name of each array."""
    return _Optimizer(rules)


class _Optimizer(optimizers.MultiOptimizer):
    """One of MLX's optimizers, or of those below, for each rule."""

    def __init__(self, rules: Mapping[str, UpdateRule]):
        self._rules = list(dict.fromkeys(rules.values()))
        filters = [lambda path, _, rule=rule: rules[canonical_name(path)] == rule for rule in self._rules[:-1]]
        super().__init__([_part(rule) for rule in self._rules], filters)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next update."""
        for rule, part in zip(self._rules, self.optimizers, strict=True):
            part.learning_rate = rule.learning_rate_scale * learning_rate

    def named_state(self) -> dict[str, mx.array]:
        """Return what the rules keep: `first_moment.NAME` and so on."""
        return {f"{kind}.{name}": value for part in self.optimizers for kind, name, _, value in _kept(part)}

    def restore(self, state: Mapping[str, Any], update: int) -> None:
        """Continue from the arrays of `named_state` after so many updates."""
        for part in self.optimizers:
            for kind, name, path, _ in list(_kept(part)):
                _put(part.state, path, mx.array(state[f"{kind}.{name}"]))
            part.state["step"] = mx.array(update, mx.uint64)


_KINDS = {"m": "first_moment", "v": "second_moment"}
"""Our names of MLX's; SGD's `v` is the momentum."""


def _kept(part: optimizers.Optimizer) -> Iterator[tuple[str, str, str, mx.array]]:
    """Yield kind, parameter, path in MLX's state, and value of all that an optimizer keeps of its parameters."""
    for path, value in flatten(part.state):
        own, _, kind = path.rpartition(".")
        if own:  # not the step, nor the learning rate
            kind = "momentum" if isinstance(part, _SGD) else _KINDS.get(kind, kind)
            yield kind, canonical_name(own), path, value


def _put(tree: Any, path: str, value: mx.array) -> None:
    """Replace an array of a tree, whose empty parts (modules without trained parameters) stay."""
    *outer, last = path.split(".")
    for step in outer:
        tree = tree[int(step)] if isinstance(tree, list) else tree[step]
    tree[last] = value


def global_norm(gradients: Any) -> mx.array:
    """Spec: moezoo.core.reference.optimizer.global_norm."""
    arrays = [gradient for _, gradient in flatten(gradients)]
    if _are_many(gradients):
        return norm(arrays)
    # Trap: one float32 sum over a large array loses digits on the CPU (4e-5 of the norm at 2.6 M parameters), so the
    # last axis is summed first.
    squares = [mx.sum(mx.sum(mx.square(gradient), axis=-1)) for gradient in arrays]
    return mx.sqrt(mx.sum(mx.stack(squares)))


def clip(config: OptimizerConfig, gradients: Any, norm: mx.array) -> Any:
    """Clip gradients of that global norm; as moezoo.core.reference.optimizer.optimizer_step does it."""
    if config.clip_norm is None:
        return gradients
    scale = mx.minimum(1.0, config.clip_norm / (norm + 1e-6))
    if _are_many(gradients) and scale.item() == 1:  # for their norm they were computed, so nothing waits
        return gradients
    return tree_map(lambda gradient: gradient * scale, gradients)


def _are_many(gradients: Any) -> bool:
    return pays(sum(array.size for _, array in flatten(gradients)))


def newton_schulz(matrices: mx.array, steps: int) -> mx.array:
    """Spec: moezoo.core.reference.optimizer.newton_schulz."""
    a, b, c = NEWTON_SCHULZ
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = mx.swapaxes(matrices, -1, -2) if transposed else matrices
    # Trap: see global_norm.
    x = x / (mx.sqrt(mx.sum(mx.sum(mx.square(x), axis=-1, keepdims=True), axis=-2, keepdims=True)) + MUON_EPSILON)
    for _ in range(steps):
        gram = x @ mx.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return mx.swapaxes(x, -1, -2) if transposed else x


def _part(rule: UpdateRule) -> optimizers.Optimizer:
    """Return the optimizer of the parameters of one rule."""
    method = rule.method
    match method:
        case AdamWConfig() | MuonAdamW():
            # Trap: MLX leaves bias correction out unless asked.
            betas = [method.beta1, method.beta2]
            return adamw_kind()(0.0, betas, method.epsilon, rule.weight_decay, bias_correction=True)
        case LionConfig():
            return optimizers.Lion(0.0, [method.beta1, method.beta2], rule.weight_decay)
        case SGDConfig():
            return _SGD(method, rule.weight_decay)
        case MuonConfig():
            return _Muon(method, rule)
        case AdafactorConfig():
            return _Adafactor(method, rule)
        case _:
            assert_never(method)


class _SGD(optimizers.SGD):
    """MLX's, with decoupled decay; and without momentum, nothing is kept."""

    def __init__(self, config: SGDConfig, weight_decay: float):
        super().__init__(0.0, config.momentum, nesterov=config.nesterov)
        self._weight_decay = weight_decay

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        if self.momentum:
            super().init_single(parameter, state)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        updated: mx.array = super().apply_single(gradient, parameter, state)
        return updated - self.learning_rate * self._weight_decay * parameter if self._weight_decay else updated


class _ByMatrix(optimizers.Optimizer):
    """An update that treats each matrix of a stack by itself."""

    def __init__(self, config: Any, rule: UpdateRule):
        super().__init__()
        assert rule.matrix is not None
        self.learning_rate = 0.0
        self._config, self._rule, self._matrix = config, rule, rule.matrix

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        for kind, axes in self._rule.state_axes(parameter.ndim).items():
            state[kind] = mx.zeros([parameter.shape[axis] for axis in axes])

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        step, kept = self._direction(parameter, gradient, state)
        state.update(kept)
        step = step + self._rule.weight_decay * parameter if self._rule.weight_decay else step
        updated: mx.array = parameter - self.learning_rate * step
        return updated

    def _direction(
        self, value: mx.array, gradient: mx.array, state: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        raise NotImplementedError


class _Muon(_ByMatrix):
    def _direction(
        self, value: mx.array, gradient: mx.array, state: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        return _muon(self._config, self._matrix, gradient, state)


class _Adafactor(_ByMatrix):
    def _direction(
        self, value: mx.array, gradient: mx.array, state: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        return _adafactor(self._config, self._matrix, value, gradient, state, self.step)


def _muon(
    config: MuonConfig, matrix: MatrixAxes, gradient: mx.array, state: dict[str, mx.array]
) -> tuple[mx.array, dict[str, mx.array]]:
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
    value: mx.array,
    gradient: mx.array,
    state: dict[str, mx.array],
    update: mx.array,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Spec: moezoo.core.reference.optimizer.adafactor."""
    _, inputs, outputs = matrix.split(tuple(range(gradient.ndim)))
    weight = update.astype(mx.float32) ** -config.decay_exponent
    square = mx.square(gradient) + ADAFACTOR_EPSILONS[0]

    def kept(kind: str, newest: mx.array) -> mx.array:
        return (1 - weight) * state[kind].reshape(newest.shape) + weight * newest

    if outputs:
        of_inputs = kept("second_moment_of_inputs", _mean(square, outputs))
        of_outputs = kept("second_moment_of_outputs", _mean(square, inputs))
        relative = of_inputs / _mean(of_inputs, inputs)
        # Trap: the product of the two means would be below the least float32.
        step = gradient * mx.rsqrt(relative) * mx.rsqrt(of_outputs)
        found = {"second_moment_of_inputs": of_inputs, "second_moment_of_outputs": of_outputs}
    else:
        second = kept("second_moment", square)
        step, found = gradient * mx.rsqrt(second), {"second_moment": second}
    step = step / mx.maximum(1.0, _rms(step, inputs + outputs) / config.update_clip)
    if config.scale_by_parameter:
        step = step * mx.maximum(ADAFACTOR_EPSILONS[1], _rms(value, inputs + outputs))
    return step, {kind: array.reshape(state[kind].shape) for kind, array in found.items()}


def _rms(values: mx.array, axes: tuple[int, ...]) -> mx.array:
    return mx.sqrt(_mean(mx.square(values), axes))


def _mean(values: mx.array, axes: tuple[int, ...]) -> mx.array:
    """Return means over axes, which are kept; one axis at a time (the trap of global_norm)."""
    for axis in reversed(axes):
        values = mx.mean(values, axis=axis, keepdims=True)
    return values
