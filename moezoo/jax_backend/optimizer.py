"""AdamW, by optax. Spec: moezoo.core.reference.optimizer."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moezoo.core.config.training import OptimizerConfig


def adamw(config: OptimizerConfig, decayed: Mapping[str, bool]) -> Callable[[Any], optax.GradientTransformation]:
    """Spec: moezoo.core.reference.optimizer.adamw, without clipping; a function of the learning rate.

    `decayed`: by name of each array, whether weight decay acts on it.
    """
    return lambda learning_rate: optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=dict(decayed)),
        optax.scale_by_learning_rate(learning_rate),
    )


def global_norm(gradients: Any) -> jax.Array:
    """Spec: moezoo.core.reference.optimizer.global_norm."""
    norm: jax.Array = optax.tree.norm(gradients)
    return norm


def clip(config: OptimizerConfig, gradients: Any, norm: jax.Array) -> Any:
    """Clip gradients of that global norm; as moezoo.core.reference.optimizer.adamw does it."""
    if config.clip_norm is None:
        return gradients
    scale = jnp.minimum(1.0, config.clip_norm / (norm + 1e-6))
    return jax.tree.map(lambda gradient: gradient * scale, gradients)
