"""Embeddings of the last n tokens together. Spec: moezoo.core.reference.ngram_embeddings."""

import math

import mlx.core as mx
import numpy as np
from mlx import nn

from moezoo.core.spec import NGramEmbeddingsSpec, NormSpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.convolution import causal_convolution
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.kv_cache import NGramState, empty_ngram_state
from moezoo.mlx_backend.normalization import norm
from moezoo.mlx_backend.positions import Documents, positions
from moezoo.mlx_backend.quantization import as_array


class NGramEmbeddings(nn.Module):
    """Spec: moezoo.core.reference.ngram_embeddings.ngram_embeddings; with a state, for the next tokens."""

    def __init__(self, spec: NGramEmbeddingsSpec, norm_spec: NormSpec, vocab: int, weights: Weights):
        super().__init__()
        self.spec, self.vocab = spec, vocab
        self.weight = weights.parameter("weight")
        self.w_key = weights.parameter("w_key")
        self.w_value = weights.parameter("w_value")
        self.conv = weights.parameter("conv")
        self.key_norm = norm(norm_spec, weights.inside("key_norm"))
        self.query_norm = norm(norm_spec, weights.inside("query_norm"))
        self.conv_norm = norm(norm_spec, weights.inside("conv_norm"))

    def __call__(
        self,
        tokens_BT: mx.array,
        x_BTJD: mx.array,
        state: NGramState | None = None,
        *,
        cached: int = 0,
        first_B: mx.array | None = None,
        documents: Documents | None = None,
    ) -> tuple[mx.array, NGramState | None]:
        """With a state, tokens follow `cached` ones; row b starts at slot `first_B`, after its left padding."""
        dtype, (batch, length, num_streams, embed_dim) = x_BTJD.dtype, x_BTJD.shape
        position_BT = None if first_B is None else positions(length, cached, first_B)
        if position_BT is not None:
            tokens_BT = mx.where(position_BT >= 0, tokens_BT, self.spec.reset_token)
        past = empty_ngram_state(self.spec, batch, num_streams, embed_dim, dtype) if state is None else state
        row_BTN = ngram_rows(self.spec, self.vocab, tokens_BT, past.token_BS, documents)
        part_BTN, row_BTN = mx.divmod(row_BTN, self.spec.rows // self.spec.parts)
        embedding_BTZ = as_array(self.weight)[part_BTN, row_BTN].reshape(batch, length, -1).astype(dtype)
        key_BTJD = projection.einsum("BTZ,ZJD->BTJD", embedding_BTZ, self.w_key.astype(dtype))
        value_BTD = projection.einsum("BTZ,ZD->BTD", embedding_BTZ, self.w_value.astype(dtype))
        key_BTJD, query_BTJD = (x.astype(mx.float32) for x in (self.key_norm(key_BTJD), self.query_norm(x_BTJD)))
        gate_BTJ = mx.sum(key_BTJD * query_BTJD, axis=-1) / math.sqrt(embed_dim)
        gate_BTJ = mx.sign(gate_BTJ) * mx.sqrt(mx.maximum(mx.abs(gate_BTJ), 1e-6))
        gated_BTJD = mx.sigmoid(gate_BTJ[..., None]) * value_BTD.astype(mx.float32)[:, :, None]
        normed_BTJD = self.conv_norm(gated_BTJD.astype(dtype))
        if position_BT is not None:
            normed_BTJD = mx.where(position_BT[..., None, None] >= 0, normed_BTJD, 0).astype(dtype)
        convolved_BTJD = causal_convolution(
            normed_BTJD, self.conv, past.input_BSJD, documents, dilation=self.spec.largest
        )
        out_BTJD = (gated_BTJD + nn.silu(convolved_BTJD)).astype(dtype)
        return out_BTJD, None if state is None else state.extend(tokens_BT, normed_BTJD)


def ngram_rows(
    spec: NGramEmbeddingsSpec,
    vocab: int,
    tokens_BT: mx.array,
    before_BS: mx.array,
    documents: Documents | None = None,
) -> mx.array:
    """Spec: moezoo.core.reference.ngram_embeddings.ngram_rows; after tokens before them, one fewer than `largest`."""
    length, multipliers, sizes = tokens_BT.shape[1], spec.multipliers(vocab), np.array(spec.sizes)
    size_N = mx.array(sizes)
    padded = mx.concatenate([before_BS, tokens_BT], axis=1)
    seen_BT, mixed_BT, found = tokens_BT, _product(tokens_BT, multipliers[0]), []
    for place in range(1, spec.largest):
        ended_BT = seen_BT == spec.reset_token if place > 1 else mx.zeros(seen_BT.shape, mx.bool_)
        if documents is not None:
            ended_BT = ended_BT | (documents.position_BT < place)
        start = spec.largest - 1 - place
        seen_BT = mx.where(ended_BT, spec.reset_token, padded[:, start : start + length])
        mixed_BT = mixed_BT ^ _product(seen_BT, multipliers[place])
        heads = slice((place - 1) * spec.heads, place * spec.heads)
        found.append(mixed_BT[..., None] % size_N[heads])
    row_BTN = mx.concatenate(found, axis=-1) + mx.array(np.cumsum(sizes) - sizes)
    return row_BTN.astype(mx.int32)


def _product(token_BT: mx.array, multiplier: int) -> mx.array:
    """Return a product of 63 bits."""
    return token_BT.astype(mx.int64) * mx.array(multiplier, mx.int64)
