"""One layer. Spec: moezoo.core.reference.layer."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.random import ATTENTION_DROPOUT, FEED_FORWARD_DROPOUT, SHORTCUT_DROPOUT
from moezoo.core.spec import BlockFactorsSpec, LayerSpec, ModelSpec, NoAttentionSpec
from moezoo.jax_backend.adapter import keyed
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.choice import NO_CONTEXT, RoutingContext
from moezoo.jax_backend.convolution import ResidualConvolution
from moezoo.jax_backend.dispatch import Dispatch
from moezoo.jax_backend.feed_forward import FeedForward
from moezoo.jax_backend.head_router import HeadRouter
from moezoo.jax_backend.kv_cache import (
    Attended,
    Cache,
    Caches,
    NGramCache,
    NGramState,
    OutputsCache,
    Shared,
    SharedCache,
)
from moezoo.jax_backend.layer_inputs import LayerInput
from moezoo.jax_backend.mixer import mix, mixer
from moezoo.jax_backend.moe import Exchange, MoE
from moezoo.jax_backend.ngram_embeddings import NGramEmbeddings
from moezoo.jax_backend.normalization import NormGate, norm
from moezoo.jax_backend.positions import Documents, positions
from moezoo.jax_backend.random import fold_in, uniform
from moezoo.jax_backend.residual import Connection, Streams, residual
from moezoo.jax_backend.routing import Routing

Record = dict[str, jax.Array]
WrapBlock = Callable[[nnx.Module, str], Callable[..., Any]]
"""Transform a block (attention, MoE, feed-forward or layer input), by its canonical name, for one forward pass."""


class StepInputs(NamedTuple):
    """Spec: moezoo.core.reference.layer.StepInputs; with key/value caches, and how a mesh runs the layers."""

    tokens_BT: jax.Array
    given: Mapping[int, RoutingContext]
    caches: Caches | None
    record: Record | None
    key: jax.Array | None
    inference: bool
    documents: Documents | None
    exchange: Exchange | None
    wrap_block: WrapBlock | None

    def routing_context(self, index: int | jax.Array, state: "ResidualState", key: jax.Array | None) -> RoutingContext:
        """Spec: moezoo.core.reference.layer.StepInputs.routing_context."""
        # Where layers are scanned, `given` is of this one alone.
        own = self.given.get(index) if isinstance(index, int) else next(iter(self.given.values()), None)
        return replace(
            own or NO_CONTEXT,
            token_P=self.tokens_BT.reshape(-1),
            previous_PE=state.previous_PE,
            previous_PZ=state.previous_PZ,
            key=key,
            inference=self.inference,
            real_P=None if self.documents is None else self.documents.real_P,
        )


class ResidualState(NamedTuple):
    """Spec: moezoo.core.reference.layer.ResidualState."""

    streams: Streams
    shortcut_BTD: jax.Array | None = None
    first_value_BTMH: jax.Array | None = None
    previous_PE: jax.Array | None = None
    previous_PZ: jax.Array | None = None


class LayerOutput(NamedTuple):
    """Spec: moezoo.core.reference.layer.LayerOutput; with dispatch and extended cache."""

    routing: Routing | None
    dispatched: Dispatch | None
    cache: Cache | None
    index_loss: jax.Array | None
    source: Shared | None


class Layer(nnx.Module):
    """Spec: moezoo.core.reference.layer.layer."""

    def __init__(self, spec: LayerSpec, model: ModelSpec, weights: Weights, index: int):
        self.spec, self.name = spec, f"layers.{index}"
        self.embed_dim = model.embed_dim
        self._unnormalized = spec.norm_placement in ("post", "stream") or not model.has_norms
        self.dropout, self.residual_multiplier = model.dropout, model.multipliers.residual
        self.adapter = model.adapter
        if not isinstance(spec.attention, NoAttentionSpec):
            self.attention_residual = residual(model.residual, model.norm, weights.inside("attention_residual"))
            if model.has_norms:
                self.attention_norm = norm(model.norm, weights.inside("attention_norm"))
            self.attention = mixer(spec.attention, weights.inside("attention"), index)
        if spec.separate_inputs:
            self.attention_key_residual = residual(model.residual, model.norm, weights.inside("attention_key_residual"))
            self.attention_key_norm = norm(model.norm, weights.inside("attention_key_norm"))
            own = weights.inside("attention_value_residual")
            self.attention_value_residual = residual(model.residual, model.norm, own)
            self.attention_value_norm = norm(model.norm, weights.inside("attention_value_norm"))
        if not spec.mixer_only:
            self.feed_forward_residual = residual(model.residual, model.norm, weights.inside("feed_forward_residual"))
        if spec.ngram_embeddings is not None:
            self.ngram_embeddings = NGramEmbeddings(
                spec.ngram_embeddings, model.norm, model.vocab, weights.inside("ngram_embeddings")
            )
        if spec.norm_placement != "parallel" and not spec.mixer_only and model.has_norms:
            self.feed_forward_norm = norm(model.norm, weights.inside("feed_forward_norm"))
        if spec.attention_norm_gate is not None:
            self.attention_norm_gate = NormGate(weights.inside("attention_norm_gate"))
        if spec.feed_forward_norm_gate is not None:
            self.feed_forward_norm_gate = NormGate(weights.inside("feed_forward_norm_gate"))
        if spec.norm_placement == "sandwich" and spec.has_mixer:
            self.attention_output_norm = norm(model.norm, weights.inside("attention_output_norm"))
        if spec.norm_placement == "sandwich" and not spec.mixer_only:
            self.feed_forward_output_norm = norm(model.norm, weights.inside("feed_forward_output_norm"))
        if spec.feed_forward is not None:
            self.feed_forward = FeedForward(spec.feed_forward, weights.inside("feed_forward"))
        if spec.feed_forward_scale:
            self.feed_forward_scale = weights.parameter("feed_forward_scale")
        if spec.output_convolution is not None and spec.has_mixer:
            own = weights.inside("attention_convolution")
            self.attention_convolution = ResidualConvolution(spec.output_convolution, own)
        if spec.output_convolution is not None and not spec.mixer_only:
            own = weights.inside("feed_forward_convolution")
            self.feed_forward_convolution = ResidualConvolution(spec.output_convolution, own)
        self.moe: MoE | HeadRouter
        if spec.moe is not None:
            self.moe = MoE(spec.moe, weights.inside("moe"))
        if spec.head_router is not None:
            self.moe = HeadRouter(spec.head_router, weights.inside("moe"))
        if model.layer_inputs is not None:
            self.layer_input = LayerInput(model.layer_inputs, model.norm, weights.inside("layer_input"))
        if spec.output_scale:
            self.output_scale = weights.state("output_scale")

    def __call__(
        self,
        state: ResidualState,
        inputs: StepInputs,
        index: int | jax.Array,
        input_BTZ: jax.Array | None,
        sources: Mapping[int, Shared | None],
    ) -> tuple[ResidualState, LayerOutput]:
        """`index` may be traced where nothing is recorded, and nothing is cached."""
        name, record = f"layers.{index}", {} if inputs.record is None else inputs.record
        key = None if inputs.key is None else fold_in(inputs.key, index)
        connection: Connection
        streams, ngrams = self._with_ngrams(state.streams, inputs, key, index)
        before = self._output_state(inputs, index)
        routing = dispatched = of_feed_forward = None
        if self.spec.has_mixer:
            streams = self.attention_stream(streams)
            x_BTD, connection = self.attention_residual.read(streams, 2 * index)
            seen_BTD = self.attention_input(x_BTD)
            routing = self._route_heads(seen_BTD, state, inputs, key, index)
            attended = self._attend(seen_BTD, streams, state, inputs, key, index, sources, routing)
            record[f"{name}.attention"] = attended.out_BTD
            out, of_attention = self._convolved("attention", attended.out_BTD, before[0], inputs)
            out = self._added(self.attention_output(out), key, ATTENTION_DROPOUT)
            streams, out = _weighted(self.spec.attention_factors, streams, out)
            streams = self.attention_residual.write(streams, connection, out, 2 * index)
        else:
            of_attention, attended = None, self._attend(streams, streams, state, inputs, key, index, sources)
        if not self.spec.mixer_only:
            streams = self.feed_forward_stream(streams)
            x_BTD, connection = self.feed_forward_residual.read(streams, 2 * index + 1)
            seen_BTD = seen_BTD if self.spec.norm_placement == "parallel" else self.feed_forward_input(x_BTD)
        if self.spec.moe is not None:
            context = inputs.routing_context(index, state, key)
            out, routing, dispatched = self._block("moe", inputs, key)(
                seen_BTD, context, raw_BTD=x_BTD, exchange=inputs.exchange, record=record, name=f"{name}.moe"
            )
            record[f"{name}.moe"] = out
        shortcut_BTD = self._added(out, key, SHORTCUT_DROPOUT) if self.spec.shortcut else None
        if self.spec.feed_forward is not None:
            out = self._dense(seen_BTD, inputs, key)
            record[f"{name}.feed_forward"] = out
        if not self.spec.mixer_only:
            out, of_feed_forward = self._convolved("feed_forward", out, before[1], inputs)
            out = self._added(self.feed_forward_output(out), key, FEED_FORWARD_DROPOUT)
            streams, out = _weighted(self.spec.feed_forward_factors, streams, out)
            streams = self.feed_forward_residual.write(streams, connection, out, 2 * index + 1)
        streams = streams if state.shortcut_BTD is None else streams + state.shortcut_BTD
        if input_BTZ is not None:
            out = self._block("layer_input", inputs, key)(streams, input_BTZ)
            record[f"{name}.layer_input"] = out
            streams = streams + out
        streams = self.scaled(streams)
        record[name] = streams
        first_value_BTMH = attended.value_BTMH if state.first_value_BTMH is None else state.first_value_BTMH
        previous = (state.previous_PE, state.previous_PZ) if routing is None else (routing.logits_PE, routing.state_PZ)
        state = ResidualState(streams, shortcut_BTD, first_value_BTMH, *previous)
        cache = self._with_states(attended.cache, of_attention, of_feed_forward, ngrams)
        return state, LayerOutput(routing, dispatched, cache, attended.index_loss, attended.source)

    def _with_ngrams(
        self, streams: Streams, inputs: StepInputs, key: jax.Array | None, index: int | jax.Array
    ) -> tuple[Streams, NGramState | None]:
        """Add the layer's n-gram embeddings, if it has any; return the streams, and their extended state."""
        if self.spec.ngram_embeddings is None:
            return streams, None
        past, first_B = None, None
        cached: jax.Array | int = 0
        if inputs.caches is not None:
            cache, first_B, cached = inputs.caches.layers[index], inputs.caches.first_B, inputs.caches.places
            assert isinstance(cache, NGramCache)
            past = cache.ngrams
        x_BTJD = streams.reshape(*streams.shape[:2], -1, self.embed_dim)
        out, state = self._block("ngram_embeddings", inputs, key)(
            inputs.tokens_BT, x_BTJD, past, cached=cached, first_B=first_B, documents=inputs.documents
        )
        out = out.reshape(streams.shape)
        if inputs.record is not None:
            inputs.record[f"layers.{index}.ngram_embeddings"] = out
        return streams + out, state

    def _dense(self, x_BTD: jax.Array, inputs: StepInputs, key: jax.Array | None) -> jax.Array:
        """Dense feed-forward, times its learned scale if there is one."""
        out: jax.Array = self._block("feed_forward", inputs, key)(x_BTD)
        if not self.spec.feed_forward_scale:
            return out
        return (out * self.feed_forward_scale[...].astype(jnp.float32)).astype(out.dtype)

    def _with_states(
        self,
        cache: Cache | None,
        of_attention: jax.Array | None,
        of_feed_forward: jax.Array | None,
        ngrams: NGramState | None,
    ) -> Cache | None:
        """Return the mixer's cache with what else the layer keeps."""
        if self.spec.output_convolution is not None and cache is not None:
            cache = OutputsCache(cache, of_attention, of_feed_forward)
        return cache if cache is None or ngrams is None else NGramCache(cache, ngrams)

    def _output_state(self, inputs: StepInputs, index: int | jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        """Return the last inputs of the short convolutions of what the two blocks return, where there are any."""
        if inputs.caches is None or self.spec.output_convolution is None:
            return None, None
        cache = inputs.caches.layers[index]
        cache = cache.mixer if isinstance(cache, NGramCache) else cache
        assert isinstance(cache, OutputsCache)
        return cache.attention_BSD, cache.feed_forward_BSD

    def _convolved(
        self, block: str, out_BTD: jax.Array, before_BSD: jax.Array | None, inputs: StepInputs
    ) -> tuple[jax.Array, jax.Array | None]:
        """Short convolution of a block's output, if there is one, and its last inputs."""
        if self.spec.output_convolution is None:
            return out_BTD, None
        convolution = self._block(f"{block}_convolution", inputs, None)
        real_BT = None
        if inputs.caches is not None and inputs.caches.first_B is not None:
            real_BT = positions(out_BTD.shape[1], inputs.caches.places, inputs.caches.first_B) >= 0
        convolved: tuple[jax.Array, jax.Array]
        convolved = convolution(out_BTD, before=before_BSD, real_BT=real_BT, documents=inputs.documents)
        return convolved

    def _route_heads(
        self, x_BTD: jax.Array, state: ResidualState, inputs: StepInputs, key: jax.Array | None, index: int | jax.Array
    ) -> Routing | None:
        if self.spec.head_router is None:
            return None
        context, name = inputs.routing_context(index, state, key), f"layers.{index}.moe"
        routing: Routing = self._block("moe", inputs, key)(x_BTD, context, record=inputs.record, name=name)
        return routing

    def _attend(
        self,
        x_BTD: jax.Array,
        streams: Streams,
        state: ResidualState,
        inputs: StepInputs,
        key: jax.Array | None,
        index: int | jax.Array,
        sources: Mapping[int, Shared | None],
        routing: Routing | None = None,
    ) -> Attended:
        cache, first_B = None, None
        if inputs.caches is not None:
            cache, first_B = inputs.caches.layers[index], inputs.caches.first_B
            cache = cache.mixer if isinstance(cache, NGramCache) else cache
            cache = cache.mixer if isinstance(cache, OutputsCache) else cache
        spec = self.spec.attention
        if isinstance(spec, NoAttentionSpec):
            assert isinstance(cache, SharedCache | None)
            return Attended(x_BTD, None if cache is None else cache.extend(x_BTD.shape[1]), None, None)
        return mix(
            spec,
            self._block("attention", inputs, key),
            x_BTD,
            cache,
            first_value_BTMH=state.first_value_BTMH,
            first_B=first_B,
            sources=sources,
            documents=inputs.documents,
            routing=routing,
            key_value_BTD=self._key_and_value_inputs(streams, index),
        )

    def _key_and_value_inputs(self, streams: Streams, index: int | jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """Spec: moezoo.core.reference.layer._key_and_value_inputs."""
        if not self.spec.separate_inputs:
            return None
        key_BTD, _ = self.attention_key_residual.read(streams, 2 * index)
        value_BTD, _ = self.attention_value_residual.read(streams, 2 * index)
        return self.attention_key_norm(key_BTD), self.attention_value_norm(value_BTD)

    def _block(self, name: str, inputs: StepInputs, key: jax.Array | None) -> Callable[..., Any]:
        """One of the layer's blocks, with keys for its adapters, transformed for this forward pass."""
        block = keyed(self.adapter, getattr(self, name), name, key)
        return block if inputs.wrap_block is None else inputs.wrap_block(block, f"{self.name}.{name}")

    def attention_stream(self, streams: Streams) -> Streams:
        """The stream, normalized where the norm is one of the stream itself."""
        return self.attention_norm(streams) if self.spec.norm_placement == "stream" else streams

    def attention_input(self, x_BTD: jax.Array) -> jax.Array:
        """Norm before attention, unless it is one of the stream or after it; with its gate if there is one."""
        normed = x_BTD if self._unnormalized else self.attention_norm(x_BTD)
        return normed if self.spec.attention_norm_gate is None else self.attention_norm_gate(normed)

    def attention_output(self, out_BTD: jax.Array) -> jax.Array:
        """Post-attention norm, where there is one."""
        match self.spec.norm_placement:
            case "pre" | "parallel" | "stream":
                return out_BTD
            case "post":
                return self.attention_norm(out_BTD)
            case "sandwich":
                return self.attention_output_norm(out_BTD)
            case _:
                assert_never(self.spec.norm_placement)

    def feed_forward_stream(self, streams: Streams) -> Streams:
        """As `attention_stream`."""
        return self.feed_forward_norm(streams) if self.spec.norm_placement == "stream" else streams

    def feed_forward_input(self, x_BTD: jax.Array) -> jax.Array:
        """As `attention_input`; not of a parallel layer, whose feed-forward has the input of attention."""
        normed = x_BTD if self._unnormalized else self.feed_forward_norm(x_BTD)
        return normed if self.spec.feed_forward_norm_gate is None else self.feed_forward_norm_gate(normed)

    def feed_forward_output(self, out_BTD: jax.Array) -> jax.Array:
        """Post-feed-forward norm, where there is one."""
        match self.spec.norm_placement:
            case "pre" | "parallel" | "stream":
                return out_BTD
            case "post":
                return self.feed_forward_norm(out_BTD)
            case "sandwich":
                return self.feed_forward_output_norm(out_BTD)
            case _:
                assert_never(self.spec.norm_placement)

    def scaled(self, streams: Streams) -> Streams:
        """Multiply the residual stream by the layer's output scale."""
        if not self.spec.output_scale:
            return streams
        return (streams.astype(jnp.float32) * self.output_scale[...].astype(jnp.float32)).astype(streams.dtype)

    def _added(self, out_BTD: jax.Array, key: jax.Array | None, purpose: int) -> jax.Array:
        """Apply dropout and the residual multiplier to what is added to the residual stream."""
        out_BTD = dropout(out_BTD, self.dropout, None if key is None else fold_in(key, purpose))
        return out_BTD if self.residual_multiplier == 1 else out_BTD * self.residual_multiplier


def _weighted(factors: BlockFactorsSpec, streams: Streams, out_BTD: jax.Array) -> tuple[Streams, jax.Array]:
    """Multiply the stream and what is added to it by their factors."""
    streams = streams if factors.stream == 1 else streams * factors.stream
    return streams, out_BTD if factors.block == 1 else out_BTD * factors.block


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Spec: moezoo.core.reference.layer.dropout."""
    if rate == 0 or key is None:
        return x
    return jnp.where(uniform(key, x.shape) >= rate, x / (1 - rate), 0).astype(x.dtype)
