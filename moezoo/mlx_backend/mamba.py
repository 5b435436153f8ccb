"""Mamba-1. Spec: moezoo.core.reference.mamba."""

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import MambaSpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.convolution import causal_convolution
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.kernels.segments import by_segments, segments
from moezoo.mlx_backend.kv_cache import Attended, ScanCache, empty_scan_cache
from moezoo.mlx_backend.normalization import norm
from moezoo.mlx_backend.positions import Documents, positions

CHUNK = 32
"""Chunk length in tokens: states of one chunk exist at a time."""


class Mamba(nn.Module):
    """Spec: moezoo.core.reference.mamba.mamba; with a cache, for the next tokens."""

    def __init__(self, spec: MambaSpec, weights: Weights, layer: int):
        super().__init__()
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
        x_BTD: mx.array,
        cache: ScanCache | None = None,
        *,
        first_value_BTMH: mx.array | None = None,
        first_B: mx.array | None = None,
        documents: Documents | None = None,
    ) -> Attended:
        """With a cache, the tokens follow the cached ones; row b starts at slot `first_B`, after its left padding."""
        del first_value_BTMH  # only grouped-query attention uses it
        spec, dtype = self.spec, x_BTD.dtype
        input_BTF = projection.einsum("BTD,DF->BTF", x_BTD, self.w_value.astype(dtype))
        gate_BTF = projection.einsum("BTD,DF->BTF", x_BTD, self.w_gate.astype(dtype))
        if spec.bias:
            input_BTF, gate_BTF = input_BTF + self.b_value.astype(dtype), gate_BTF + self.b_gate.astype(dtype)
        batch, length = x_BTD.shape[:2]
        past = empty_scan_cache(spec, batch, dtype) if cache is None else cache
        real_BT1 = None
        if first_B is not None:  # padding keeps a state of zeros, and is zero as an input of the convolution
            real_BT1 = positions(length, 0 if cache is None else cache.length, first_B)[..., None] >= 0
            input_BTF = mx.where(real_BT1, input_BTF, 0).astype(dtype)
        value_BTF = causal_convolution(input_BTF, self.conv, past.input_BSF, documents)
        value_BTF = value_BTF + self.b_conv.astype(mx.float32) if spec.conv_bias else value_BTF
        value_BTF = nn.silu(value_BTF).astype(dtype)
        low_BTH = self._normed("step_down", value_BTF)
        step_BTF = projection.einsum("BTH,HF->BTF", low_BTH, self.w_step.astype(dtype)).astype(mx.float32)
        step_BTF = nn.softplus(step_BTF + self.step_bias.astype(mx.float32))
        step_BTF = step_BTF if real_BT1 is None else mx.where(real_BT1, step_BTF, 0.0)
        key_BTZ, query_BTZ = (self._normed(which, value_BTF).astype(mx.float32) for which in ("key", "query"))
        value_BTF = value_BTF.astype(mx.float32)
        rate_FZ = mx.exp(self.log_decay_rate.astype(mx.float32))
        forgets_BT = None if documents is None else documents.position_BT == 0
        read_BTF, state_BFZ = selective_scan(
            value_BTF, step_BTF, rate_FZ, key_BTZ, query_BTZ, past.state_BFZ, forgets_BT
        )
        if cache is not None:
            cache = cache.extend(state_BFZ, input_BTF)
        read_BTF = read_BTF + self.skip.astype(mx.float32) * value_BTF
        read_BTF = (read_BTF * nn.silu(gate_BTF.astype(mx.float32))).astype(dtype)
        output = projection.einsum("BTF,FD->BTD", read_BTF, self.w_output.astype(dtype))
        output = output + self.b_output.astype(dtype) if spec.bias else output
        return Attended(output, cache, None, None)

    def _normed(self, which: str, value_BTF: mx.array) -> mx.array:
        w = getattr(self, f"w_{which}").astype(value_BTF.dtype)
        projected: mx.array = projection.einsum("BTF,FZ->BTZ", value_BTF, w)
        return projected if self.spec.norm is None else getattr(self, f"{which}_norm")(projected)


def selective_scan(
    value_BTF: mx.array,
    step_BTF: mx.array,
    rate_FZ: mx.array,
    key_BTZ: mx.array,
    query_BTZ: mx.array,
    state_BFZ: mx.array,
    forgets_BT: mx.array | None = None,
    chunk: int = CHUNK,
) -> tuple[mx.array, mx.array]:
    """Spec: moezoo.core.reference.mamba.selective_scan; of `step * value`, with `log_decay = -rate * step`.

    Takes a state, and returns the last one. All float32. Tokens of `forgets_BT` begin with a state of zeros.
    """
    kept_BT1 = mx.ones_like(value_BTF[..., :1])
    if forgets_BT is not None:
        kept_BT1 = 1.0 - forgets_BT[..., None].astype(mx.float32)

    def one_chunk(state_BFZ: mx.array, parts: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
        value_BTF, step_BTF, kept_BT1, key_BTZ, query_BTZ, rate_FZ = parts
        decay_BTFZ = kept_BT1[..., None] * mx.exp(-rate_FZ * step_BTF[..., None])
        added_BTFZ = (step_BTF * value_BTF)[..., None] * key_BTZ[:, :, None, :]
        decay_BTFZ, added_BTFZ = _combined(decay_BTFZ, added_BTFZ)
        state_BTFZ = added_BTFZ + decay_BTFZ * state_BFZ[:, None]
        return state_BTFZ[:, -1], mx.einsum("BTFZ,BTZ->BTF", state_BTFZ, query_BTZ)

    def rule(state_BFZ: mx.array, *inputs: mx.array) -> tuple[mx.array, mx.array]:
        reads = []
        for own in segments(inputs[:-1], chunk):
            state_BFZ, read_BTF = one_chunk(state_BFZ, (*own, inputs[-1]))
            reads.append(read_BTF)
        return mx.concatenate(reads, axis=1), state_BFZ

    arrays = (value_BTF, step_BTF, kept_BT1, key_BTZ, query_BTZ)
    return by_segments(rule, chunk, state_BFZ, arrays, (rate_FZ,))


def _combined(decay_BTFZ: mx.array, added_BTFZ: mx.array) -> tuple[mx.array, mx.array]:
    """Return, for each token of a chunk, the decay since its start, and what was added and is left: a parallel scan."""
    distance, length = 1, decay_BTFZ.shape[1]
    while distance < length:  # each token is combined with those up to `distance` before it
        decay, added = decay_BTFZ[:, distance:], added_BTFZ[:, distance:]
        before, added_before = decay_BTFZ[:, :-distance], added_BTFZ[:, :-distance]
        decay_BTFZ = mx.concatenate([decay_BTFZ[:, :distance], decay * before], axis=1)
        added_BTFZ = mx.concatenate([added_BTFZ[:, :distance], added + decay * added_before], axis=1)
        distance *= 2
    return decay_BTFZ, added_BTFZ
