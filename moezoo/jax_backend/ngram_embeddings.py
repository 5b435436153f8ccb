"""Embeddings of the last n tokens together. Spec: moezoo.core.reference.ngram_embeddings."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moezoo.core.spec import NGramEmbeddingsSpec, NormSpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.convolution import causal_convolution
from moezoo.jax_backend.kernels import projection
from moezoo.jax_backend.kernels.wide_integers import exclusive_or, product, remainder
from moezoo.jax_backend.kv_cache import NGramState, empty_ngram_state
from moezoo.jax_backend.normalization import norm
from moezoo.jax_backend.positions import Documents, positions
from moezoo.jax_backend.quantization import as_array
from moezoo.jax_backend.runtime.placement import look_up


class NGramEmbeddings(nnx.Module):
    """Spec: moezoo.core.reference.ngram_embeddings.ngram_embeddings; with a state, for the next tokens."""

    def __init__(self, spec: NGramEmbeddingsSpec, norm_spec: NormSpec, vocab: int, weights: Weights):
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
        tokens_BT: jax.Array,
        x_BTJD: jax.Array,
        state: NGramState | None = None,
        *,
        cached: jax.Array | int = 0,
        first_B: jax.Array | None = None,
        documents: Documents | None = None,
    ) -> tuple[jax.Array, NGramState | None]:
        """With a state, tokens follow `cached` ones; row b starts at slot `first_B`, after its left padding."""
        dtype, (batch, length, num_streams, embed_dim) = x_BTJD.dtype, x_BTJD.shape
        position_BT = None if first_B is None else positions(length, cached, first_B)
        if position_BT is not None:
            tokens_BT = jnp.where(position_BT >= 0, tokens_BT, self.spec.reset_token)
        past = empty_ngram_state(self.spec, batch, num_streams, embed_dim, dtype) if state is None else state
        row_BTN = ngram_rows(self.spec, self.vocab, tokens_BT, past.token_BS, documents)
        rows = self.spec.rows // self.spec.parts
        embedding_BTZ = look_up(as_array(self.weight[...]), row_BTN, rows, dtype).reshape(batch, length, -1)
        key_BTJD = projection.einsum("BTZ,ZJD->BTJD", embedding_BTZ, self.w_key[...].astype(dtype))
        value_BTD = projection.einsum("BTZ,ZD->BTD", embedding_BTZ, self.w_value[...].astype(dtype))
        key_BTJD, query_BTJD = (x.astype(jnp.float32) for x in (self.key_norm(key_BTJD), self.query_norm(x_BTJD)))
        gate_BTJ = jnp.sum(key_BTJD * query_BTJD, axis=-1) / math.sqrt(embed_dim)
        gate_BTJ = jnp.sign(gate_BTJ) * jnp.sqrt(jnp.maximum(jnp.abs(gate_BTJ), 1e-6))
        gated_BTJD = jax.nn.sigmoid(gate_BTJ[..., None]) * value_BTD.astype(jnp.float32)[:, :, None]
        normed_BTJD = self.conv_norm(gated_BTJD.astype(dtype))
        if position_BT is not None:
            normed_BTJD = jnp.where(position_BT[..., None, None] >= 0, normed_BTJD, 0).astype(dtype)
        convolved_BTJD = causal_convolution(
            normed_BTJD, self.conv[...], past.input_BSJD, documents, dilation=self.spec.largest
        )
        out_BTJD = (gated_BTJD + jax.nn.silu(convolved_BTJD)).astype(dtype)
        return out_BTJD, None if state is None else state.extend(tokens_BT, normed_BTJD)


def ngram_rows(
    spec: NGramEmbeddingsSpec,
    vocab: int,
    tokens_BT: jax.Array,
    before_BS: jax.Array,
    documents: Documents | None = None,
) -> jax.Array:
    """Spec: moezoo.core.reference.ngram_embeddings.ngram_rows; after tokens before them, one fewer than `largest`."""
    length, multipliers, sizes = tokens_BT.shape[1], spec.multipliers(vocab), np.array(spec.sizes)
    padded = jnp.concatenate([before_BS, tokens_BT], axis=1)
    seen_BT, mixed, found = tokens_BT, product(tokens_BT, multipliers[0]), []
    for place in range(1, spec.largest):
        ended_BT = seen_BT == spec.reset_token if place > 1 else jnp.zeros_like(seen_BT, bool)
        if documents is not None:
            ended_BT = ended_BT | (documents.position_BT < place)
        start = spec.largest - 1 - place
        seen_BT = jnp.where(ended_BT, spec.reset_token, padded[:, start : start + length])
        mixed = exclusive_or(mixed, product(seen_BT, multipliers[place]))
        found.append(remainder(mixed, spec.sizes[(place - 1) * spec.heads : place * spec.heads]))
    return jnp.concatenate(found, axis=-1) + jnp.asarray(np.cumsum(sizes) - sizes, jnp.int32)
