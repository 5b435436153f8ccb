"""Cross-entropy per token, in parts that alternate over streams."""

from collections.abc import Callable

import mlx.core as mx

from moezoo.mlx_backend.kernels.x86.parts import LOG2_E
from moezoo.mlx_backend.runtime.streams import streams
from moezoo.mlx_backend.runtime.typed import custom_function


def log_losses(logits_PV: mx.array, target_P: mx.array) -> mx.array:
    """Return -log softmax(logits) of each target, float32. [P, V] is large: MiB-sized parts alternate over streams."""
    num_rows, vocab = logits_PV.shape
    size = max(1, 2**21 // vocab)
    cuts = list(range(size, num_rows, size))

    def in_turns(compute: Callable[..., mx.array], *arrays: mx.array) -> mx.array:
        parts = []
        for turn, part in enumerate(zip(*(mx.split(array, cuts) for array in arrays), strict=True)):
            with mx.stream(streams()[turn % len(streams())]):
                parts.append(compute(*part))
        return mx.concatenate(parts)

    def powers(logits: mx.array, largest: mx.array) -> mx.array:
        # Trap: subtracting the logarithm of the sum instead would lose the digits that large logits lose in it.
        return mx.power(2.0, (logits - largest[:, None]) * LOG2_E)

    def gradient_of_part(
        logits: mx.array, target: mx.array, largest: mx.array, total: mx.array, gradient: mx.array
    ) -> mx.array:
        share = powers(logits, largest) * (gradient / total)[:, None]
        return share.at[mx.arange(len(target)), target].add(-gradient)

    @custom_function
    def forward(logits: mx.array, target: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        largest = in_turns(lambda part: mx.max(part, axis=-1), logits)
        total = in_turns(lambda *part: mx.sum(powers(*part), axis=-1), logits, largest)
        chosen = mx.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return mx.log(total) + (largest - chosen), largest, total

    @forward.vjp
    def _(
        primals: tuple[mx.array, ...], gradients: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array]:
        found = in_turns(gradient_of_part, *primals, *outputs[1:], gradients[0])
        return found, mx.zeros_like(primals[1])

    return forward(logits_PV, target_P)[0]
