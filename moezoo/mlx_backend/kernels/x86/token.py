"""One more token of each sequence by NumPy: a product of few rows takes as long as reading its matrix.

OpenBLAS's `sgemm` and `sgemv`, which MLX and NumPy call for one row, read a matrix of half a megabyte at 10 to 15 GB/s;
`einsum`, which adds one row of the matrix at a time, at 22 to 30, about what the memory gives to all cores. And a small
operation takes NumPy one microsecond, MLX five.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from moezoo.core.spec import (
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    NoisyTopKChoiceSpec,
    NormSpec,
    RMSNormSpec,
    RoPESpec,
    TopKChoiceSpec,
)
from moezoo.core.spec.base import Part
from moezoo.core.tokens import Integers
from moezoo.mlx_backend.kernels.rotation import turning_matrix
from moezoo.mlx_backend.kernels.x86 import is_x86_cpu
from moezoo.mlx_backend.kernels.x86.activation import silu
from moezoo.mlx_backend.kernels.x86.codes import Matrix, decoded, matrix, product
from moezoo.mlx_backend.kernels.x86.normalization import inverse_rms
from moezoo.mlx_backend.kv_cache import Cache, Caches, KVCache
from moezoo.mlx_backend.quantization import QuantizedArray
from moezoo.mlx_backend.runtime.cores import Floats, can_limit_blas, cores, on_all_cores, one_blas_thread, one_by_one

Plain = Floats | Matrix


class LowRank(NamedTuple):
    """A matrix with an adapter, `base + a b`: b is scaled."""

    base: Plain
    a: Floats
    b: Floats


Weight = Plain | LowRank

STREAMED_ROWS = 2
"""Rows up to which einsum reads a matrix from memory faster than `sgemv` and `sgemm` do: 22 to 30 GB/s for 13 to 17."""

LARGE = 2**21
"""Multiply-adds from which products on all cores save more than waiting for the cores costs."""


def token_path() -> str:
    """Return what computes one more token, for the run's header."""
    return "NumPy where all layers are common, else MLX's graph" if _computes_tokens() else "MLX's graph"


def token_step(
    spec: ModelSpec, parameters: Mapping[str, mx.array], coded: Mapping[str, QuantizedArray]
) -> "TokenStep | None":
    """Return the step of a model of common layers with these parameters by canonical name; None of another one.

    Common: pre-norm, RoPE or no position, RMS norms, top-k of a softmax, SwiGLU experts without biases, and matrices of
    float32 or codes, but for the embedding with or without an adapter.
    """
    matrices = (value for value in parameters.values() if value.ndim > 1)
    if not _computes_tokens() or any(value.dtype != mx.float32 for value in matrices):
        return None
    if not all(_runs_over_inputs(name, value) for name, value in coded.items()):
        return None
    layers = all(_is_common(layer) for layer in spec.layers)
    common = layers and isinstance(spec.norm, RMSNormSpec) and not spec.head.bias
    training = ("dropout", "initializer", "adapter")
    common = common and "embedding.weight.lora_a" not in parameters
    if not common or not _has_defaults(spec, "vocab_size", "embed_dim", "layers", "norm", "head", *training):
        return None
    floats = {name: np.asarray(value.astype(mx.float32)) for name, value in parameters.items()}
    values: dict[str, Weight] = {**floats, **{name: matrix(value) for name, value in coded.items()}}
    if spec.adapter is not None:
        values |= _adapted(values, floats, spec.adapter.scale)
    return TokenStep(spec, values)


def _adapted(values: Mapping[str, Weight], floats: Mapping[str, Floats], scale: float) -> dict[str, Weight]:
    """Return the matrices that have an adapter, with it."""
    found: dict[str, Weight] = {}
    for name in values:
        base = values[name]
        if f"{name}.lora_a" in floats and not isinstance(base, LowRank):
            found[name] = LowRank(base, floats[f"{name}.lora_a"], floats[f"{name}.lora_b"] * np.float32(scale))
    return found


