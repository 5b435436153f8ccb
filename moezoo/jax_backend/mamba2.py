"""Mamba-2. Spec: moezoo.core.reference.mamba2."""

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.reference.linear_recurrence import FORGETS
from moezoo.core.spec import Mamba2Spec, RMSNormSpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.convolution import causal_convolution
from moezoo.jax_backend.kernels import projection
from moezoo.jax_backend.kv_cache import Attended, RecurrentCache, empty_recurrent_cache
from moezoo.jax_backend.linear_recurrence import linear_recurrence
from moezoo.jax_backend.normalization import norm
from moezoo.jax_backend.positions import Documents, positions


class Mamba2(nnx.Module):
    """Spec: moezoo.core.reference.mamba2.mamba2; with a cache, for the next tokens."""

    def __init__(self, spec: Mamba2Spec, weights: Weights, layer: int):
        del layer  # all layers are alike
        self.spec = spec
        self.w_gate = weights.parameter("w_gate")
        self.w_value = weights.parameter("w_value")
        self.conv_value = weights.parameter("conv_value")
        self.w_key = weights.parameter("w_key")
        self.conv_key = weights.parameter("conv_key")
        self.w_query = weights.parameter("w_query")
        self.conv_query = weights.parameter("conv_query")
        self.w_step = weights.parameter("w_step")
        self.step_bias = weights.parameter("step_bias")
        self.log_decay_rate = weights.parameter("log_decay_rate")
        self.skip = weights.parameter("skip")
        self.norm_scale = weights.parameter("norm_scale")
        self.w_output = weights.parameter("w_output")
        if spec.conv_bias:
            self.b_conv_value = weights.parameter("b_conv_value")
            self.b_conv_key = weights.parameter("b_conv_key")
            self.b_conv_query = weights.parameter("b_conv_query")
        if spec.bias:
            self.b_gate = weights.parameter("b_gate")
            self.b_value = weights.parameter("b_value")
            self.b_key = weights.parameter("b_key")
            self.b_query = weights.parameter("b_query")
            self.b_step = weights.parameter("b_step")
            self.b_output = weights.parameter("b_output")
        self.norm = norm(RMSNormSpec(epsilon=spec.norm_epsilon, scale="none"), weights)

    def __call__(
        self,
        x_BTD: jax.Array,
        cache: RecurrentCache | None = None,
        *,
        first_value_BTMH: jax.Array | None = None,
        first_B: jax.Array | None = None,
        documents: Documents | None = None,
    ) -> Attended:
        """With a cache, the tokens follow the cached ones; row b starts at slot `first_B`, after its left padding."""
        del first_value_BTMH  # only grouped-query attention uses it
        spec, dtype = self.spec, x_BTD.dtype
        gate, value, key, query = (self._projected(which, x_BTD) for which in ("gate", "value", "key", "query"))
        step_BTN = self._step(x_BTD)
        log_decay = -jnp.exp(self.log_decay_rate[...].astype(jnp.float32)) * step_BTN
        batch, length = x_BTD.shape[:2]
        if first_B is not None:  # padding keeps a state of zeros, and is zero as an input of the convolutions
            real_BT1 = positions(length, 0 if cache is None else cache.length, first_B)[..., None] >= 0
            step_BTN, log_decay = jnp.where(real_BT1, step_BTN, 0.0), jnp.where(real_BT1, log_decay, 0.0)
            query, key, value = (jnp.where(real_BT1[..., None], x, 0).astype(dtype) for x in (query, key, value))
        if documents is not None:
            log_decay = jnp.where(documents.position_BT[..., None] == 0, FORGETS, log_decay)
        past = empty_recurrent_cache(spec, batch, dtype) if cache is None else cache
        convolved = self._convolved("value", value, past.value_BSNZ, documents)
        grouped = (batch, length, spec.num_groups, -1)
        read, state_BMGHZ = linear_recurrence(
            self._convolved("query", query, past.query_BSMH, documents),
            self._convolved("key", key, past.key_BSMH, documents),
            (step_BTN[..., None] * convolved).reshape(*grouped, spec.head_dim),
            log_decay.reshape(grouped),
            past.state_BMGHZ,
        )
        if cache is not None:
            cache = cache.extend(state_BMGHZ, query, key, value)
        read = read.reshape(value.shape) + self.skip[...].astype(jnp.float32)[:, None] * convolved
        read = read * jax.nn.silu(gate.astype(jnp.float32))
        normed = self.norm(read.reshape(grouped)).reshape(value.shape) * self.norm_scale[...].astype(jnp.float32)
        output = projection.einsum("BTNZ,NZD->BTD", normed.astype(dtype), self.w_output[...].astype(dtype))
        output = output + self.b_output[...].astype(dtype) if spec.bias else output
        return Attended(output, cache, None, None)

    def _projected(self, which: str, x_BTD: jax.Array) -> jax.Array:
        dtype = x_BTD.dtype
        projected = projection.einsum("BTD,DNZ->BTNZ", x_BTD, getattr(self, f"w_{which}")[...].astype(dtype))
        return projected + getattr(self, f"b_{which}")[...].astype(dtype) if self.spec.bias else projected

    def _step(self, x_BTD: jax.Array) -> jax.Array:
        """Return each token's step [B, T, N], in float32."""
        dtype = x_BTD.dtype
        step_BTN = projection.einsum("BTD,DN->BTN", x_BTD, self.w_step[...].astype(dtype))
        step_BTN = step_BTN + self.b_step[...].astype(dtype) if self.spec.bias else step_BTN
        step_BTN = jax.nn.softplus(step_BTN.astype(jnp.float32) + self.step_bias[...].astype(jnp.float32))
        return jnp.clip(step_BTN, self.spec.min_step, self.spec.max_step)

    def _convolved(self, which: str, x: jax.Array, before: jax.Array, documents: Documents | None) -> jax.Array:
        """Return silu of the convolution of x [B, T, heads, width] after `before`, in float32."""
        convolved = causal_convolution(x, getattr(self, f"conv_{which}")[...], before, documents)
        if self.spec.conv_bias:
            convolved = convolved + getattr(self, f"b_conv_{which}")[...].astype(jnp.float32)
        return jax.nn.silu(convolved)
