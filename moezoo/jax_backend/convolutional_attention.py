"""Queries, keys and values that mix those of the last tokens. Spec: moezoo.core.reference.convolutional_attention."""

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import GroupedQueryAttentionSpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.kernels import projection
from moezoo.jax_backend.kv_cache import ConvolutionState, empty_convolution_state
from moezoo.jax_backend.positions import Documents, causal_windows


class HeadConvolution(nnx.Module):
    """Both convolutions of queries, or of keys."""

    def __init__(self, weights: Weights):
        self.conv, self.b_conv = weights.parameter("conv"), weights.parameter("b_conv")
        self.mix, self.b_mix = weights.parameter("mix"), weights.parameter("b_mix")

    def __call__(
        self, x_BTNH: jax.Array, conv_BSNH: jax.Array, mix_BSNH: jax.Array, documents: Documents | None
    ) -> tuple[jax.Array, jax.Array]:
        """Return the output in float32, and the inputs of the second convolution; earlier inputs of both are given."""
        conv_WNH = self.conv[...].astype(jnp.float32)
        windows = causal_windows(x_BTNH, conv_BSNH, documents)
        filtered = sum((row * own for row, own in zip(windows, conv_WNH, strict=True)), jnp.float32(0))
        filtered_BTNH = filtered.astype(x_BTNH.dtype)
        mix_WNHZ = self.mix[...].astype(jnp.float32)
        windows = causal_windows(filtered_BTNH, mix_BSNH, documents)
        mixed = sum(
            (
                jnp.einsum("BTNH,NHZ->BTNZ", row.astype(jnp.float32), own)
                for row, own in zip(windows, mix_WNHZ, strict=True)
            ),
            jnp.float32(0),
        )
        b_conv_NH, b_mix_NZ = (self.b_conv[...].astype(jnp.float32), self.b_mix[...].astype(jnp.float32))
        bias_NZ = jnp.einsum("NH,NHZ->NZ", b_conv_NH, jnp.sum(mix_WNHZ, axis=0)) + b_mix_NZ
        return mixed + bias_NZ, filtered_BTNH


class ConvolvedHeads(nnx.Module):
    """Spec: moezoo.core.reference.convolutional_attention, `convolved` and `half_delayed_values`; means in float32."""

    def __init__(self, spec: GroupedQueryAttentionSpec, weights: Weights):
        self.spec = spec
        self.query, self.key = HeadConvolution(weights.inside("query")), HeadConvolution(weights.inside("key"))
        self.w_value, self.w_value_before = weights.parameter("w_value"), weights.parameter("w_value_before")
        if spec.qkv_bias:
            self.b_value, self.b_value_before = weights.parameter("b_value"), weights.parameter("b_value_before")

    def __call__(
        self,
        x_BTD: jax.Array,
        query_BTNH: jax.Array,
        key_BTMH: jax.Array,
        state: ConvolutionState | None,
        real_BT: jax.Array | None,
        documents: Documents | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array, ConvolutionState]:
        """Return queries, keys, values, and the state after `state`; tokens that are not real are padding."""
        dtype, (batch, length, num_heads, head_dim) = x_BTD.dtype, query_BTNH.shape
        now_BTZ = projection.einsum("BTD,DZ->BTZ", x_BTD, self.w_value[...].astype(dtype))
        before_BTZ = projection.einsum("BTD,DZ->BTZ", x_BTD, self.w_value_before[...].astype(dtype))
        if real_BT is not None:
            query_BTNH, key_BTMH = (
                jnp.where(real_BT[..., None, None], heads, 0).astype(dtype) for heads in (query_BTNH, key_BTMH)
            )
            before_BTZ = jnp.where(real_BT[..., None], before_BTZ, 0).astype(dtype)
        past = empty_convolution_state(self.spec, batch, dtype) if state is None else state
        mixed_query, filtered_query = self.query(query_BTNH, past.query_BSNH, past.filtered_query_BSNH, documents)
        mixed_key, filtered_key = self.key(key_BTMH, past.key_BSMH, past.filtered_key_BSMH, documents)
        groups = num_heads // key_BTMH.shape[2]
        query_mean = (query_BTNH.astype(jnp.float32) + jnp.repeat(key_BTMH, groups, axis=2)) / 2
        key_mean = jnp.mean(query_mean.reshape(batch, length, -1, groups, head_dim), axis=3)
        query, key = (mixed_query + query_mean).astype(dtype), (mixed_key + key_mean).astype(dtype)
        state = past.extend(query_BTNH, key_BTMH, filtered_query, filtered_key, before_BTZ)
        before_BTZ, _ = causal_windows(before_BTZ, past.value_BSZ, documents)
        if self.spec.qkv_bias:
            now_BTZ = now_BTZ + self.b_value[...].astype(dtype)
            before_BTZ = before_BTZ + self.b_value_before[...].astype(dtype)
        value = jnp.concatenate([now_BTZ, before_BTZ], axis=-1).reshape(batch, length, self.spec.num_kv_heads, -1)
        return query, key, value, state
