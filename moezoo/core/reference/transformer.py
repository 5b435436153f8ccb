"""The whole model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, assert_never

import autograd.numpy as np

from moezoo.core.random import ATTENTION_DROPOUT, FEED_FORWARD_DROPOUT, SHORTCUT_DROPOUT, fold_in, uniform
from moezoo.core.reference import Array, Parameters, Record, adapter, inside
from moezoo.core.reference.choice import NO_CONTEXT, RoutingContext, given_routing
from moezoo.core.reference.feed_forward import feed_forward
from moezoo.core.reference.layer_inputs import layer_input, layer_inputs
from moezoo.core.reference.mixer import mix
from moezoo.core.reference.moe import moe
from moezoo.core.reference.normalization import normalize
from moezoo.core.reference.positions import Documents, embedding_positions, packed_documents
from moezoo.core.reference.routing import Routing
from moezoo.core.spec import (
    LatentAttentionSpec,
    LayerSpec,
    ModelSpec,
    TiedHeadSpec,
    UntiedHeadSpec,
)
from moezoo.core.tokens import ExpertMasks


class Forward(NamedTuple):
    """Output of a forward pass.

    Fields:
        logits_BTV: of the next token at every position.
        routings: one for each MoE layer.
        index_losses: for each layer with an indexer its index, the loss's coefficient and its value.
    """

    logits_BTV: Array
    routings: list[Routing]
    index_losses: list[tuple[int, float, Array]]


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

    def routing_context(self, index: int, previous_PE: Array | None, key: Array | None) -> RoutingContext:
        """Return the context of the MoE layer `index`, from the layer's key and the logits of the one before."""
        return replace(
            self.given.get(index, NO_CONTEXT),
            token_P=self.tokens_BT.reshape(-1),
            previous_PE=previous_PE,
            key=key,
            inference=self.inference,
            real_P=None if self.documents is None else self.documents.real_P,
        )


class ResidualState(NamedTuple):
    """State that a layer passes to the next one.

    Fields:
        x_BTD: the residual stream.
        shortcut_BTD: output of an MoE that is added at the end of the next layer, or None.
        first_value_BTMH: values of the first layer's attention, for value residuals.
        previous_PE: logits of the previous MoE layer's router, for gating residuals.
    """

    x_BTD: Array
    shortcut_BTD: Array | None = None
    first_value_BTMH: Array | None = None
    previous_PE: Array | None = None


class LayerOutput(NamedTuple):
    """Output of a layer beside its state: routing of its MoE, loss of its indexer, and its keys and values."""

    routing: Routing | None
    index_loss: Array | None
    source: tuple[Array, Array] | None


def forward(
    spec: ModelSpec,
    parameters: Parameters,
    tokens_BT: Array,
    *,
    forced: Sequence[Array] | None = None,
    masks: Sequence[ExpertMasks] | None = None,
    record: Record | None = None,
    key: Array | None = None,
    inference: bool = False,
    document_BT: Array | None = None,
) -> Forward:
    """Return the logits of the next token at every position, and the Routing of every MoE layer.

    The token embedding, then each `layer`, then the final norm and the output projection.

    Args:
        spec: the model.
        parameters: canonical name -> float64 array.
        tokens_BT: int, 0 <= token < V.
        forced: one int [P, K] for each MoE layer: experts to use instead of the routers' own choice, as in
            `RoutingContext`.
        masks: for each MoE layer, experts [B, E] that are silenced or excluded in each sequence (`RoutingContext`).
        record: filled with named intermediates, in the order in which they are computed.
        key: uint32 [2], the key of a training step; None: no noise, no dropout.
        inference: route as generation does: causal, and no token dropped.
        document_BT: int, ids of the documents that sequences are packed with: ascending along each, then PADDING. A
            document is computed as if it were alone, except where its tokens compete with others of the batch: for
            places in an expert (capacity, expert choice). Padding is not routed. None: a sequence is one document.

    Source: Radford et al. 2019 (pre-norm decoder); Touvron et al. 2023, arXiv 2302.13971 (RMSNorm, RoPE, SwiGLU).
    """
    record = {} if record is None else record
    given = given_routing(spec.moe_layers, forced, masks, tokens_BT.shape[1])
    documents = packed_documents(document_BT)
    inputs = StepInputs(tokens_BT, given, record, key, inference, documents)
    parameters = adapter.adapted(spec, parameters, key)
    x_BTD = record["embedding"] = _embedded(spec, parameters, tokens_BT, documents)
    if spec.layer_inputs is not None:
        inputs_BTLZ = layer_inputs(spec.layer_inputs, spec.norm, inside(parameters, "layer_inputs"), tokens_BT, x_BTD)
    state, outputs = ResidualState(x_BTD), []
    sources: dict[int, tuple[Array, Array] | None] = {}
    for index in range(len(spec.all_layers)):
        input_BTZ = None if spec.layer_inputs is None else inputs_BTLZ[:, :, index]
        state, output = layer(
            spec, index, inside(parameters, f"layers.{index}"), state, inputs, input_BTZ=input_BTZ, sources=sources
        )
        sources[index] = output.source
        outputs.append(output)
    x_BTD = record["final_norm"] = normalize(spec.norm, inside(parameters, "final_norm"), state.x_BTD)
    logits_BTV = record["logits"] = _logits(spec, parameters, x_BTD)
    return Forward(
        logits_BTV,
        [output.routing for output in outputs if output.routing is not None],
        [
            (index, own.attention.indexer.loss_coefficient, output.index_loss)
            for index, (own, output) in enumerate(zip(spec.all_layers, outputs, strict=True))
            if isinstance(own.attention, LatentAttentionSpec) and own.attention.indexer is not None
        ],
    )


