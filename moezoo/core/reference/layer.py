"""One layer: its two blocks around the residual stream."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple, assert_never

import autograd.numpy as np

from moezoo.core.random import ATTENTION_DROPOUT, FEED_FORWARD_DROPOUT, SHORTCUT_DROPOUT, fold_in, uniform
from moezoo.core.reference import Array, Parameters, Record, inside
from moezoo.core.reference.attention import Attended, Source
from moezoo.core.reference.choice import NO_CONTEXT, RoutingContext
from moezoo.core.reference.convolution import residual_convolution
from moezoo.core.reference.feed_forward import feed_forward
from moezoo.core.reference.head_router import route_heads
from moezoo.core.reference.layer_inputs import layer_input
from moezoo.core.reference.mixer import mix
from moezoo.core.reference.moe import moe
from moezoo.core.reference.ngram_embeddings import ngram_embeddings
from moezoo.core.reference.normalization import norm_gate, normalize
from moezoo.core.reference.positions import Documents
from moezoo.core.reference.residual import Streams, read, write
from moezoo.core.reference.routing import Routing
from moezoo.core.spec import LayerSpec, ModelSpec, NoAttentionSpec


class StepInputs(NamedTuple):
    """Inputs of a forward pass that all layers share.

    Fields:
        tokens_BT: int, 0 <= token < V.
        given: what a caller decides about routing, by index of the MoE layer; empty where that is nothing.
        record: filled with named intermediates.
        key: uint32 [2] of a training step, or None.
        inference: route as generation does.
        documents: those of packed sequences, or None.
    """

    tokens_BT: Array
    given: Mapping[int, RoutingContext]
    record: Record
    key: Array | None
    inference: bool
    documents: Documents | None

    def routing_context(self, index: int, state: "ResidualState", key: Array | None) -> RoutingContext:
        """Return the context of the MoE layer `index`, from the layer's key and what the router before left."""
        return replace(
            self.given.get(index, NO_CONTEXT),
            token_P=self.tokens_BT.reshape(-1),
            previous_PE=state.previous_PE,
            previous_PZ=state.previous_PZ,
            key=key,
            inference=self.inference,
            real_P=None if self.documents is None else self.documents.real_P,
        )


class ResidualState(NamedTuple):
    """State that a layer passes to the next one.

    Fields:
        streams: the residual stream, or several (`enter`).
        shortcut_BTD: output of an MoE that is added at the end of the next layer, or None.
        first_value_BTMH: values of the first layer's attention, for value residuals.
        previous_PE: logits of the previous MoE layer's router, for gating residuals.
        previous_PZ: state of the MLP of that router, for depth averages; None without one.
    """

    streams: Streams
    shortcut_BTD: Array | None = None
    first_value_BTMH: Array | None = None
    previous_PE: Array | None = None
    previous_PZ: Array | None = None


class LayerOutput(NamedTuple):
    """Output of a layer beside its state: routing of its MoE, loss of its indexer, and what others may share."""

    routing: Routing | None
    index_loss: Array | None
    source: Source | None


