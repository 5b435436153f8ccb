"""Dynamic mask attention. Spec: moezoo.core.reference.dynamic_mask."""

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import DynamicMaskSpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.kernels import projection
from moezoo.jax_backend.sparse_attention import choose_sources


class DynamicMask(nnx.Module):
    """Spec: moezoo.core.reference.dynamic_mask.key_bias; in float32."""

    def __init__(self, weights: Weights):
        self.w_step, self.rate = weights.parameter("w_step"), weights.parameter("rate")
        self.has_bias = weights.has("b_step")
        if self.has_bias:
            self.b_step = weights.parameter("b_step")

    def __call__(self, value_BSMH: jax.Array) -> jax.Array:
        value_BSMH, w_step = value_BSMH.astype(jnp.float32), self.w_step[...].astype(jnp.float32)
        step_BSM = projection.einsum("BSNH,NHM->BSM", value_BSMH, w_step)
        step_BSM = step_BSM + self.b_step[...].astype(jnp.float32) if self.has_bias else step_BSM
        bias_BSM = jnp.exp(self.rate[...].astype(jnp.float32) * jnp.logaddexp(step_BSM, 0.0))
        return bias_BSM.swapaxes(1, 2)


def keep_greatest(
    spec: DynamicMaskSpec | None, bias_BMS: jax.Array | None, mask_TS: jax.Array, position_S: jax.Array | None = None
) -> jax.Array:
    """Spec: moezoo.core.reference.dynamic_mask.keep_greatest.

    `position_S`, or [B, S]: where keys are, if they are not in order: slots of a window's cache are used again.
    """
    if spec is None or bias_BMS is None:
        return mask_TS
    shape = (*bias_BMS.shape[:2], *mask_TS.shape[-2:])
    mask_BMTS = jnp.broadcast_to(mask_TS if mask_TS.ndim == 2 else mask_TS[:, None], shape)
    if spec.keep >= mask_TS.shape[-1]:
        return mask_BMTS
    if position_S is None:
        return choose_sources(bias_BMS[:, :, None, ::-1], mask_BMTS[..., ::-1], spec.keep)[..., ::-1]
    latest_BS = jnp.broadcast_to(jnp.argsort(-position_S, axis=-1), (len(bias_BMS), mask_TS.shape[-1]))
    bias_BMS = jnp.take_along_axis(bias_BMS, latest_BS[:, None], axis=-1)
    mask_BMTS = jnp.take_along_axis(mask_BMTS, latest_BS[:, None, None], axis=-1)
    kept_BMTS = choose_sources(bias_BMS[:, :, None], mask_BMTS, spec.keep)
    return jnp.take_along_axis(kept_BMTS, jnp.argsort(latest_BS, axis=-1)[:, None, None], axis=-1)