def layer(
    model: ModelSpec,
    index: int,
    parameters: Parameters,
    state: ResidualState,
    inputs: StepInputs,
    *,
    input_BTZ: Array | None = None,
    sources: Mapping[int, tuple[Array, Array] | None],
) -> tuple[ResidualState, LayerOutput]:
    """Compute one layer: two blocks, attention and a feed-forward, dense or a MoE.

    A block f is added to the residual stream x as the layer's `norm_placement` says: `pre` x + f(norm(x)); `post`
    x + norm(f(x)); `sandwich` x + norm(f(norm(x))); `parallel`: both blocks see norm(x) of the layer's input. What is
    added is dropped out and multiplied by `multipliers.residual`. A layer with a `shortcut` has a feed-forward and a
    MoE, which both see norm(x) after attention; the MoE's output is added at the end of the next layer. Then comes the
    layer's own input, if the model has `layer_inputs`, and last, the stream is multiplied by the layer's
    `output_scale`, if it has one.

    Args:
        parameters: the layer's own.
        input_BTZ: the layer's own input, if the model has `layer_inputs`.
        sources: keys and values of the layers before, by index.

    Source: LayerSpec and ModelSpec name those of the options.
    """
    spec, name, record = model.all_layers[index], f"layers.{index}", inputs.record
    key = None if inputs.key is None else fold_in(inputs.key, index)
    x_BTD = state.x_BTD
    seen_BTD = _norm_before(model, spec, parameters, "attention", x_BTD)
    own = inside(parameters, "attention")
    attended = mix(spec.attention, own, seen_BTD, state.first_value_BTMH, sources, inputs.documents)
    record[f"{name}.attention"] = attended.out_BTD
    out = _norm_after(model, spec, parameters, "attention", attended.out_BTD)
    x_BTD = x_BTD + _added(model, out, key, ATTENTION_DROPOUT)
    if spec.norm_placement != "parallel":
        seen_BTD = _norm_before(model, spec, parameters, "feed_forward", x_BTD)
    routing = None
    if spec.moe is not None:
        context, own = inputs.routing_context(index, state.previous_PE, key), inside(parameters, "moe")
        out, routing = moe(spec.moe, own, seen_BTD, context, raw_BTD=x_BTD, record=record, name=f"{name}.moe")
        record[f"{name}.moe"] = out
    shortcut_BTD = _added(model, out, key, SHORTCUT_DROPOUT) if spec.shortcut else None
    if spec.feed_forward is not None:
        out = feed_forward(spec.feed_forward, inside(parameters, "feed_forward"), seen_BTD)
        record[f"{name}.feed_forward"] = out
    out = _norm_after(model, spec, parameters, "feed_forward", out)
    x_BTD = x_BTD + _added(model, out, key, FEED_FORWARD_DROPOUT)
    x_BTD = x_BTD if state.shortcut_BTD is None else x_BTD + state.shortcut_BTD
    if model.layer_inputs is not None:
        out = layer_input(model.layer_inputs, model.norm, inside(parameters, "layer_input"), x_BTD, input_BTZ)
        record[f"{name}.layer_input"] = out
        x_BTD = x_BTD + out
    x_BTD = record[name] = x_BTD * parameters["output_scale"] if spec.output_scale else x_BTD
    first_value_BTMH = attended.value_BTMH if index == 0 else state.first_value_BTMH
    previous_PE = state.previous_PE if routing is None else routing.logits_PE
    state = ResidualState(x_BTD, shortcut_BTD, first_value_BTMH, previous_PE)
    return state, LayerOutput(routing, attended.index_loss, attended.source)


def _norm_before(model: ModelSpec, spec: LayerSpec, parameters: Parameters, block: str, x_BTD: Array) -> Array:
    """Norm of a block's input, unless the norm comes after the block."""
    if spec.norm_placement == "post":
        return x_BTD
    return normalize(model.norm, inside(parameters, f"{block}_norm"), x_BTD)


def _norm_after(model: ModelSpec, spec: LayerSpec, parameters: Parameters, block: str, out_BTD: Array) -> Array:
    """Norm of a block's output, where there is one."""
    match spec.norm_placement:
        case "pre" | "parallel":
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


def _embedded(spec: ModelSpec, parameters: Parameters, tokens_BT: Array, documents: Documents | None) -> Array:
    x_BTD = adapter.take(parameters["embedding.weight"], tokens_BT) * spec.multipliers.embedding
    if spec.position is not None:
        position_T = np.arange(tokens_BT.shape[1]) if documents is None else documents.position_BT
        x_BTD = x_BTD + embedding_positions(spec.position, spec.embed_dim, inside(parameters, "position"), position_T)
    return x_BTD


def _logits(spec: ModelSpec, parameters: Parameters, x_BTD: Array) -> Array:
    match spec.head:
        case TiedHeadSpec():
            logits_BTV = adapter.einsum("BTD,VD->BTV", x_BTD, parameters["embedding.weight"])
        case UntiedHeadSpec():
            logits_BTV = adapter.einsum("BTD,DV->BTV", x_BTD, parameters["head.w_head"])
    logits_BTV = logits_BTV + parameters["head.b_head"] if spec.head.bias else logits_BTV
    logits_BTV = spec.multipliers.logits * logits_BTV
    return logits_BTV if spec.softcap is None else spec.softcap * np.tanh(logits_BTV / spec.softcap)
