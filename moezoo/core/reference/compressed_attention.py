"""Attention to a window of tokens and to compressed entries of earlier ones."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import autograd.numpy as np
from autograd.tracer import getval

from moezoo.core.reference import Array, Parameters, adapter, inside
from moezoo.core.reference.attention import Attended, visible
from moezoo.core.reference.normalization import normalize, rms_norm
from moezoo.core.reference.positions import Documents, same_document, within_documents
from moezoo.core.reference.routing import softmax
from moezoo.core.reference.sparse_attention import (
    attend_where,
    choose_sources,
    index,
    index_loss,
    rotate_first,
    rotate_last,
)
from moezoo.core.spec import (
    CompressedAttentionSpec,
    CompressionSpec,
    GroupedQueryAttentionSpec,
    IndexerSpec,
    NoPositionSpec,
    NormSpec,
)


class Groups(NamedTuple):
    """Complete groups of tokens, in the order of their last tokens: E of them in each sequence.

    Fields:
        last_BE: int, the index of each group's last token in the sequence.
        position_BE: int, the position of that token: a query at this position, or at a later one, sees the group.
        document_BE: int, its document; None without documents.
    """

    last_BE: Array
    position_BE: Array
    document_BE: Array | None


def compressed_attention(
    spec: CompressedAttentionSpec, parameters: Parameters, x_BTD: Array, *, documents: Documents | None = None
) -> Attended:
    """Causal attention to the last `window` tokens and to compressed entries: [B, T, D] -> [B, T, D].

    Head n has the query `rotate(rms(norm(x w_query_down) w_query_n))`; all heads share the key `rotate(norm(x w_key))`
    of each token, and the entry of each group (`compress`), which are also the values. One softmax is over both, and
    over the head's sink. `rotate` turns the last `rope_head_dim` features; the heads' output is rotated by the negative
    position of the query. Head m G + g of output group m is multiplied by `w_output_down[g, :, m]`; their sum, for all
    groups, by `w_output`.

    With an indexer a query sees only the entries of the `top_k` highest index, among those of complete groups.

    Of packed sequences, each of their `documents` is by itself: its groups begin with its first token.

    Args:
        parameters: `w_query_down` [D, Z], `query_norm`, `w_query` [Z, N, H], `w_key` [D, H], `key_norm`, `sink` [N],
            `w_output_down` [G, H, M, Z] and `w_output` [M, Z, D] of M groups of G heads; and those of `compressor`
            and, if there is one, of `indexer`.

    Source: DeepSeek-AI 2026 (DeepSeek-V4), section 2.3; transformers 5.23, `deepseek_v4`.
    Differs: the indexer is trained as DeepSeek-V3.2's is, by `index_loss`; transformers has no loss of it.
    """
    batch, length = x_BTD.shape[:2]
    position_T = np.arange(length) if documents is None else documents.position_BT
    source_BTZ = adapter.einsum("BTD,DZ->BTZ", x_BTD, parameters["w_query_down"])
    source_BTZ = normalize(spec.norm, inside(parameters, "query_norm"), source_BTZ)
    query_BTNH = adapter.einsum("BTZ,ZNH->BTNH", source_BTZ, parameters["w_query"])
    query_BTNH = rms_norm(query_BTNH, None, spec.norm.epsilon)
    query_BTNH = rotate_last(spec.position, spec.rope_head_dim, query_BTNH, position_T)
    key_BSH = adapter.einsum("BTD,DH->BTH", x_BTD, parameters["w_key"])
    key_BSH = normalize(spec.norm, inside(parameters, "key_norm"), key_BSH)
    key_BSMH = rotate_last(spec.position, spec.rope_head_dim, key_BSH[:, :, None], position_T)
    mask_TS = within_documents(visible(windowed(spec), position_T, position_T), documents)
    mask_BTS, loss = np.broadcast_to(mask_TS, (batch, *mask_TS.shape[-2:])), None
    groups = None if spec.compression is None else complete_groups(spec.compression.ratio, batch, length, documents)
    if spec.compression is not None and groups is not None:
        own, turn = inside(parameters, "compressor"), partial(rotate_last, spec.position, spec.rope_head_dim)
        entry_BEH = compress(spec.compression, spec.norm, turn, own, x_BTD, groups)
        key_BSMH = np.concatenate([key_BSMH, entry_BEH[:, :, None]], axis=1)
        mask_BTE = seen_groups(groups, position_T, documents)
        if spec.compression.indexer is not None:
            index_BTE = _index(spec, spec.compression.indexer, parameters, x_BTD, source_BTZ, position_T, groups)
            mask_BTE = choose_sources(index_BTE, mask_BTE, spec.compression.indexer.top_k)
        mask_BTS = np.concatenate([mask_BTS, mask_BTE], axis=-1)
    scale, sink_N = 1 / np.sqrt(spec.head_dim), parameters["sink"]
    attended, distribution_BTS = attend_where(query_BTNH[:, :, None], key_BSMH, key_BSMH, mask_BTS, scale, sink_N)
    if spec.compression is not None and spec.compression.indexer is not None:
        loss = np.zeros(())
        if groups is not None:
            loss = entry_loss(index_BTE, distribution_BTS[..., length:], mask_BTE, documents)
    out_BTNH = rotate_last(spec.position, spec.rope_head_dim, attended[:, :, 0], -position_T)
    out_BTMGH = np.reshape(out_BTNH, (batch, length, spec.output_groups, -1, spec.head_dim))
    low_BTMZ = adapter.einsum("BTMGH,GHMZ->BTMZ", out_BTMGH, parameters["w_output_down"])
    return Attended(adapter.einsum("BTMZ,MZD->BTD", low_BTMZ, parameters["w_output"]), None, loss)


def windowed(spec: CompressedAttentionSpec) -> GroupedQueryAttentionSpec:
    """Return the multi-query attention to the window that remains without compressed entries, once all is rotated."""
    return GroupedQueryAttentionSpec(
        num_heads=spec.num_heads,
        num_kv_heads=1,
        head_dim=spec.head_dim,
        position=NoPositionSpec(),
        window=spec.window,
        sinks=True,
    )


def complete_groups(ratio: int, batch: int, length: int, documents: Documents | None) -> Groups | None:
    """Return the complete groups of `ratio` tokens in sequences of `length`; None where none can be.

    There are `length // ratio` in each. Of packed documents, whose last groups may be incomplete, there are at most as
    many; what is left has the position `length`, which no query reaches.
    """
    number = length // ratio
    if number == 0:
        return None
    if documents is None:
        last_BE = np.broadcast_to(ratio * np.arange(1, number + 1) - 1, (batch, number))
        return Groups(last_BE, last_BE, None)
    is_last_BT = documents.position_BT % ratio == ratio - 1
    last_BE = np.argsort(~is_last_BT, axis=-1, kind="stable")[:, :number]
    position_BE, document_BE, is_last_BE = (
        np.take_along_axis(each, last_BE, axis=1) for each in (documents.position_BT, documents.document_BT, is_last_BT)
    )
    return Groups(last_BE, np.where(is_last_BE, position_BE, length), document_BE)


def seen_groups(groups: Groups, position_T: Array, documents: Documents | None) -> Array:
    """Return the mask of the groups that each query may see, those complete by its position: bool [B, T, E]."""
    mask_BTE = position_T[..., :, None] >= groups.position_BE[:, None, :]
    if documents is None or groups.document_BE is None:
        return mask_BTE
    return mask_BTE & same_document(documents.document_BT, groups.document_BE)


def compress(
    spec: CompressionSpec,
    norm: NormSpec,
    turn: Callable[[Array, Array], Array],
    parameters: Parameters,
    x_BTD: Array,
    groups: Groups,
) -> Array:
    """Return the compressed entry of each group: `turn(norm(sum_w softmax_w(z_w + b_w) * c_w))`, [B, E, H].

    Token w of the group has `c_w = x_w w_key` and `z_w = x_w w_gate`; the softmax is for each feature by itself, b is
    `position_bias` [ratio, H], and `turn` rotates by the position of the group's first token. With `overlap` both
    projections have 2 H features: the last H for the group of their own token, the first H for the group after it. The
    softmax is then over the tokens of both groups; the first group of a sequence has only its own.

    Source: DeepSeek-AI 2026 (DeepSeek-V4), eq. 9-12 and 20-23.
    """
    key_BTC = adapter.einsum("BTD,DC->BTC", x_BTD, parameters["w_key"])
    gate_BTC = adapter.einsum("BTD,DC->BTC", x_BTD, parameters["w_gate"])
    offset_S = np.arange(1 - spec.width, 1)  # of the tokens of an entry from its last one
    token_BES = np.maximum(groups.last_BE[..., None] + offset_S, 0)
    row_B11 = np.arange(len(x_BTD))[:, None, None]
    own = spec.ratio if spec.overlap else 0  # the first tokens are those of the group before

    def drawn(x: Array) -> Array:
        """Return the features that each token has for the entry: of [..., S, C] those [..., S, H]."""
        width = x.shape[-1] // 2 if spec.overlap else 0
        before, after = x[..., :own, :width], x[..., own:, width:]
        return np.concatenate([before, after], axis=-2) if spec.overlap else after

    bias_SC = np.concatenate([parameters["position_bias"]] * (spec.width // spec.ratio), axis=0)
    logit_BESH = drawn(gate_BTC[row_B11, token_BES]) + drawn(bias_SC)
    exists_BES1 = (groups.position_BE[..., None] + offset_S >= 0)[..., None]
    weight_BEHS = softmax(np.swapaxes(np.where(exists_BES1, logit_BESH, -np.inf), -1, -2))
    entry_BEH = np.sum(np.swapaxes(weight_BEHS, -1, -2) * drawn(key_BTC[row_B11, token_BES]), axis=2)
    entry_BEH = normalize(norm, inside(parameters, "key_norm"), entry_BEH)
    first_BE = groups.position_BE - (spec.ratio - 1)
    return turn(entry_BEH[:, :, None], first_BE)[:, :, 0]


def _index(
    spec: CompressedAttentionSpec,
    indexer: IndexerSpec,
    parameters: Parameters,
    x_BTD: Array,
    source_BTZ: Array,
    position_T: Array,
    groups: Groups,
) -> Array:
    """Return the index of each group for each query: [B, T, E]; gradients stop at the indexer's inputs."""
    assert spec.compression is not None
    own, x_BTD, source_BTZ = inside(parameters, "indexer"), getval(x_BTD), getval(source_BTZ)
    position = spec.position.model_copy(update={"layout": indexer.layout})
    turn = partial(rotate_first if indexer.rotated == "first" else rotate_last, position, spec.rope_head_dim)
    key_BEH = compress(spec.compression, indexer.key_norm, turn, inside(own, "compressor"), x_BTD, groups)
    query_BTNH = turn(adapter.einsum("BTZ,ZNH->BTNH", source_BTZ, own["w_query"]), position_T)
    weight_BTN = adapter.einsum("BTD,DN->BTN", x_BTD, own["w_weight"])
    return index(query_BTNH, key_BEH, weight_BTN / np.sqrt(indexer.num_heads * indexer.head_dim))


def entry_loss(index_BTE: Array, distribution_BTE: Array, mask_BTE: Array, documents: Documents | None = None) -> Array:
    """Return `index_loss` over entries: 0 for a query that sees none.

    `distribution_BTE`: the attention weights of entries, averaged over heads; divided here by their sum, since those of
    the window and of the sinks are not among them.
    """
    any_BT1 = np.any(mask_BTE, axis=-1, keepdims=True)
    total_BT1 = np.maximum(np.sum(distribution_BTE, axis=-1, keepdims=True), 1e-30)
    distribution_BTE = np.where(any_BT1, distribution_BTE / total_BT1, 1 / mask_BTE.shape[-1])
    return index_loss(np.where(any_BT1, index_BTE, 0.0), distribution_BTE, mask_BTE | ~any_BT1, documents)
