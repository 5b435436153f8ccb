"""Attention to a window and to compressed entries. Spec: moezoo.core.reference.compressed_attention."""

import math
from typing import Literal, NamedTuple

import mlx.core as mx
from mlx import nn

from moezoo.core.reference.compressed_attention import windowed
from moezoo.core.spec import CompressedAttentionSpec, CompressionSpec, IndexerSpec, NormSpec, RMSNormSpec, RoPESpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.attention import attend, attend_causally, visible
from moezoo.mlx_backend.entry_cache import CompressedCache, EntryCache
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.kernels.attention import chunk_length
from moezoo.mlx_backend.kv_cache import Attended
from moezoo.mlx_backend.normalization import norm
from moezoo.mlx_backend.positions import Documents, positions, same_document, same_side, within_documents
from moezoo.mlx_backend.sparse_attention import (
    attend_where,
    choose_sources,
    index,
    index_loss,
    rotate_first,
    rotate_last,
)


class Groups(NamedTuple):
    """Spec: moezoo.core.reference.compressed_attention.Groups; without `last_BE`, they follow one another from 0."""

    last_BE: mx.array | None
    position_BE: mx.array
    document_BE: mx.array | None


class Rotation(NamedTuple):
    """The rotation of the first or the last features of a head."""

    position: RoPESpec
    rope_head_dim: int
    rotated: Literal["first", "last"]

    def turn(self, x_BTNH: mx.array, position_T: mx.array) -> mx.array:
        """Rotate to these positions."""
        rotate_part = rotate_first if self.rotated == "first" else rotate_last
        return rotate_part(self.position, self.rope_head_dim, x_BTNH, position_T)


