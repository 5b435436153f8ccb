"""Caches of compressed attention: keys of a window, and compressed entries of all earlier tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from moezoo.core.spec import CompressedAttentionSpec


class EntryCache(NamedTuple):
    """Compressed entries of complete groups, and both projections of the last tokens, which the next ones draw on.

    The last slot takes what is no entry: its group ends behind all tokens, so that no query sees it.
    """

    entry_BEH: mx.array
    key_BSC: mx.array
    gate_BSC: mx.array

    def followed(self, key_BTC: mx.array, gate_BTC: mx.array) -> tuple[mx.array, mx.array]:
        """Return both projections of the last tokens and of T new ones."""
        return mx.concatenate([self.key_BSC, key_BTC], axis=1), mx.concatenate([self.gate_BSC, gate_BTC], axis=1)

    def extend(self, key_BSC: mx.array, gate_BSC: mx.array, entry_BEH: mx.array, group_BE: mx.array) -> "EntryCache":
        """Put in the entries of these groups, -1 for none; the projections are those of `followed`."""
        kept = self.key_BSC.shape[1]
        slot_BE = mx.where(group_BE < 0, self.entry_BEH.shape[1] - 1, group_BE)
        slot_BEH = mx.broadcast_to(slot_BE[..., None], entry_BEH.shape)
        entry_BEH = mx.put_along_axis(self.entry_BEH, slot_BEH, entry_BEH, axis=1)
        return EntryCache(entry_BEH, key_BSC[:, -kept:], gate_BSC[:, -kept:])


class CompressedCache(NamedTuple):
    """Keys of the last S of `length` slots, as in RollingCache; entries, and those of an indexer, if there are any."""

    key_BSMH: mx.array
    entries: EntryCache | None
    index_entries: EntryCache | None
    length: int

    def extend(self, key_BTMH: mx.array) -> tuple["CompressedCache", mx.array, mx.array]:
        """Append T tokens: return the new cache, the keys that they may attend to, and the slot of each key."""
        (key_BSMH,), (seen_BSMH,), slot_S = rolled((self.key_BSMH,), (key_BTMH,), self.length)
        return self._replace(key_BSMH=key_BSMH, length=self.length + key_BTMH.shape[1]), seen_BSMH, slot_S


def empty_compressed_cache(spec: CompressedAttentionSpec, batch: int, size: int, dtype: mx.Dtype) -> CompressedCache:
    """Return the cache before the first of `size` tokens."""
    key, compression = mx.zeros((batch, min(size, spec.window), 1, spec.head_dim), dtype), spec.compression
    if compression is None:
        return CompressedCache(key, None, None, 0)

    def entries(width: int) -> EntryCache:
        features = 2 * width if compression.overlap else width
        projected, entry = (batch, compression.width - 1, features), (batch, size // compression.ratio + 1, width)
        return EntryCache(mx.zeros(entry, dtype), mx.zeros(projected, dtype), mx.zeros(projected, dtype))

    indexer = compression.indexer
    own = None if indexer is None else entries(indexer.head_dim)
    return CompressedCache(key, entries(spec.head_dim), own, 0)


def rolled(
    before: Sequence[mx.array], new: Sequence[mx.array], length: int
) -> tuple[list[mx.array], list[mx.array], mx.array]:
    """Append tokens to arrays of the last S of `length` slots, slot s at index `s % S`.

    Return the new arrays; all that the new tokens may attend to, the S - 1 slots before the first of them included; and
    the slot of each.
    """
    number, size = new[0].shape[1], before[0].shape[1]
    pairs = list(zip(before, new, strict=True))
    if number == 1:
        kept_BS = [mx.slice_update(kept, more, mx.array([length % size]), (1,)) for kept, more in pairs]
        return kept_BS, kept_BS, length - (length - mx.arange(size)) % size
    seen_BS = [mx.concatenate([mx.roll(kept, -length, 1), more], axis=1) for kept, more in pairs]
    kept_BS = [mx.roll(part[:, number:], length + number, 1) for part in seen_BS]
    return kept_BS, seen_BS, length - size + mx.arange(size + number)
