"""Lightning attention. Spec: moezoo.core.reference.lightning_attention."""

import mlx.core as mx
from mlx import nn

from moezoo.core.reference.linear_recurrence import FORGETS
from moezoo.core.spec import LightningAttentionSpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.kv_cache import Attended, StateCache, empty_state_cache
from moezoo.mlx_backend.linear_recurrence import linear_recurrence
from moezoo.mlx_backend.normalization import norm
from moezoo.mlx_backend.positions import Documents, positions


class LightningAttention(nn.Module):
    """Spec: moezoo.core.reference.lightning_attention.lightning_attention; with a cache, for the next tokens."""

    def __init__(self, spec: LightningAttentionSpec, weights: Weights, layer: int):
        super().__init__()
        del layer  # all layers are alike
        self.spec = spec
        self.w_query = weights.parameter("w_query")
        self.w_key = weights.parameter("w_key")
        self.w_value = weights.parameter("w_value")
        self.w_gate = weights.parameter("w_gate")
        self.output_norm = norm(spec.norm, weights.inside("output_norm"), axes=2)
        self.w_output = weights.parameter("w_output")

    def __call__(
        self,
        x_BTD: mx.array,
        cache: StateCache | None = None,
        *,
        first_value_BTMH: mx.array | None = None,
        first_B: mx.array | None = None,
        documents: Documents | None = None,
    ) -> Attended:
        """With a cache, the tokens follow the cached ones; row b starts at slot `first_B`, after its left padding."""
        del first_value_BTMH  # only grouped-query attention uses it
        spec, dtype = self.spec, x_BTD.dtype
        query, key, value, gate = (self._projected(which, x_BTD) for which in ("query", "key", "value", "gate"))
        query, key, value = nn.silu(query), nn.silu(key), nn.silu(value)
        batch, length = x_BTD.shape[:2]
        if first_B is not None:  # padding keeps a state of zeros
            real_BT1 = positions(length, 0 if cache is None else cache.length, first_B)[..., None] >= 0
            key = mx.where(real_BT1[..., None], key, 0.0)
        # One row for all sequences, unless they differ in where documents begin.
        log_decay = mx.broadcast_to(-decay_rates(spec), (1, length, spec.num_heads))
        if documents is not None:
            log_decay = mx.where(documents.position_BT[..., None] == 0, FORGETS, log_decay)
        past = empty_state_cache(spec, batch) if cache is None else cache
        read, state_BMGHZ = linear_recurrence(query, key, value[..., None, :], log_decay[..., None], past.state_BMGHZ)
        if cache is not None:
            cache = cache.extend(state_BMGHZ, length)
        normed = mx.sigmoid(gate) * self.output_norm(read.reshape(value.shape))
        output = projection.einsum("BTNH,NHD->BTD", normed.astype(dtype), self.w_output.astype(dtype))
        return Attended(output, cache, None, None)

    def _projected(self, which: str, x_BTD: mx.array) -> mx.array:
        w_DNH = getattr(self, f"w_{which}").astype(x_BTD.dtype)
        return projection.einsum("BTD,DNH->BTNH", x_BTD, w_DNH).astype(mx.float32)


def decay_rates(spec: LightningAttentionSpec) -> mx.array:
    """Spec: moezoo.core.reference.lightning_attention.decay_rates."""
    head_N = mx.arange(1, spec.num_heads + 1)
    return spec.decay_scale * 2.0 ** (-8 * head_N / spec.num_heads)
