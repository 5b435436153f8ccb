"""Queries, keys and values that mix those of the last tokens. Spec: moezoo.core.reference.convolutional_attention."""

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import GroupedQueryAttentionSpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.kv_cache import ConvolutionState, empty_convolution_state
from moezoo.mlx_backend.positions import Documents, causal_windows
from moezoo.mlx_backend.quantization import as_array


class HeadConvolution(nn.Module):
    """Both convolutions of queries, or of keys."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.conv, self.b_conv = weights.parameter("conv"), weights.parameter("b_conv")
        self.mix, self.b_mix = weights.parameter("mix"), weights.parameter("b_mix")

    def __call__(
        self, x_BTNH: mx.array, conv_BSNH: mx.array, mix_BSNH: mx.array, documents: Documents | None
    ) -> tuple[mx.array, mx.array]:
        """Return the output in float32, and the inputs of the second convolution; earlier inputs of both are given."""
        conv_WNH = as_array(self.conv).astype(mx.float32)
        windows = causal_windows(x_BTNH, conv_BSNH, documents)
        filtered = sum((row * own for row, own in zip(windows, conv_WNH, strict=True)), mx.array(0.0))
        filtered_BTNH = filtered.astype(x_BTNH.dtype)
        mix_WNHZ = as_array(self.mix).astype(mx.float32)
        windows = causal_windows(filtered_BTNH, mix_BSNH, documents)
        mixed = sum(
            (
                mx.einsum("BTNH,NHZ->BTNZ", row.astype(mx.float32), own)
                for row, own in zip(windows, mix_WNHZ, strict=True)
            ),
            mx.array(0.0),
        )
        b_conv_NH, b_mix_NZ = (as_array(self.b_conv).astype(mx.float32), as_array(self.b_mix).astype(mx.float32))
        bias_NZ = mx.einsum("NH,NHZ->NZ", b_conv_NH, mx.sum(mix_WNHZ, axis=0)) + b_mix_NZ
        return mixed + bias_NZ, filtered_BTNH


class ConvolvedHeads(nn.Module):
    """Spec: moezoo.core.reference.convolutional_attention, `convolved` and `half_delayed_values`; means in float32."""

    def __init__(self, spec: GroupedQueryAttentionSpec, weights: Weights):
        super().__init__()
        self.spec = spec
        self.query, self.key = HeadConvolution(weights.inside("query")), HeadConvolution(weights.inside("key"))
        self.w_value, self.w_value_before = weights.parameter("w_value"), weights.parameter("w_value_before")
        if spec.qkv_bias:
            self.b_value, self.b_value_before = weights.parameter("b_value"), weights.parameter("b_value_before")

    def __call__(
        self,
        x_BTD: mx.array,
        query_BTNH: mx.array,
        key_BTMH: mx.array,
        state: ConvolutionState | None,
        real_BT: mx.array | None,
        documents: Documents | None,
    ) -> tuple[mx.array, mx.array, mx.array, ConvolutionState]:
        """Return queries, keys, values, and the state after `state`; tokens that are not real are padding."""
        dtype, (batch, length, num_heads, head_dim) = x_BTD.dtype, query_BTNH.shape
        now_BTZ = projection.einsum("BTD,DZ->BTZ", x_BTD, self.w_value.astype(dtype))
        before_BTZ = projection.einsum("BTD,DZ->BTZ", x_BTD, self.w_value_before.astype(dtype))
        if real_BT is not None:
            query_BTNH, key_BTMH = (
                mx.where(real_BT[..., None, None], heads, 0).astype(dtype) for heads in (query_BTNH, key_BTMH)
            )
            before_BTZ = mx.where(real_BT[..., None], before_BTZ, 0).astype(dtype)
        past = empty_convolution_state(self.spec, batch, dtype) if state is None else state
        mixed_query, filtered_query = self.query(query_BTNH, past.query_BSNH, past.filtered_query_BSNH, documents)
        mixed_key, filtered_key = self.key(key_BTMH, past.key_BSMH, past.filtered_key_BSMH, documents)
        groups = num_heads // key_BTMH.shape[2]
        query_mean = (query_BTNH.astype(mx.float32) + mx.repeat(key_BTMH, groups, axis=2)) / 2
        key_mean = mx.mean(query_mean.reshape(batch, length, -1, groups, head_dim), axis=3)
        query, key = (mixed_query + query_mean).astype(dtype), (mixed_key + key_mean).astype(dtype)
        state = past.extend(query_BTNH, key_BTMH, filtered_query, filtered_key, before_BTZ)
        before_BTZ, _ = causal_windows(before_BTZ, past.value_BSZ, documents)
        if self.spec.qkv_bias:
            now_BTZ = now_BTZ + self.b_value.astype(dtype)
            before_BTZ = before_BTZ + self.b_value_before.astype(dtype)
        value = mx.concatenate([now_BTZ, before_BTZ], axis=-1).reshape(batch, length, self.spec.num_kv_heads, -1)
        return query, key, value, state