class Compressor(nn.Module):
    """Spec: moezoo.core.reference.compressed_attention.compress, in float32, cast back."""

    def __init__(self, spec: CompressionSpec, norm_spec: NormSpec, rotation: Rotation, weights: Weights):
        super().__init__()
        self.spec, self.rotation = spec, rotation
        self.w_key = weights.parameter("w_key")
        self.w_gate = weights.parameter("w_gate")
        self.position_bias = weights.parameter("position_bias")
        self.key_norm = norm(norm_spec, weights.inside("key_norm"))

    def projected(self, x_BTD: mx.array) -> tuple[mx.array, mx.array]:
        """Return what the entries of tokens are made of: both projections, [B, T, C]."""
        dtype = x_BTD.dtype
        key_BTC = projection.einsum("BTD,DC->BTC", x_BTD, self.w_key.astype(dtype))
        return key_BTC, projection.einsum("BTD,DC->BTC", x_BTD, self.w_gate.astype(dtype))

    def __call__(self, key_BSC: mx.array, gate_BSC: mx.array, groups: Groups) -> mx.array:
        """Return entries [B, E, H] of projected tokens."""
        spec, number = self.spec, groups.position_BE.shape[-1]
        bias_RC = mx.concatenate([self.position_bias.astype(mx.float32)] * (spec.width // spec.ratio))
        logit_BESH = self._drawn(gate_BSC, groups.last_BE, number).astype(mx.float32) + self._halves(bias_RC)
        # What is no group, in the padding of a cache, draws on its last token: a softmax over nothing is NaN.
        exists_BES = mx.maximum(groups.position_BE[..., None], 0) + mx.arange(1 - spec.width, 1) >= 0
        weight_BESH = mx.softmax(mx.where(exists_BES[..., None], logit_BESH, -mx.inf), axis=-2, precise=True)
        entry_BEH = mx.sum(weight_BESH * self._drawn(key_BSC, groups.last_BE, number), axis=-2)
        entry_BEH = self.key_norm(entry_BEH.astype(key_BSC.dtype))
        first_BE = groups.position_BE - (spec.ratio - 1)
        return self.rotation.turn(entry_BEH[:, :, None], first_BE)[:, :, 0]

    def _drawn(self, x_BSC: mx.array, last_BE: mx.array | None, number: int) -> mx.array:
        """Return the features that each token of an entry has for it: [B, E, S, H]."""
        spec, (batch, length, width) = self.spec, x_BSC.shape
        if last_BE is not None:
            token_BES = mx.clip(last_BE[..., None] + mx.arange(1 - spec.width, 1), 0, length - 1)
            x_BRC = mx.take_along_axis(x_BSC, token_BES.reshape(batch, -1, 1), axis=1)
            return self._halves(x_BRC.reshape(batch, number, spec.width, width))
        x_BESC = x_BSC[:, : number * spec.ratio].reshape(batch, number, spec.ratio, width)
        if not spec.overlap:
            return x_BESC
        before_BESC = mx.pad(x_BESC[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)])
        return self._halves(mx.concatenate([before_BESC, x_BESC], axis=2))

    def _halves(self, x: mx.array) -> mx.array:
        """With overlap, return the first features of the tokens of the group before, and the last ones of the own."""
        if not self.spec.overlap:
            return x
        ratio, width = self.spec.ratio, x.shape[-1] // 2
        return mx.concatenate([x[..., :ratio, :width], x[..., ratio:, width:]], axis=-2)


class EntryIndexer(nn.Module):
    """The indexer of compressed entries. Spec: moezoo.core.reference.compressed_attention."""

    def __init__(self, spec: IndexerSpec, compression: CompressionSpec, rotation: Rotation, weights: Weights):
        super().__init__()
        self.spec, position = spec, rotation.position.model_copy(update={"layout": spec.layout})
        self.rotation = Rotation(position, rotation.rope_head_dim, spec.rotated)
        self.w_query = weights.parameter("w_query")
        self.w_weight = weights.parameter("w_weight")
        self.compressor = Compressor(compression, spec.key_norm, self.rotation, weights.inside("compressor"))

    def __call__(self, x_BTD: mx.array, source_BTZ: mx.array, key_BEH: mx.array, position_T: mx.array) -> mx.array:
        """Return the index of each entry for each query: [B, T, E] in float32; x and source without gradient."""
        spec, dtype = self.spec, x_BTD.dtype
        query_BTNH = projection.einsum("BTZ,ZNH->BTNH", source_BTZ, self.w_query.astype(dtype))
        query_BTNH = self.rotation.turn(query_BTNH, position_T)
        weight_BTN = projection.einsum("BTD,DN->BTN", x_BTD.astype(mx.float32), self.w_weight.astype(mx.float32))
        return index(query_BTNH, key_BEH, weight_BTN / math.sqrt(spec.num_heads * spec.head_dim))


class CompressedAttention(nn.Module):
    """Spec: moezoo.core.reference.compressed_attention.compressed_attention; with a cache, for the next tokens."""

    def __init__(self, spec: CompressedAttentionSpec, weights: Weights, layer: int):
        super().__init__()
        self.spec = spec
        self.w_query_down = weights.parameter("w_query_down")
        self.query_norm = norm(spec.norm, weights.inside("query_norm"))
        self.w_query = weights.parameter("w_query")
        self.head_norm = norm(RMSNormSpec(epsilon=spec.norm.epsilon, scale="none"), weights)
        self.w_key = weights.parameter("w_key")
        self.key_norm = norm(spec.norm, weights.inside("key_norm"))
        self.sink = weights.parameter("sink")
        self.w_output_down = weights.parameter("w_output_down")
        self.w_output = weights.parameter("w_output")
        compression = spec.compression
        self.rotation = Rotation(spec.position, spec.rope_head_dim, "last")
        if compression is not None:
            self.compressor = Compressor(compression, spec.norm, self.rotation, weights.inside("compressor"))
        if compression is not None and compression.indexer is not None:
            self.indexer = EntryIndexer(compression.indexer, compression, self.rotation, weights.inside("indexer"))

    def __call__(
        self,
        x_BTD: mx.array,
        cache: CompressedCache | None = None,
        *,
        first_value_BTMH: mx.array | None = None,
        first_B: mx.array | None = None,
        documents: Documents | None = None,
    ) -> Attended:
        """With a cache, the tokens follow the cached ones; row b starts at slot `first_B`, after its left padding."""
        spec, dtype, (batch, length) = self.spec, x_BTD.dtype, x_BTD.shape[:2]
        position_T = positions(length, 0 if cache is None else cache.length, first_B, documents)
        source_BTZ = self.query_norm(projection.einsum("BTD,DZ->BTZ", x_BTD, self.w_query_down.astype(dtype)))
        query_BTNH = projection.einsum("BTZ,ZNH->BTNH", source_BTZ, self.w_query.astype(dtype))
        query_BTNH = self.rotation.turn(self.head_norm(query_BTNH), position_T)
        key_BTH = self.key_norm(projection.einsum("BTD,DH->BTH", x_BTD, self.w_key.astype(dtype)))
        key_BSMH = self.rotation.turn(key_BTH[:, :, None], position_T)
        if cache is None:
            mask_TS = within_documents(visible(windowed(spec), position_T, position_T), documents)
        else:
            cache, key_BSMH, slot_S = cache.extend(key_BSMH)
            position_S = slot_S if first_B is None else slot_S - first_B[:, None]
            mask_TS = visible(windowed(spec), position_T, position_S) & same_side(position_T, position_S)
        entry_BEH, mask_TE, index_BTE, cache = self._entries(x_BTD, source_BTZ, position_T, cache, documents)
        attended, distribution_BTE = self._attended(query_BTNH, key_BSMH, mask_TS, entry_BEH, mask_TE, cache, documents)
        loss = None
        if spec.compression is not None and spec.compression.indexer is not None and cache is None:
            loss = mx.array(0.0)
            if index_BTE is not None and mask_TE is not None and distribution_BTE is not None:
                loss = entry_loss(index_BTE, distribution_BTE, mask_TE, documents)
        out_BTNH = self.rotation.turn(attended, -position_T)
        out_BTMGH = out_BTNH.reshape(batch, length, spec.output_groups, -1, spec.head_dim)
        low_BTMZ = projection.einsum("BTMGH,GHMZ->BTMZ", out_BTMGH, self.w_output_down.astype(dtype))
        out_BTD = projection.einsum("BTMZ,MZD->BTD", low_BTMZ, self.w_output.astype(dtype))
        return Attended(out_BTD, cache, None, loss)

    def _entries(
        self,
        x_BTD: mx.array,
        source_BTZ: mx.array,
        position_T: mx.array,
        cache: CompressedCache | None,
        documents: Documents | None,
    ) -> tuple[mx.array | None, mx.array | None, mx.array | None, CompressedCache | None]:
        """Return entries, the mask of those that each query attends to, their index if there is one, and the cache."""
        compression, (batch, length) = self.spec.compression, x_BTD.shape[:2]
        if compression is None or (cache is None and length < compression.ratio):
            return None, None, None, cache
        indexer, index_BTE = compression.indexer, None
        x_detached, source_detached = mx.stop_gradient(x_BTD), mx.stop_gradient(source_BTZ)
        index_key = None
        if cache is None:
            groups = complete_groups(compression.ratio, batch, length, documents)
            entry_BEH = self.compressor(*self.compressor.projected(x_BTD), groups)
            if indexer is not None:
                index_key = self.indexer.compressor(*self.indexer.compressor.projected(x_detached), groups)
        else:
            assert cache.entries is not None
            entries = _extended(self.compressor, x_BTD, position_T, cache.entries)
            filled = max(1, cache.length // compression.ratio)
            cache, entry_BEH = cache._replace(entries=entries), entries.entry_BEH[:, :filled]
            groups = Groups(None, compression.ratio * mx.arange(1, entry_BEH.shape[1] + 1)[None] - 1, None)
            if cache.index_entries is not None:
                own = _extended(self.indexer.compressor, x_BTD, position_T, cache.index_entries)
                cache, index_key = cache._replace(index_entries=own), own.entry_BEH[:, :filled]
        mask_TE = seen_groups(groups, position_T, documents)
        if indexer is not None:
            assert index_key is not None
            index_BTE = self.indexer(x_detached, source_detached, index_key, position_T)
            mask_TE = choose_sources(index_BTE, mask_TE, indexer.top_k)
        return entry_BEH, mask_TE, index_BTE, cache

    def _attended(
        self,
        query_BTNH: mx.array,
        key_BSMH: mx.array,
        mask_TS: mx.array,
        entry_BEH: mx.array | None,
        mask_TE: mx.array | None,
        cache: CompressedCache | None,
        documents: Documents | None,
    ) -> tuple[mx.array, mx.array | None]:
        """Attend to keys and entries; without a cache, in chunks of queries, each to what it may see.

        Also return the distribution over the entries that trains an indexer.
        """
        spec, sink_N = self.spec, self.sink.astype(mx.float32)
        grouped = query_BTNH[:, :, None]
        if entry_BEH is None or mask_TE is None:
            if cache is None:
                return attend_causally(windowed(spec), grouped, key_BSMH, key_BSMH, sink_N, documents)[:, :, 0], None
            return attend(grouped, key_BSMH, key_BSMH, mask_TS, sink_N=sink_N)[:, :, 0], None
        assert spec.compression is not None
        if cache is not None:
            both = mx.concatenate([key_BSMH, entry_BEH[:, :, None]], axis=1)
            return attend(grouped, both, both, _joined(mask_TS, mask_TE), sink_N=sink_N)[:, :, 0], None
        length, found, distributions = query_BTNH.shape[1], [], []
        size, scale = chunk_length(length), 1 / math.sqrt(spec.head_dim)
        for start in range(0, length, size):
            end, first = min(start + size, length), max(0, start - spec.window + 1)
            seen = min(max(1, end // spec.compression.ratio), entry_BEH.shape[1])
            both = mx.concatenate([key_BSMH[:, first:end], entry_BEH[:, :seen, None]], axis=1)
            mask = _joined(mask_TS[..., start:end, first:end], mask_TE[..., start:end, :seen])
            query = grouped[:, start:end]
            if spec.compression.indexer is None:
                found.append(attend(query, both, both, mask, sink_N=sink_N))
                continue
            attended, distribution = attend_where(query, both, both, mask, scale, sink_N)
            found.append(attended)
            behind = [(0, 0), (0, 0), (0, entry_BEH.shape[1] - seen)]
            distributions.append(mx.pad(distribution[..., end - first :], behind))
        distribution_BTE = mx.concatenate(distributions, axis=1) if distributions else None
        return mx.concatenate(found, axis=1)[:, :, 0], distribution_BTE


def complete_groups(ratio: int, batch: int, length: int, documents: Documents | None) -> Groups:
    """Spec: moezoo.core.reference.compressed_attention.complete_groups; there must be room for one."""
    number = length // ratio
    if documents is None:
        return Groups(None, ratio * mx.arange(1, number + 1)[None] - 1, None)
    is_last_BT = documents.position_BT % ratio == ratio - 1
    last_BE = mx.argsort(~is_last_BT, axis=-1)[:, :number]
    position_BE, document_BE, is_last_BE = (
        mx.take_along_axis(each, last_BE, axis=1) for each in (*reversed(documents), is_last_BT)
    )
    return Groups(last_BE, mx.where(is_last_BE, position_BE, length), document_BE)


def seen_groups(groups: Groups, position_T: mx.array, documents: Documents | None) -> mx.array:
    """Spec: moezoo.core.reference.compressed_attention.seen_groups; [T, E] where all sequences have the same groups."""
    if documents is None or groups.document_BE is None:
        return position_T[..., :, None] >= groups.position_BE[0]
    mask_BTE = position_T[..., :, None] >= groups.position_BE[:, None, :]
    return mask_BTE & same_document(documents.document_BT, groups.document_BE)


def _extended(compressor: Compressor, x_BTD: mx.array, position_T: mx.array, cache: EntryCache) -> EntryCache:
    """Return the cache of entries after these tokens."""
    ratio, (batch, length), kept = compressor.spec.ratio, x_BTD.shape[:2], cache.key_BSC.shape[1]
    key_BSC, gate_BSC = cache.followed(*compressor.projected(x_BTD))
    first_B1, last_B1 = (mx.broadcast_to(each, (batch, 1)) for each in (position_T[..., :1], position_T[..., -1:]))
    group_BE = first_B1 // ratio + mx.arange((length + ratio - 1) // ratio)
    position_BE = (group_BE + 1) * ratio - 1
    entry_BEH = compressor(key_BSC, gate_BSC, Groups(position_BE - first_B1 + kept, position_BE, None))
    is_complete_BE = (position_BE <= last_B1) & (group_BE >= 0)
    return cache.extend(key_BSC, gate_BSC, entry_BEH, mx.where(is_complete_BE, group_BE, -1))


def _joined(mask_TS: mx.array, mask_TE: mx.array) -> mx.array:
    """Return the mask of keys and entries: [T, S + E], or one per sequence."""
    lead = mx.broadcast_shapes(mask_TS.shape[:-1], mask_TE.shape[:-1])
    return mx.concatenate([mx.broadcast_to(each, (*lead, each.shape[-1])) for each in (mask_TS, mask_TE)], axis=-1)


def entry_loss(
    index_BTE: mx.array, distribution_BTE: mx.array, mask_BTE: mx.array, documents: Documents | None = None
) -> mx.array:
    """Spec: moezoo.core.reference.compressed_attention.entry_loss."""
    any_BT1 = mx.any(mask_BTE, axis=-1, keepdims=True)
    total_BT1 = mx.maximum(mx.sum(distribution_BTE, axis=-1, keepdims=True), 1e-30)
    distribution_BTE = mx.where(any_BT1, distribution_BTE / total_BT1, 1 / mask_BTE.shape[-1])
    return index_loss(mx.where(any_BT1, index_BTE, 0.0), distribution_BTE, mask_BTE | ~any_BT1, documents)
