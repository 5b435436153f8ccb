"""Dynamic mask attention: a bias for each key by its token's values, and the keys with the greatest."""

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, adapter
from moezoo.core.reference.sparse_attention import choose_sources
from moezoo.core.spec import DynamicMaskSpec


def key_bias(parameters: Parameters, value_BSMH: Array) -> Array:
    """Return the bias of each key for each of M key/value heads: `exp(rate * softplus(values w_step + b_step))`.

    It is at least 0, and 1 for every key where the rate is 0, as it is at first.

    Args:
        parameters: `w_step` [M, H, M], from the values of all heads; `rate` [M]; and `b_step` [M], if it has one.
        value_BSMH: the values attended to.

    Returns:
        [B, M, S].

    Source: Shi et al. 2025, arXiv 2508.02124, section 3 (the step as of a state space model, Gu and Dao 2023, arXiv
    2312.00752); transformers 5.23, `DogeAttention`.
    """
    step_BSM = adapter.einsum("BSNH,NHM->BSM", value_BSMH, parameters["w_step"])
    step_BSM = step_BSM + parameters["b_step"] if "b_step" in parameters else step_BSM
    return np.swapaxes(np.exp(parameters["rate"] * np.logaddexp(0.0, step_BSM)), 1, 2)


def keep_greatest(spec: DynamicMaskSpec | None, bias_BMS: Array | None, mask_TS: Array) -> Array:
    """Return the `keep` unmasked keys with the greatest bias: bool [B, M, T, S], all where there are no more.

    Without a dynamic mask the mask itself.
    Ties go to the later key: with equal biases, as at first, it is a sliding window. No gradient.

    Args:
        spec: `keep`, at least 1, so that each query attends to something, though maybe not to itself.
        bias_BMS: as `key_bias` returns it.
        mask_TS: bool, what may be attended to; or one mask for each sequence, [B, T, S].

    Source: transformers 5.23, `DogeAttention.prepare_dynamic_mask`.
    Differs: ties, which it leaves to the order of a top-k.
    """
    if spec is None or bias_BMS is None:
        return mask_TS
    shape = (*bias_BMS.shape[:2], *mask_TS.shape[-2:])
    mask_BMTS = np.broadcast_to(mask_TS if mask_TS.ndim == 2 else mask_TS[:, None], shape)
    if spec.keep >= mask_TS.shape[-1]:
        return mask_BMTS
    return choose_sources(bias_BMS[:, :, None, ::-1], mask_BMTS[..., ::-1], spec.keep)[..., ::-1]
