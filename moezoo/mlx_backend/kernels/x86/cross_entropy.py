"""Cross-entropy per token, some rows of the logits at a time."""

from functools import partial

import mlx.core as mx
import numpy as np

from moezoo.mlx_backend.runtime.cores import Floats, blocks, on_all_cores, values, zeros
from moezoo.mlx_backend.runtime.typed import custom_function


def log_losses(logits_PV: mx.array, target_P: mx.array) -> mx.array:
    """Return -log softmax(logits) of each target, float32. The backward pass computes the exponentials again."""
    mx.eval(target_P)
    target, kept = np.asarray(target_P), list[Floats]()

    @custom_function
    def forward(logits_PV: mx.array) -> mx.array:
        (logits,) = values(logits_PV)
        loss_P, loss = zeros(len(logits))
        largest, total = (np.empty((len(logits), 1), np.float32) for _ in range(2))
        kept[:] = largest, total

        def forward_of(rows: slice) -> None:
            of_rows = logits[rows]
            np.max(of_rows, axis=-1, keepdims=True, out=largest[rows])
            np.sum(np.exp(of_rows - largest[rows]), axis=-1, keepdims=True, out=total[rows])
            chosen = np.take_along_axis(of_rows, target[rows, None], axis=-1)
            loss[rows] = (np.log(total[rows]) + (largest[rows] - chosen))[:, 0]

        on_all_cores(partial(forward_of, rows) for rows in blocks(*logits.shape))
        return loss_P

    @forward.vjp
    def _(logits_PV: mx.array, gradient: mx.array, out: mx.array) -> mx.array:
        logits, of_loss = values(logits_PV, gradient)
        of_logits_PV, of_logits = zeros(*logits.shape)
        largest, total = kept

        def backward_of(rows: slice) -> None:
            of_rows = of_logits[rows]
            # Trap: subtracting the logarithm of the sum instead would lose the digits that large logits lose in it.
            np.subtract(logits[rows], largest[rows], out=of_rows)
            np.exp(of_rows, out=of_rows)
            of_rows *= of_loss[rows, None] / total[rows]
            of_rows[np.arange(len(of_rows)), target[rows]] -= of_loss[rows]

        on_all_cores(partial(backward_of, rows) for rows in blocks(*logits.shape))
        return of_logits_PV

    return forward(logits_PV.astype(mx.float32))