def layer(
    model: ModelSpec,
    index: int,
    parameters: Parameters,
    state: ResidualState,
    inputs: StepInputs,
    *,
    input_BTZ: Array | None = None,
    sources: Mapping[int, Source | None],
) -> tuple[ResidualState, LayerOutput]:
    """Compute one layer: two blocks, a mixer and a feed-forward (dense or a MoE), or one of the two.

    A block f is added to the x that it reads from the residual stream as `norm_placement` says: `pre` x + f(norm(x));
    `post` x + norm(f(x)); `sandwich` x + norm(f(norm(x))); `parallel`: both blocks see norm(x) of the layer's input;
    `stream`: n + f(n) with n = norm(x). Factors multiply both terms. f is dropped out and multiplied by
    `multipliers.residual`; `residual` says what reading and adding are. A layer with a `shortcut` has a feed-forward
    and a MoE, with one input; the MoE's output is added at the end of the next layer. `ngram_embeddings` are added
    first, the layer's own input at the end; last comes `output_scale`.

    Args:
        parameters: the layer's own.
        input_BTZ: the layer's own input, if the model has `layer_inputs`.
        sources: what the layers before share, by index.
    """
    spec, name, record = model.all_layers[index], f"layers.{index}", inputs.record
    key, attended = None if inputs.key is None else fold_in(inputs.key, index), Attended(None, None, None)
    context, own_moe = inputs.routing_context(index, state, key), inside(parameters, "moe")
    streams, routing = _with_ngrams(model, index, parameters, state.streams, inputs), None
    if not isinstance(spec.attention, NoAttentionSpec):
        x_BTD, add = _read(model, index, parameters, "attention", streams, key)
        seen_BTD, own = _norm_before(model, spec, parameters, "attention", x_BTD), inside(parameters, "attention")
        if spec.head_router is not None:
            routing = route_heads(spec.head_router, own_moe, seen_BTD, context, record, f"{name}.moe")
        others = _key_and_value_inputs(model, index, parameters, streams)
        given = (state.first_value_BTMH, sources, inputs.documents, routing, others)
        attended = mix(spec.attention, own, seen_BTD, *given)
        record[f"{name}.attention"] = attended.out_BTD
        streams = add(_convolved(spec, parameters, "attention", attended.out_BTD, inputs))
    if not spec.mixer_only:
        x_BTD, add = _read(model, index, parameters, "feed_forward", streams, key)
        if spec.norm_placement != "parallel":
            seen_BTD = _norm_before(model, spec, parameters, "feed_forward", x_BTD)
    if spec.moe is not None:
        out, routing = moe(spec.moe, own_moe, seen_BTD, context, raw_BTD=x_BTD, record=record, name=f"{name}.moe")
        record[f"{name}.moe"] = out
    shortcut_BTD = _added(model, out, key, SHORTCUT_DROPOUT) if spec.shortcut else None
    if spec.feed_forward is not None:
        own, scale = inside(parameters, "feed_forward"), parameters.get("feed_forward_scale", 1.0)
        out = record[f"{name}.feed_forward"] = scale * feed_forward(spec.feed_forward, own, seen_BTD)
    streams = streams if spec.mixer_only else add(_convolved(spec, parameters, "feed_forward", out, inputs))
    streams = streams if state.shortcut_BTD is None else streams + state.shortcut_BTD
    if model.layer_inputs is not None:
        own = inside(parameters, "layer_input")
        out = record[f"{name}.layer_input"] = layer_input(model.layer_inputs, model.norm, own, streams, input_BTZ)
        streams = streams + out
    streams = record[name] = streams * parameters["output_scale"] if spec.output_scale else streams
    first_value_BTMH = attended.value_BTMH if index == 0 else state.first_value_BTMH
    previous = (state.previous_PE, state.previous_PZ) if routing is None else (routing.logits_PE, routing.state_PZ)
    state = ResidualState(streams, shortcut_BTD, first_value_BTMH, *previous)
    return state, LayerOutput(routing, attended.index_loss, attended.source)


def _with_ngrams(model: ModelSpec, index: int, parameters: Parameters, streams: Streams, inputs: StepInputs) -> Streams:
    """Add the layer's n-gram embeddings, if it has any, to the residual streams."""
    spec, own = model.all_layers[index].ngram_embeddings, inside(parameters, "ngram_embeddings")
    if spec is None:
        return streams
    x_BTJD = streams.reshape(*streams.shape[:2], -1, model.embed_dim)
    out_BTJD = ngram_embeddings(spec, model.norm, model.vocab, own, inputs.tokens_BT, x_BTJD, inputs.documents)
    out = inputs.record[f"layers.{index}.ngram_embeddings"] = out_BTJD.reshape(streams.shape)
    return streams + out


