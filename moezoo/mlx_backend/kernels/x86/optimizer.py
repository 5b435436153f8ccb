"""AdamW with one fused loop per array."""

import functools
import shutil
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx import optimizers

from moezoo.mlx_backend.kernels.x86 import is_x86_cpu
from moezoo.mlx_backend.runtime.streams import streams


def can_fuse() -> bool:
    """Return True if `mx.compile` can fuse operations into one loop. Without a compiler it silently fuses none."""
    return is_x86_cpu() and shutil.which("g++") is not None


class FusedAdamW(optimizers.AdamW):
    """MLX's AdamW with bias correction; the update of an array is one fused loop, and arrays alternate over streams."""

    def init(self, parameters: Any) -> None:
        super().init(parameters)
        self._turn = 0

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        beta1, beta2 = self.betas
        step, rate = self.step.astype(mx.float32), self.learning_rate.astype(mx.float32)
        factors = mx.stack([1 - rate * self.weight_decay, rate / (1 - beta1**step), mx.rsqrt(1 - beta2**step)])
        self._turn = (getattr(self, "_turn", 0) + 1) % len(streams())
        update = _adamw_update(self._turn, beta1, beta2, self.eps)
        parameter, state["m"], state["v"] = update(gradient, parameter, state["m"], state["v"], *factors)
        return parameter


def adamw_kind() -> type[optimizers.AdamW]:
    """Return the AdamW of this platform: fused where `mx.compile` can fuse, else MLX's."""
    return FusedAdamW if can_fuse() else optimizers.AdamW


@functools.cache
def _adamw_update(turn: int, beta1: float, beta2: float, epsilon: float) -> Callable[..., list[mx.array]]:
    """Return the compiled update of a stream: a compiled function stays on the stream where it was traced."""

    def update(
        gradient: mx.array,
        parameter: mx.array,
        first: mx.array,
        second: mx.array,
        kept: mx.array,
        rate: mx.array,
        root: mx.array,
    ) -> list[mx.array]:
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * (gradient * gradient)
        return [parameter * kept - rate * first / (mx.sqrt(second) * root + epsilon), first, second]

    compiled = mx.compile(update, shapeless=True)

    def on_stream(*arrays: mx.array) -> list[mx.array]:
        with mx.stream(streams()[turn]):
            updated: list[mx.array] = compiled(*arrays)
            return updated

    return on_stream