class TokenStep:
    """Views of a model's parameters, and the step that extends sequences by one token."""

    def __init__(self, spec: ModelSpec, values: Mapping[str, Weight]):
        self._embedding_VD = _plain(values["embedding.weight"])
        self._layers = [_Layer(layer, spec.norm, values, f"layers.{i}") for i, layer in enumerate(spec.all_layers)]
        self._final_norm = _Norm.of(spec.norm, values, "final_norm")
        self._head_DV = values["head.w_head"] if "head.w_head" in values else _as_head(self._embedding_VD)

    def __call__(self, tokens_B: Integers, caches: Caches) -> tuple[mx.array, Caches]:
        """Return logits [B, V] after these tokens, and caches that hold them; written in place if they are spent."""
        with (
            one_blas_thread(),
            np.errstate(all="ignore"),
        ):  # as in MLX, whose logits of a diverged model are NaN without a warning
            return self._extended(tokens_B, caches)

    def _extended(self, tokens_B: Integers, caches: Caches) -> tuple[mx.array, Caches]:
        x_BD, extended = _rows(self._embedding_VD, tokens_B), list[Cache]()
        for layer, cache in zip(self._layers, caches.layers, strict=True):
            assert isinstance(cache, KVCache)
            key_BSMH, value_BSMH = (_own(array, spent=caches.spent) for array in (cache.key_BSMH, cache.value_BSMH))
            x_BD = layer.extended(x_BD, np.asarray(key_BSMH), np.asarray(value_BSMH), cache.length)
            extended.append(KVCache(key_BSMH, value_BSMH, cache.length + 1))
        (logits_BV,) = _products(self._final_norm(x_BD), self._head_DV)
        return mx.array(logits_BV), Caches(extended, None)


class _Norm(NamedTuple):
    """RMS norm of the last axis."""

    scale_D: Floats | None
    epsilon: float

    @staticmethod
    def of(spec: NormSpec, values: Mapping[str, Weight], name: str) -> "_Norm":
        assert isinstance(spec, RMSNormSpec)
        scale_D = None if spec.scale == "none" else values[f"{name}.scale"]
        assert not isinstance(scale_D, Matrix | LowRank)
        return _Norm(1 + scale_D if spec.scale == "zero_centred" and scale_D is not None else scale_D, spec.epsilon)

    def __call__(self, x: Floats) -> Floats:
        normed = x * inverse_rms(x, self.epsilon)
        if self.scale_D is not None:
            normed *= self.scale_D
        return normed


class _Layer:
    """Attention and experts, each after its norm."""

    def __init__(self, spec: LayerSpec, norm: NormSpec, values: Mapping[str, Weight], name: str):
        assert isinstance(spec.attention, GroupedQueryAttentionSpec)
        assert spec.moe is not None
        self._attention_norm = _Norm.of(norm, values, f"{name}.attention_norm")
        self._feed_forward_norm = _Norm.of(norm, values, f"{name}.feed_forward_norm")
        self._attention = _Attention(spec.attention, values, f"{name}.attention")
        self._experts = _Experts(spec.moe, values, f"{name}.moe")

    def extended(self, x_BD: Floats, key_BSMH: Floats, value_BSMH: Floats, length: int) -> Floats:
        """Return the residual stream after this layer; keys and values are written to slot `length`."""
        x_BD = x_BD + self._attention(self._attention_norm(x_BD), key_BSMH, value_BSMH, length)
        return x_BD + self._experts(self._feed_forward_norm(x_BD))


class _Attention:
    """Attention of one token of each sequence to the filled slots of a cache."""

    def __init__(self, spec: GroupedQueryAttentionSpec, values: Mapping[str, Weight], name: str):
        group = spec.num_heads // spec.num_kv_heads
        self._position, self._shape = spec.position, (spec.num_kv_heads, group, spec.head_dim)
        self._scale = np.float32(spec.head_dim**-0.5 if spec.scale is None else spec.scale)
        w_query_DNH, w_key_DMH, w_value_DMH, w_output_NHD = (
            values[f"{name}.w_{part}"] for part in ("query", "key", "value", "output")
        )
        self._w_query, self._w_key, self._w_value = (_flat(w, 1) for w in (w_query_DNH, w_key_DMH, w_value_DMH))
        self._w_output = _flat(w_output_NHD, 2)
        self._norms = [
            _Norm.of(spec.qk_norm, values, f"{name}.{part}_norm")
            for part in ("query", "key")
            if spec.qk_norm is not None
        ]

    def __call__(self, x_BD: Floats, key_BSMH: Floats, value_BSMH: Floats, length: int) -> Floats:
        """Return the output [B, D]; keys and values of the token are written to slot `length`."""
        heads, _, width = self._shape
        query, key, value = _products(x_BD, self._w_query, self._w_key, self._w_value)
        query_BMGH: Floats = query.reshape(-1, *self._shape)
        key_BMH: Floats = key.reshape(-1, heads, width)
        if self._norms:
            query_norm, key_norm = self._norms
            query_BMGH, key_BMH = query_norm(query_BMGH), key_norm(key_BMH)
        if isinstance(self._position, RoPESpec):
            turn_HH = turning_matrix(self._position, width, length)
            query_BMGH, key_BMH = query_BMGH @ turn_HH, key_BMH @ turn_HH
        key_BSMH[:, length] = key_BMH
        value_BSMH[:, length] = value.reshape(key_BMH.shape)
        # A matrix is the left operand, as OpenBLAS is two to four times slower if the right one is the larger.
        key_BM1SH = key_BSMH[:, : length + 1].swapaxes(1, 2)[:, :, None]
        weight_BMGS = (key_BM1SH @ (query_BMGH * self._scale)[..., None])[..., 0]
        weight_BMGS -= weight_BMGS.max(axis=-1, keepdims=True)
        np.exp(weight_BMGS, out=weight_BMGS)
        weight_BMGS /= weight_BMGS.sum(axis=-1, keepdims=True)
        value_BMHS = value_BSMH[:, : length + 1].transpose(0, 2, 3, 1)
        attended_BMGH = (value_BMHS @ weight_BMGS.swapaxes(-1, -2)).swapaxes(-1, -2)
        (out_BD,) = _products(attended_BMGH.reshape(len(x_BD), -1), self._w_output)
        return out_BD


