"""Mamba-1. Spec: moezoo.core.reference.mamba."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from moezoo.core.spec import MambaSpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.convolution import causal_convolution
from moezoo.jax_backend.kernels import projection
from moezoo.jax_backend.kv_cache import Attended, ScanCache, empty_scan_cache
from moezoo.jax_backend.normalization import norm
from moezoo.jax_backend.positions import Documents, positions

CHUNK = 32
"""Chunk length in tokens: states of one chunk exist at a time."""


class Mamba(nnx.Module):
    """Spec: moezoo.core.reference.mamba.mamba; with a cache, for the next tokens."""

    def __init__(self, spec: MambaSpec, weights: Weights, layer: int):
        del layer  # all layers are alike
        self.spec = spec
        self.w_value = weights.parameter("w_value")
        self.w_gate = weights.parameter("w_gate")
        self.conv = weights.parameter("conv")
        self.w_step_down = weights.parameter("w_step_down")
        self.w_key = weights.parameter("w_key")
        self.w_query = weights.parameter("w_query")
        self.w_step = weights.parameter("w_step")
        self.step_bias = weights.parameter("step_bias")
        self.log_decay_rate = weights.parameter("log_decay_rate")
        self.skip = weights.parameter("skip")
        self.w_output = weights.parameter("w_output")
        if spec.norm is not None:
            self.step_down_norm = norm(spec.norm, weights.inside("step_down_norm"))
            self.key_norm = norm(spec.norm, weights.inside("key_norm"))
            self.query_norm = norm(spec.norm, weights.inside("query_norm"))
        if spec.conv_bias:
            self.b_conv = weights.parameter("b_conv")
        if spec.bias:
            self.b_value = weights.parameter("b_value")
            self.b_gate = weights.parameter("b_gate")
            self.b_output = weights.parameter("b_output")

    def __call__(
        self,
        x_BTD: jax.Array,
        cache: ScanCache | None = None,
        *,
        first_value_BTMH: jax.Array | None = None,
        first_B: jax.Array | None = None,
        documents: Documents | None = None,
    ) -> Attended:
        """With a cache, the tokens follow the cached ones; row b starts at slot `first_B`, after its left padding."""
        del first_value_BTMH  # only grouped-query attention uses it
        spec, dtype = self.spec, x_BTD.dtype
        input_BTF = projection.einsum("BTD,DF->BTF", x_BTD, self.w_value[...].astype(dtype))
        gate_BTF = projection.einsum("BTD,DF->BTF", x_BTD, self.w_gate[...].astype(dtype))
        if spec.bias:
            input_BTF, gate_BTF = input_BTF + self.b_value[...].astype(dtype), gate_BTF + self.b_gate[...].astype(dtype)
        batch, length = x_BTD.shape[:2]
        past = empty_scan_cache(spec, batch, dtype) if cache is None else cache
        real_BT1 = None
        if first_B is not None:  # padding keeps a state of zeros, and is zero as an input of the convolution
            real_BT1 = positions(length, 0 if cache is None else cache.length, first_B)[..., None] >= 0
            input_BTF = jnp.where(real_BT1, input_BTF, 0).astype(dtype)
        value_BTF = causal_convolution(input_BTF, self.conv[...], past.input_BSF, documents)
        value_BTF = value_BTF + self.b_conv[...].astype(jnp.float32) if spec.conv_bias else value_BTF
        value_BTF = jax.nn.silu(value_BTF).astype(dtype)
        low_BTH = self._normed("step_down", value_BTF)
        step_BTF = projection.einsum("BTH,HF->BTF", low_BTH, self.w_step[...].astype(dtype)).astype(jnp.float32)
        step_BTF = jax.nn.softplus(step_BTF + self.step_bias[...].astype(jnp.float32))
        step_BTF = step_BTF if real_BT1 is None else jnp.where(real_BT1, step_BTF, 0.0)
        key_BTZ, query_BTZ = (self._normed(which, value_BTF).astype(jnp.float32) for which in ("key", "query"))
        value_BTF = value_BTF.astype(jnp.float32)
        rate_FZ = jnp.exp(self.log_decay_rate[...].astype(jnp.float32))
        forgets_BT = None if documents is None else documents.position_BT == 0
        read_BTF, state_BFZ = selective_scan(
            value_BTF, step_BTF, rate_FZ, key_BTZ, query_BTZ, past.state_BFZ, forgets_BT
        )
        if cache is not None:
            cache = cache.extend(state_BFZ, input_BTF)
        read_BTF = read_BTF + self.skip[...].astype(jnp.float32) * value_BTF
        read_BTF = (read_BTF * jax.nn.silu(gate_BTF.astype(jnp.float32))).astype(dtype)
        output = projection.einsum("BTF,FD->BTD", read_BTF, self.w_output[...].astype(dtype))
        output = output + self.b_output[...].astype(dtype) if spec.bias else output
        return Attended(output, cache, None, None)

    def _normed(self, which: str, value_BTF: jax.Array) -> jax.Array:
        w = getattr(self, f"w_{which}")[...].astype(value_BTF.dtype)
        projected: jax.Array = projection.einsum("BTF,FZ->BTZ", value_BTF, w)
        return projected if self.spec.norm is None else getattr(self, f"{which}_norm")(projected)


def selective_scan(
    value_BTF: jax.Array,
    step_BTF: jax.Array,
    rate_FZ: jax.Array,
    key_BTZ: jax.Array,
    query_BTZ: jax.Array,
    state_BFZ: jax.Array,
    forgets_BT: jax.Array | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Spec: moezoo.core.reference.mamba.selective_scan; of `step * value`, with `log_decay = -rate * step`.

    Takes a state, and returns the last one. All float32. Tokens of `forgets_BT` begin with a state of zeros.
    """
    batch, length = value_BTF.shape[:2]
    chunk = min(chunk, length)
    kept_BT1 = jnp.ones((batch, length, 1)) if forgets_BT is None else 1.0 - forgets_BT[..., None].astype(jnp.float32)

    def in_chunks(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [chunks, B, T of a chunk, ...], padded with zeros: steps that change no state."""
        x = jnp.pad(x, [(0, 0), (0, -length % chunk), (0, 0)])
        return x.reshape(batch, -1, chunk, x.shape[-1]).swapaxes(0, 1)

    def one_chunk(state_BFZ: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        value_BTF, step_BTF, kept_BT1, key_BTZ, query_BTZ = parts
        decay_BTFZ = kept_BT1[..., None] * jnp.exp(-rate_FZ * step_BTF[..., None])
        added_BTFZ = (step_BTF * value_BTF)[..., None] * key_BTZ[:, :, None, :]
        decay_BTFZ, added_BTFZ = _combined(decay_BTFZ, added_BTFZ)
        state_BTFZ = added_BTFZ + decay_BTFZ * state_BFZ[:, None]
        return state_BTFZ[:, -1], jnp.einsum("BTFZ,BTZ->BTF", state_BTFZ, query_BTZ)

    # Padding keeps the state: a step of 0, and 1 for `kept`.
    kept_BT1 = jnp.pad(kept_BT1, [(0, 0), (0, -length % chunk), (0, 0)], constant_values=1.0)
    parts = tuple(in_chunks(x) for x in (value_BTF, step_BTF))
    parts += (kept_BT1.reshape(batch, -1, chunk, 1).swapaxes(0, 1), in_chunks(key_BTZ), in_chunks(query_BTZ))

    state_BFZ, read = lax.scan(jax.checkpoint(one_chunk), state_BFZ, parts)
    read_BTF = jnp.moveaxis(read, 0, 1).reshape(batch, -1, value_BTF.shape[-1])[:, :length]
    return read_BTF, state_BFZ


def _combined(decay_BTFZ: jax.Array, added_BTFZ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return, for each token of a chunk, the decay since its start, and what was added and is left: a parallel scan."""

    def combined(
        before: tuple[jax.Array, jax.Array], after: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return before[0] * after[0], after[0] * before[1] + after[1]

    decay_BTFZ, added_BTFZ = lax.associative_scan(combined, (decay_BTFZ, added_BTFZ), axis=1)
    return decay_BTFZ, added_BTFZ
