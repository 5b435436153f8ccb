"""Cross-entropy per token, computed on all cores on x86."""

import mlx.core as mx

from moezoo.mlx_backend.kernels.x86 import pays
from moezoo.mlx_backend.kernels.x86.cross_entropy import log_losses


def softmax_losses(logits_PV: mx.array, target_P: mx.array) -> mx.array:
    """Return -log softmax(logits) of each target, float32 [P]."""
    if pays(logits_PV.size):
        return log_losses(logits_PV, target_P)
    chosen_P = mx.take_along_axis(logits_PV, target_P[:, None], axis=-1)[:, 0]
    return mx.logsumexp(logits_PV, axis=-1) - chosen_P