class _Experts:
    """Router and experts of a layer."""

    def __init__(self, spec: MoESpec, values: Mapping[str, Weight], name: str):
        self._top_k, self._renormalizes = spec.router.top_k, spec.router.renormalize == "sum"
        self._w_router_DE = values[f"{name}.router.w_router"]
        self._matrices = [values[f"{name}.experts.w_{part}"] for part in ("gate", "up", "down")]
        self._decodes_much = (
            self._top_k * sum(w.part(0).numbers for w in map(_plain, self._matrices) if isinstance(w, Matrix)) >= LARGE
        )

    def __call__(self, x_BD: Floats) -> Floats:
        """Return the weighted sum of each token's experts; of several tokens, a core takes one expert at a time."""
        expert_BK, weight_BK = self._chosen(x_BD)
        expert_R = expert_BK.reshape(-1)
        order_R = np.argsort(expert_R, kind="stable")
        ends = [*(np.flatnonzero(np.diff(expert_R[order_R])) + 1).tolist(), expert_R.size]
        out_RD = np.empty((expert_R.size, x_BD.shape[1]), np.float32)
        pieces = (
            partial(self._run, x_BD, expert_R[order_R[start]], order_R[start:end], out_RD)
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        )
        (one_by_one if len(x_BD) == 1 and not self._decodes_much else on_all_cores)(pieces)
        return (weight_BK[:, None] @ out_RD.reshape(*weight_BK.shape, -1))[:, 0]

    def _chosen(self, x_BD: Floats) -> tuple[np.ndarray, Floats]:
        """Return the experts of each token, ties by lower id, and their weights."""
        logits_BE = _product(x_BD, self._w_router_DE)
        expert_BK = np.argsort(-logits_BE, axis=-1, kind="stable")[:, : self._top_k]
        score_BE = np.exp(logits_BE - logits_BE.max(axis=-1, keepdims=True))
        weight_BK = score_BE[np.arange(len(x_BD))[:, None], expert_BK]
        weight_BK /= (weight_BK if self._renormalizes else score_BE).sum(axis=-1, keepdims=True)
        return expert_BK, weight_BK

    def _run(self, x_BD: Floats, expert: int, slot_R: np.ndarray, out_RD: Floats) -> None:
        """Compute these slots, all of one expert."""
        gate_DF, up_DF, down_FD = (_part(w, expert) for w in self._matrices)
        rows = x_BD[slot_R // self._top_k]
        hidden = silu(_product(rows, gate_DF))
        hidden *= _product(rows, up_DF)
        out_RD[slot_R] = _product(hidden, down_FD)


def _products(x_BD: Floats, *matrices: Weight) -> list[Floats]:
    """Return x times each of these matrices; each core takes some columns if that is much work."""
    if any(isinstance(w, LowRank) for w in matrices):
        plain = _products(x_BD, *map(_plain, matrices))
        return [out + _low(x_BD, w) if isinstance(w, LowRank) else out for out, w in zip(plain, matrices, strict=True)]
    coded = [w for w in matrices if isinstance(w, Matrix)]
    if coded:
        on_cores = len(coded) == len(matrices) and sum(w.numbers for w in coded) >= LARGE
        return _decoded_products(x_BD, coded) if on_cores else [_product(x_BD, w) for w in matrices]
    floats = [w for w in matrices if not isinstance(w, Matrix | LowRank)]
    if len(x_BD) * sum(w_DF.size for w_DF in floats) < LARGE:
        return [_product(x_BD, w_DF) for w_DF in floats]
    products: list[Floats] = [np.empty((len(x_BD), w_DF.shape[1]), np.float32) for w_DF in floats]
    on_all_cores(
        partial(np.matmul, x_BD, w_DF[:, share], out=out_BF[:, share])
        for w_DF, out_BF in zip(floats, products, strict=True)
        for share in _shares(w_DF.shape[1])
    )
    return products


def _decoded_products(x_BD: Floats, matrices: Sequence[Matrix]) -> list[Floats]:
    """Return the products with codes; a piece of a matrix is decoded on one core."""
    products: list[Floats] = [np.empty((len(x_BD), len(w.codes)), np.float32) for w in matrices]
    on_all_cores(piece for w, out in zip(matrices, products, strict=True) for piece in product(x_BD, w, out))
    return products


def _shares(count: int) -> list[slice]:
    """Return a slice of `count` columns for each core."""
    bounds = [count * core // cores() for core in range(cores() + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def _product(x_RD: Floats, w_DF: Weight) -> Floats:
    """Return x times w on this core."""
    if isinstance(w_DF, LowRank):
        return _product(x_RD, w_DF.base) + _low(x_RD, w_DF)
    if isinstance(w_DF, Matrix):
        out_RF: Floats = np.empty((len(x_RD), len(w_DF.codes)), np.float32)
        one_by_one(product(x_RD, w_DF, out_RF))
        return out_RF
    if len(x_RD) <= STREAMED_ROWS:
        return np.asarray(np.einsum("RD,DF->RF", x_RD, w_DF))
    return x_RD @ w_DF


def _low(x_RD: Floats, w: LowRank) -> Floats:
    """Return what the adapter adds."""
    return _product(_product(x_RD, w.a), w.b)


def _plain(w: Weight) -> Plain:
    """Return the matrix without its adapter."""
    return w.base if isinstance(w, LowRank) else w


def _part(w: Weight, expert: int) -> Weight:
    """Return the matrix of one expert."""
    if isinstance(w, LowRank):
        base = w.base.part(expert) if isinstance(w.base, Matrix) else w.base[expert]
        return LowRank(base, w.a[expert], w.b[expert])
    return w.part(expert) if isinstance(w, Matrix) else w[expert]


def _rows(w: Plain, index: Integers) -> Floats:
    return decoded(w, index) if isinstance(w, Matrix) else w[index]


def _as_head(embedding_VD: Plain) -> Plain:
    """Return the matrix of a tied head; rows of codes already run over its inputs."""
    return embedding_VD if isinstance(embedding_VD, Matrix) else embedding_VD.T


def _flat(w: Weight, inputs: int) -> Weight:
    """Merge the axes of a matrix's outputs, and those of its inputs, of which there are so many."""
    if isinstance(w, LowRank):
        base = w.base.flat() if isinstance(w.base, Matrix) else w.base.reshape(math.prod(w.base.shape[:inputs]), -1)
        return LowRank(base, w.a.reshape(-1, w.a.shape[-1]), w.b.reshape(len(w.b), -1))
    return w.flat() if isinstance(w, Matrix) else w.reshape(math.prod(w.shape[:inputs]), -1)


def _runs_over_inputs(name: str, w: QuantizedArray) -> bool:
    """Return True if the rows of codes run over what a product sums over; those of the embedding are its own."""
    if name == "embedding.weight" or ".experts." in name:
        return w.packed == (1,)
    return w.packed == tuple(range(len(w.packed))) and (len(w.packed) == 1 or name.endswith(".w_output"))


def _computes_tokens() -> bool:
    return is_x86_cpu() and can_limit_blas()


def _is_common(layer: LayerSpec) -> bool:
    attention, moe = layer.attention, layer.moe
    return (
        isinstance(attention, GroupedQueryAttentionSpec)
        and moe is not None
        and isinstance(attention.qk_norm, RMSNormSpec | None)
        and isinstance(moe.experts, GatedFeedForwardSpec)
        and isinstance(moe.router.choice, TopKChoiceSpec | NoisyTopKChoiceSpec)
        and moe.router.renormalize != "p_norm"
        and _has_defaults(layer, "repeat", "attention", "moe")
        and _has_defaults(attention, "num_heads", "num_kv_heads", "head_dim", "position", "qk_norm", "scale")
        and _has_defaults(moe, "num_experts", "router", "experts", "dispatch", "losses")
        and _has_defaults(moe.router, "top_k", "choice", "renormalize", "jitter")
        and _has_defaults(moe.experts, "hidden_dim")
    )


def _has_defaults(part: Part, *names: str) -> bool:
    """Return True if all fields of a part but these have their defaults, and so mean nothing special."""
    fields = type(part).model_fields
    return all(getattr(part, name) == field.default for name, field in fields.items() if name not in names)


def _own(array: mx.array, *, spent: bool) -> mx.array:
    """Return an array that may be written: itself, if nobody else needs it."""
    return array if spent else mx.array(np.asarray(array))
