"""AdamW and the norm of gradients in blocks, each of which is read once."""

from collections.abc import Iterator, Sequence
from functools import partial

import mlx.core as mx
import numpy as np
from mlx import optimizers

from moezoo.mlx_backend.kernels.x86 import is_x86_cpu, pays
from moezoo.mlx_backend.runtime.cores import BLOCK, Floats, on_all_cores, values, zeros

_LARGE_BLOCK = 4 * BLOCK  # nothing is read twice, so fewer calls count more than a cache


class BlockedAdamW(optimizers.AdamW):
    """MLX's AdamW with bias correction, without new arrays.

    Moments, which the optimizer alone holds, are updated in place. The updated parameter is written to the memory of
    its gradient, which nothing else needs: others may still hold the old parameter.
    """

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        if not pays(parameter.size):
            return super().apply_single(gradient, parameter, state)  # type: ignore[no-any-return]
        (beta1, beta2), step, learning_rate = self.betas, self.step.item(), self.learning_rate.item()
        of_second = np.sqrt(1 - beta2**step)
        kept, rate = np.float32(1 - learning_rate * self.weight_decay), learning_rate / (1 - beta1**step)
        arrays = values(gradient, parameter, state["m"], state["v"])
        updated, out = (gradient, arrays[0]) if arrays[0].flags.c_contiguous else zeros(*parameter.shape)

        def update(out: Floats, gradient: Floats, value: Floats, first: Floats, second: Floats) -> None:
            change = gradient * np.float32(1 - beta1)
            first *= np.float32(beta1)
            first += change
            np.multiply(gradient, gradient, out=change)
            change *= np.float32(1 - beta2)
            second *= np.float32(beta2)
            second += change
            np.sqrt(second, out=change)
            change += np.float32(self.eps * of_second)
            np.divide(first, change, out=change)
            change *= np.float32(rate * of_second)
            np.multiply(value, kept, out=out)
            out -= change

        on_all_cores(partial(update, *block) for block in zip(*map(_blocks, (out, *arrays)), strict=True))
        return updated


def adamw_kind() -> type[optimizers.AdamW]:
    """Return the AdamW of this platform."""
    return BlockedAdamW if is_x86_cpu() else optimizers.AdamW


def norm(arrays: Sequence[mx.array]) -> mx.array:
    """Return the Euclidean norm of all elements; blocks are summed in float64."""
    sums: list[float] = []

    def add(block: Floats) -> None:
        sums.append(float(np.dot(block, block)))

    on_all_cores(partial(add, block) for array in values(*arrays) for block in _blocks(array))
    return mx.array(np.sqrt(sum(sums)), mx.float32)


def _blocks(array: Floats) -> Iterator[Floats]:
    flat = array.reshape(-1)
    return (flat[start : start + _LARGE_BLOCK] for start in range(0, flat.size, _LARGE_BLOCK))
