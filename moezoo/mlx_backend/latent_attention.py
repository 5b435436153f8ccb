"""Multi-head latent attention. Spec: moezoo.core.reference.latent_attention."""

from typing import assert_never

import mlx.core as mx
from mlx import nn

from moezoo.core.reference.latent_attention import expanded, score_scale
from moezoo.core.spec import LatentAttentionSpec, NoPositionSpec, RoPESpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.attention import attend, attend_causally, visible
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.kv_cache import Attended, LatentCache, RollingCache
from moezoo.mlx_backend.normalization import norm
from moezoo.mlx_backend.positions import Documents, positions, rotate, same_side, temperature, within_documents
from moezoo.mlx_backend.sparse_attention import Indexer, attend_where


class LatentAttention(nn.Module):
    """Spec: moezoo.core.reference.latent_attention.latent_attention; with a cache, in the absorbed form."""

    def __init__(self, spec: LatentAttentionSpec, weights: Weights, layer: int):
        super().__init__()
        self.spec = spec
        if spec.query_latent_dim is not None:
            self.w_query_down = weights.parameter("w_query_down")
            self.query_norm = norm(spec.norm, weights.inside("query_norm"))
        self.w_query = weights.parameter("w_query")
        if spec.query_gate:
            self.w_query_gate = weights.parameter("w_query_gate")
        self.w_latent = weights.parameter("w_latent")
        if spec.rope_head_dim:
            self.w_rope_key = weights.parameter("w_rope_key")
        self.latent_norm = norm(spec.norm, weights.inside("latent_norm"))
        if spec.rope_key_norm:
            self.rope_key_norm = norm(spec.norm, weights.inside("rope_key_norm"))
        self.w_key = weights.parameter("w_key")
        self.w_value = weights.parameter("w_value")
        self.w_output = weights.parameter("w_output")
        if spec.gate is not None:
            self.w_gate = weights.parameter("w_gate")
        if spec.sinks:
            self.sink = weights.parameter("sink")
        if spec.bias:
            if spec.query_latent_dim is not None:
                self.b_query_down = weights.parameter("b_query_down")
            self.b_latent = weights.parameter("b_latent")
            if spec.rope_head_dim:
                self.b_rope_key = weights.parameter("b_rope_key")
            self.b_output = weights.parameter("b_output")
        if spec.indexer is not None:
            self.indexer = Indexer(spec.indexer, spec.position, spec.rope_head_dim, weights.inside("indexer"))

    def __call__(
        self,
        x_BTD: mx.array,
        cache: LatentCache | RollingCache | None = None,
        *,
        first_value_BTMH: mx.array | None = None,
        first_B: mx.array | None = None,
        chosen_BTS: mx.array | None = None,
        documents: Documents | None = None,
    ) -> Attended:
        """With a cache, the tokens follow the cached ones; row b starts at slot `first_B`, after its left padding."""
        spec, dtype = self.spec, x_BTD.dtype
        position_T = positions(x_BTD.shape[1], 0 if cache is None else cache.length, first_B, documents)
        source, seen = self._query_sources(x_BTD)
        query, rope_query, latent, rope_key = self._projected(x_BTD, seen, position_T)
        index_query = index_key = index_weight = slot_S = None
        if spec.indexer is not None:
            index_query, index_key, index_weight = self.indexer(x_BTD, source, position_T)
        if cache is None:
            grouped = mx.concatenate([query, rope_query], axis=-1)[:, :, :, None]
            key = projection.einsum("BSZ,ZNH->BSNH", latent, self.w_key.astype(dtype))
            key = mx.concatenate([key, mx.repeat(rope_key, spec.num_heads, axis=2)], axis=-1)
            value = projection.einsum("BSZ,ZNH->BSNH", latent, self.w_value.astype(dtype))
        else:
            query = projection.einsum("BTNH,ZNH->BTNZ", query, self.w_key.astype(dtype))
            grouped = mx.concatenate([query, rope_query], axis=-1)[:, :, None]
            if isinstance(cache, RollingCache):  # latents are the values of one head, rotated keys its keys
                cache, (rope_key, value, slot_S) = cache.extend(rope_key, latent[:, :, None])
            else:
                cache = cache.extend(latent, rope_key[:, :, 0], index_key)
                rope_key, value = cache.key_BSH[:, :, None], cache.latent_BSZ[:, :, None]
                index_key = cache.index_key_BSH
            key = mx.concatenate([value, rope_key], axis=-1)
        scale, loss = score_scale(spec), None
        sink_N = self.sink.astype(mx.float32) if spec.sinks else None
        mask_TS = within_documents(self._mask(position_T, key.shape[1], slot_S, first_B, documents), documents)
        if spec.indexer is not None:
            assert index_query is not None
            assert index_key is not None
            assert index_weight is not None
            position_S, drawn = positions(key.shape[1], 0, first_B, documents), (index_query, index_key, index_weight)
            index_BTS, chosen_BTS = self.indexer.choose(drawn, position_T, position_S, mask_TS, documents)
            attended, distribution_BTS = attend_where(grouped, key, value, chosen_BTS, scale, sink_N)
            if cache is None:
                loss = self.indexer.loss(index_BTS, distribution_BTS, chosen_BTS, position_S, documents)
        elif chosen_BTS is not None:
            attended, _ = attend_where(grouped, key, value, chosen_BTS, scale, sink_N)
        elif cache is None:
            attended = attend_causally(expanded(spec), grouped, key, value, sink_N, documents)
        else:
            attended = attend(grouped, key, value, mask_TS, scale=scale, sink_N=sink_N)
        if cache is None:
            out_BTNH = attended[:, :, :, 0]
        else:
            out_BTNH = projection.einsum("BTNZ,ZNH->BTNH", attended[:, :, 0], self.w_value.astype(dtype))
        out_BTD = self._output(out_BTNH, x_BTD, seen)
        return Attended(out_BTD, cache, None, loss, None if spec.indexer is None else chosen_BTS)

    def _output(self, out_BTNH: mx.array, x_BTD: mx.array, seen_BTZ: mx.array) -> mx.array:
        """Spec: moezoo.core.reference.latent_attention._output."""
        spec, dtype = self.spec, x_BTD.dtype
        if spec.gate == "headwise":
            gate_BTN = projection.einsum("BTD,DN->BTN", x_BTD, self.w_gate.astype(dtype)).astype(mx.float32)
            out_BTNH = (out_BTNH * mx.sigmoid(gate_BTN)[..., None]).astype(dtype)
        if spec.gate == "elementwise":
            gate_BTNH = projection.einsum("BTD,DNH->BTNH", x_BTD, self.w_gate.astype(dtype))
            out_BTNH = (out_BTNH * mx.sigmoid(gate_BTNH.astype(mx.float32))).astype(dtype)
        if spec.query_gate:
            gate_BTNH = projection.einsum("BTZ,ZNH->BTNH", seen_BTZ, self.w_query_gate.astype(dtype))
            out_BTNH = (out_BTNH * mx.sigmoid(gate_BTNH.astype(mx.float32))).astype(dtype)
        out_BTD = projection.einsum("BTNH,NHD->BTD", out_BTNH, self.w_output.astype(dtype))
        if spec.bias:
            out_BTD = out_BTD + self.b_output.astype(dtype)
        return out_BTD

    def _mask(
        self,
        position_T: mx.array,
        slots: int,
        slot_S: mx.array | None,
        first_B: mx.array | None,
        documents: Documents | None,
    ) -> mx.array:
        """Return the mask of tokens at these positions over that many cache slots, of a rolling cache `slot_S`."""
        if slot_S is None:
            position_S = positions(slots, 0, first_B, documents)
        else:
            position_S = slot_S if first_B is None else slot_S - first_B[:, None]
        mask_TS = visible(expanded(self.spec), position_T, position_S)
        plain = first_B is None and slot_S is None
        return mask_TS if plain else mask_TS & same_side(position_T, position_S)

    def _query_sources(self, x_BTD: mx.array) -> tuple[mx.array, mx.array]:
        """Spec: moezoo.core.reference.latent_attention._query_sources."""
        spec, dtype = self.spec, x_BTD.dtype
        if spec.query_latent_dim is None:
            return x_BTD, x_BTD
        down = projection.einsum("BTD,DZ->BTZ", x_BTD, self.w_query_down.astype(dtype))
        down = down + self.b_query_down.astype(dtype) if spec.bias else down
        source = self.query_norm(down)
        return source, mx.concatenate([source, down], axis=-1) if spec.raw_query_latent else source

    def _projected(
        self, x_BTD: mx.array, seen_BTZ: mx.array, position_T: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Return both parts of queries, latents [B, T, Z], and the shared key [B, T, 1, H]."""
        spec, dtype = self.spec, x_BTD.dtype
        query = projection.einsum("BTZ,ZNH->BTNH", seen_BTZ, self.w_query.astype(dtype))
        query, rope_query = query[..., : spec.head_dim], query[..., spec.head_dim :]
        latent = projection.einsum("BTD,DZ->BTZ", x_BTD, self.w_latent.astype(dtype))
        latent = latent + self.b_latent.astype(dtype) if spec.bias else latent
        if spec.rope_head_dim:
            rope_key = projection.einsum("BTD,DH->BTH", x_BTD, self.w_rope_key.astype(dtype))
            rope_key = rope_key + self.b_rope_key.astype(dtype) if spec.bias else rope_key
        else:
            rope_key = mx.zeros((*x_BTD.shape[:2], 0), dtype)
        rope_key = self.rope_key_norm(rope_key) if spec.rope_key_norm else rope_key
        latent, rope_key = self.latent_norm(latent), rope_key[:, :, None]
        if spec.latent_multiplier != 1:
            latent = latent * spec.latent_multiplier
        match spec.position:
            case RoPESpec():
                rope_query = rotate(spec.position, rope_query, position_T)
                rope_key = rotate(spec.position, rope_key, position_T)
            case NoPositionSpec():
                pass
            case _:
                assert_never(spec.position)
        if spec.temperature_tuning is not None:
            temperature_T11 = temperature(spec.temperature_tuning, mx.maximum(position_T, 0))[..., None, None]
            query = (query * temperature_T11).astype(dtype)
            rope_query = (rope_query * temperature_T11).astype(dtype)
        return query, rope_query, latent, rope_key
