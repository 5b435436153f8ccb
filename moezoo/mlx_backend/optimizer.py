"""AdamW, by MLX, or in blocks on x86. Spec: moezoo.core.reference.optimizer."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx import optimizers
from mlx.utils import tree_map

from moezoo.core.config.training import OptimizerConfig
from moezoo.mlx_backend.arrays import canonical_name
from moezoo.mlx_backend.kernels.x86 import pays
from moezoo.mlx_backend.kernels.x86.optimizer import adamw_kind, norm
from moezoo.mlx_backend.runtime.typed import flatten


def adamw(config: OptimizerConfig, decayed: Mapping[str, bool]) -> optimizers.MultiOptimizer:
    """Spec: moezoo.core.reference.optimizer.adamw, without clipping.

    `decayed`: by name of each array, whether weight decay acts on it.
    """

    def part(weight_decay: float) -> optimizers.AdamW:
        # Trap: MLX leaves bias correction out unless asked.
        betas = [config.beta1, config.beta2]
        return adamw_kind()(0.0, betas, config.epsilon, weight_decay, bias_correction=True)

    return optimizers.MultiOptimizer(
        [part(config.weight_decay), part(0.0)], [lambda path, _: decayed[canonical_name(path)]]
    )


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
    """Clip gradients of that global norm; as moezoo.core.reference.optimizer.adamw does it."""
    if config.clip_norm is None:
        return gradients
    scale = mx.minimum(1.0, config.clip_norm / (norm + 1e-6))
    if _are_many(gradients) and scale.item() == 1:  # for their norm they were computed, so nothing waits
        return gradients
    return tree_map(lambda gradient: gradient * scale, gradients)


def _are_many(gradients: Any) -> bool:
    return pays(sum(array.size for _, array in flatten(gradients)))
