"""Embeddings of the last n tokens together, looked up by hash, that a layer adds to the residual stream (Engram)."""

import math

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, adapter, inside
from moezoo.core.reference.convolution import causal_convolution
from moezoo.core.reference.normalization import normalize
from moezoo.core.reference.positions import Documents
from moezoo.core.spec import NGramEmbeddingsSpec, NormSpec


def ngram_rows(spec: NGramEmbeddingsSpec, vocab: int, tokens_BT: Array, documents: Documents | None = None) -> Array:
    """Return the row of the table that each hash function finds for each token: int [B, T, N].

    With t_0 the token itself and t_s the one s before it, heads of n find `(m_0 t_0 xor ... xor m_(n-1) t_(n-1)) mod
    size`, in 63 bits, plus the sizes of the heads before; n ascends from 2. A context ends behind a `reset_token`, and
    at the start: what lies before is `reset_token`.

    Args:
        vocab: V, on which the multipliers depend.
        tokens_BT: int, 0 <= token < V.
        documents: those of packed sequences, each with contexts of its own.

    Source: Cheng et al. 2026, arXiv 2601.07372, eq. 1 to 3; transformers 5.23, `Qwen4ExpTextNGramEmbedding`.
    Differs: the paper first maps tokens of equal normalized text to one id.
    """
    length = tokens_BT.shape[1]
    position_BT = np.arange(length) if documents is None else documents.position_BT
    multipliers, sizes = spec.multipliers(vocab), np.array(spec.sizes)
    seen_BT = tokens_BT = tokens_BT.astype(np.int64)
    mixed_BT = tokens_BT * multipliers[0]
    found = []
    for place in range(1, spec.largest):
        before_BT = np.pad(tokens_BT, ((0, 0), (place, 0)))[:, :length]
        ended_BT = position_BT < place
        if place > 1:
            ended_BT = ended_BT | (seen_BT == spec.reset_token)
        seen_BT = np.where(ended_BT, spec.reset_token, before_BT)
        mixed_BT = mixed_BT ^ (seen_BT * multipliers[place])
        heads = slice((place - 1) * spec.heads, place * spec.heads)
        found.append(mixed_BT[..., None] % sizes[heads])
    return np.concatenate(found, axis=-1) + np.cumsum(sizes) - sizes


def ngram_embeddings(
    spec: NGramEmbeddingsSpec,
    norm: NormSpec,
    vocab: int,
    parameters: Parameters,
    tokens_BT: Array,
    x_BTJD: Array,
    documents: Documents | None = None,
) -> Array:
    """Return what is added to each of J residual streams before a layer: [B, T, J, D].

        e = the rows of all heads, one after the other           [B, T, Z]
        k = key_norm(e w_key),  v = e w_value,  q = query_norm(x)  [B, T, J, D], v the same for all streams
        g = k . q / sqrt(D),  r = sign(g) sqrt(max(|g|, 1e-6))
        u = sigmoid(r) v
        out = u + silu(sum over w of conv[w] conv_norm(u)[t - n (W - 1 - w)])    n = largest

    Args:
        norm: the model's norm; each stream has scales of its own.
        parameters: `weight` [parts, rows, H] of N H = Z, `w_key` [Z, J, D], `w_value` [Z, D], `conv` [W, J, D], and
            `key_norm`, `query_norm`, `conv_norm` over D, with scales [J, D].
        tokens_BT: int, 0 <= token < V = `vocab`.
        x_BTJD: the streams before the layer.
        documents: those of packed sequences; none of them affects another.

    Source: Cheng et al. 2026, arXiv 2601.07372, section 2; transformers 5.23, `Qwen4ExpTextPLELayer`.
    Differs: the paper has no signed root.
    """
    table = parameters["weight"].reshape(-1, spec.head_dim)
    embedding_BTZ = table[ngram_rows(spec, vocab, tokens_BT, documents)].reshape(*tokens_BT.shape, spec.dim)
    key_BTJD = adapter.einsum("BTZ,ZJD->BTJD", embedding_BTZ, parameters["w_key"])
    key_BTJD = normalize(norm, inside(parameters, "key_norm"), key_BTJD)
    value_BTD = adapter.einsum("BTZ,ZD->BTD", embedding_BTZ, parameters["w_value"])
    query_BTJD = normalize(norm, inside(parameters, "query_norm"), x_BTJD)
    gate_BTJ = np.sum(key_BTJD * query_BTJD, axis=-1) / math.sqrt(x_BTJD.shape[-1])
    gate_BTJ = np.sign(gate_BTJ) * np.sqrt(np.maximum(np.abs(gate_BTJ), 1e-6))
    gated_BTJD = value_BTD[:, :, None] / (1 + np.exp(-gate_BTJ[..., None]))
    normed_BTJD = normalize(norm, inside(parameters, "conv_norm"), gated_BTJD)
    convolved_BTJD = causal_convolution(normed_BTJD, parameters["conv"], documents, dilation=spec.largest)
    return gated_BTJD + convolved_BTJD / (1 + np.exp(-convolved_BTJD))
