"""Caches of compressed attention: keys of a window, and compressed entries of all earlier tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moezoo.core.spec import CompressedAttentionSpec


class EntryCache(NamedTuple):
    """Compressed entries of complete groups, and both projections of the last tokens, which the next ones draw on.

    The last slot takes what is no entry: its group ends behind all tokens, so that no query sees it.
    """

    entry_BEH: jax.Array
    key_BSC: jax.Array
    gate_BSC: jax.Array

    def followed(self, key_BTC: jax.Array, gate_BTC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return both projections of the last tokens and of T new ones."""
        return jnp.concatenate([self.key_BSC, key_BTC], axis=1), jnp.concatenate([self.gate_BSC, gate_BTC], axis=1)

    def extend(
        self, key_BSC: jax.Array, gate_BSC: jax.Array, entry_BEH: jax.Array, group_BE: jax.Array
    ) -> "EntryCache":
        """Put in the entries of these groups, -1 for none; the projections are those of `followed`."""
        kept = self.key_BSC.shape[1]
        slot_BE = jnp.where(group_BE < 0, self.entry_BEH.shape[1] - 1, group_BE)
        slot_BEH = jnp.broadcast_to(slot_BE[..., None], entry_BEH.shape)
        entry_BEH = jnp.put_along_axis(self.entry_BEH, slot_BEH, entry_BEH, axis=1, inplace=False)
        return EntryCache(entry_BEH, key_BSC[:, -kept:], gate_BSC[:, -kept:])


class CompressedCache(NamedTuple):
    """Keys of the last S of `length` slots, as in RollingCache; entries, and those of an indexer, if there are any."""

    key_BSMH: jax.Array
    entries: EntryCache | None
    index_entries: EntryCache | None
    length: jax.Array

    def extend(self, key_BTMH: jax.Array) -> tuple["CompressedCache", jax.Array, jax.Array]:
        """Append T tokens: return the new cache, the keys that they may attend to, and the slot of each key."""
        (key_BSMH,), (seen_BSMH,), slot_S = rolled((self.key_BSMH,), (key_BTMH,), self.length)
        return self._replace(key_BSMH=key_BSMH, length=self.length + key_BTMH.shape[1]), seen_BSMH, slot_S


def empty_compressed_cache(spec: CompressedAttentionSpec, batch: int, size: int, dtype: jnp.dtype) -> CompressedCache:
    """Return the cache before the first of `size` tokens."""
    key, compression = jnp.zeros((batch, min(size, spec.window), 1, spec.head_dim), dtype), spec.compression
    if compression is None:
        return CompressedCache(key, None, None, jnp.zeros((), jnp.int32))

    def entries(width: int) -> EntryCache:
        features = 2 * width if compression.overlap else width
        projected, entry = (batch, compression.width - 1, features), (batch, size // compression.ratio + 1, width)
        return EntryCache(jnp.zeros(entry, dtype), jnp.zeros(projected, dtype), jnp.zeros(projected, dtype))

    indexer = compression.indexer
    own = None if indexer is None else entries(indexer.head_dim)
    return CompressedCache(key, entries(spec.head_dim), own, jnp.zeros((), jnp.int32))


def rolled(
    before: Sequence[jax.Array], new: Sequence[jax.Array], length: jax.Array
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """Append tokens to arrays of the last S of `length` slots, slot s at index `s % S`.

    Return the new arrays; all that the new tokens may attend to, the S - 1 slots before the first of them included; and
    the slot of each.
    """
    number, size = new[0].shape[1], before[0].shape[1]
    pairs = list(zip(before, new, strict=True))
    if number == 1:
        kept_BS = [lax.dynamic_update_slice(kept, more, (0, length % size, 0, 0)) for kept, more in pairs]
        return kept_BS, kept_BS, length - (length - jnp.arange(size)) % size
    seen_BS = [jnp.concatenate([jnp.roll(kept, -length, axis=1), more], axis=1) for kept, more in pairs]
    kept_BS = [jnp.roll(part[:, number:], length + number, axis=1) for part in seen_BS]
    return kept_BS, seen_BS, length - size + jnp.arange(size + number)
