"""Dynamic mask attention. Spec: moezoo.core.reference.dynamic_mask."""

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import DynamicMaskSpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.sparse_attention import choose_sources


class DynamicMask(nn.Module):
    """Spec: moezoo.core.reference.dynamic_mask.key_bias; in float32."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.w_step, self.rate = weights.parameter("w_step"), weights.parameter("rate")
        self.has_bias = weights.has("b_step")
        if self.has_bias:
            self.b_step = weights.parameter("b_step")

    def __call__(self, value_BSMH: mx.array) -> mx.array:
        value_BSMH, w_step = value_BSMH.astype(mx.float32), self.w_step.astype(mx.float32)
        step_BSM = projection.einsum("BSNH,NHM->BSM", value_BSMH, w_step)
        step_BSM = step_BSM + self.b_step.astype(mx.float32) if self.has_bias else step_BSM
        bias_BSM = mx.exp(self.rate.astype(mx.float32) * mx.logaddexp(step_BSM, 0.0))
        return bias_BSM.swapaxes(1, 2)


def keep_greatest(
    spec: DynamicMaskSpec | None,
    bias_BMS: mx.array | None,
    mask_TS: mx.array | None,
    position_S: mx.array | None = None,
) -> mx.array | None:
    """Spec: moezoo.core.reference.dynamic_mask.keep_greatest; no mask: every key may be attended to.

    `position_S`, or [B, S]: where keys are, if they are not in order: slots of a window's cache are used again.
    """
    if spec is None or bias_BMS is None:
        return mask_TS
    assert mask_TS is not None
    shape = (*bias_BMS.shape[:2], *mask_TS.shape[-2:])
    mask_BMTS = mx.broadcast_to(mask_TS if mask_TS.ndim == 2 else mask_TS[:, None], shape)
    if spec.keep >= mask_TS.shape[-1]:
        return mask_BMTS
    if position_S is None:
        return choose_sources(bias_BMS[:, :, None, ::-1], mask_BMTS[..., ::-1], spec.keep)[..., ::-1]
    latest_BS = mx.broadcast_to(mx.argsort(-position_S, axis=-1), (len(bias_BMS), mask_TS.shape[-1]))
    bias_BMS = mx.take_along_axis(bias_BMS, latest_BS[:, None], axis=-1)
    mask_BMTS = mx.take_along_axis(mask_BMTS, latest_BS[:, None, None], axis=-1)
    kept_BMTS = choose_sources(bias_BMS[:, :, None], mask_BMTS, spec.keep)
    return mx.take_along_axis(kept_BMTS, mx.argsort(latest_BS, axis=-1)[:, None, None], axis=-1)