def _read(
    model: ModelSpec, index: int, parameters: Parameters, block: str, streams: Streams, key: Array | None
) -> tuple[Array, Callable[[Array], Streams]]:
    """Return what a block of layer `index` reads from the streams, and the function that adds its output to them."""
    spec, own = model.all_layers[index], inside(parameters, f"{block}_residual")
    number = 2 * index + (block == "feed_forward")
    factors = spec.attention_factors if block == "attention" else spec.feed_forward_factors
    if spec.norm_placement == "stream":
        streams = normalize(model.norm, inside(parameters, f"{block}_norm"), streams)
    x_BTD, connection = read(model.residual, model.norm, own, streams, number)
    purpose = ATTENTION_DROPOUT if block == "attention" else FEED_FORWARD_DROPOUT

    def add(out_BTD: Array) -> Streams:
        added_BTD = factors.block * _added(model, _norm_after(model, spec, parameters, block, out_BTD), key, purpose)
        return write(model.residual, own, factors.stream * streams, connection, added_BTD, number)

    return x_BTD, add


def _key_and_value_inputs(
    model: ModelSpec, index: int, parameters: Parameters, streams: Streams
) -> tuple[Array, Array] | None:
    """Return what keys and what values are projected from, where they read the streams by themselves."""
    if not model.all_layers[index].separate_inputs:
        return None
    key, value = (
        normalize(
            model.norm,
            inside(parameters, f"attention_{which}_norm"),
            read(model.residual, model.norm, inside(parameters, f"attention_{which}_residual"), streams, 2 * index)[0],
        )
        for which in ("key", "value")
    )
    return key, value


def _norm_before(model: ModelSpec, spec: LayerSpec, parameters: Parameters, block: str, x_BTD: Array) -> Array:
    """Norm of a block's input, unless it is one of the stream or after the block; with its gate if there is one."""
    normed = x_BTD
    if model.has_norms and spec.norm_placement not in ("post", "stream"):
        normed = normalize(model.norm, inside(parameters, f"{block}_norm"), x_BTD)
    rank = spec.attention_norm_gate if block == "attention" else spec.feed_forward_norm_gate
    return normed if rank is None else norm_gate(inside(parameters, f"{block}_norm_gate"), normed)


def _convolved(spec: LayerSpec, parameters: Parameters, block: str, out_BTD: Array, inputs: StepInputs) -> Array:
    """Short convolution of a block's output, if there is one."""
    if spec.output_convolution is None:
        return out_BTD
    own = inside(parameters, f"{block}_convolution")
    return residual_convolution(spec.output_convolution, own, out_BTD, documents=inputs.documents)


def _norm_after(model: ModelSpec, spec: LayerSpec, parameters: Parameters, block: str, out_BTD: Array) -> Array:
    """Norm of a block's output, where there is one."""
    match spec.norm_placement:
        case "pre" | "parallel" | "stream":
            return out_BTD
        case "post":
            return normalize(model.norm, inside(parameters, f"{block}_norm"), out_BTD)
        case "sandwich":
            return normalize(model.norm, inside(parameters, f"{block}_output_norm"), out_BTD)
        case _:
            assert_never(spec.norm_placement)


def _added(model: ModelSpec, out_BTD: Array, key: Array | None, purpose: int) -> Array:
    """Apply dropout and the residual multiplier to what is added to the residual stream."""
    purpose_key = None if key is None else fold_in(key, purpose)
    return model.multipliers.residual * dropout(out_BTD, model.dropout, purpose_key)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Set each element to zero with probability `rate` and divide the others by `1 - rate`; without a key, x.

    An element is kept where its uniform number is at least `rate`. Source: Srivastava et al. 2014, JMLR 15(56).
    """
    if rate == 0 or key is None:
        return x
    return np.where(uniform(key, x.shape) >= np.float32(rate), x / (1 - rate), 0.0)
