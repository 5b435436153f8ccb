"""The whole model."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import autograd.numpy as np

from moezoo.core.random import ATTENTION_DROPOUT, FEED_FORWARD_DROPOUT, SHORTCUT_DROPOUT, fold_in, uniform
from moezoo.core.reference import Array, Parameters, Record, inside
from moezoo.core.reference.attention import Attended, grouped_query_attention
from moezoo.core.reference.choice import RoutingContext
from moezoo.core.reference.delta_attention import gated_delta_attention
from moezoo.core.reference.feed_forward import feed_forward
from moezoo.core.reference.latent_attention import latent_attention
from moezoo.core.reference.layer_inputs import layer_input, layer_inputs
from moezoo.core.reference.moe import moe
from moezoo.core.reference.normalization import normalize
from moezoo.core.reference.positions import embedding_positions
from moezoo.core.reference.routing import Routing
from moezoo.core.reference.short_convolution import short_convolution
from moezoo.core.spec import (
    AttentionSpec,
    GatedDeltaAttentionSpec,
    GroupedQueryAttentionSpec,
    LatentAttentionSpec,
    ModelSpec,
    ShortConvolutionSpec,
    TiedHeadSpec,
    UntiedHeadSpec,
)


class Forward(NamedTuple):
    """What a forward pass gives.

    Fields:
        logits_BTV: of the next token at every position.
        routings: one for each MoE layer.
        index_losses: for each layer with an indexer its index, the loss's coefficient and its value.
    """

    logits_BTV: Array
    routings: list[Routing]
    index_losses: list[tuple[int, float, Array]]


def forward(
    spec: ModelSpec,
    parameters: Parameters,
    tokens_BT: Array,
    *,
    forced: Sequence[Array] | None = None,
    record: Record | None = None,
    key: Array | None = None,
    inference: bool = False,
) -> Forward:
    """Logits of the next token at every position, and the Routing of every MoE layer.

    A layer is two blocks, attention and a feed-forward, dense or a MoE. A block f is added to the residual stream x as
    its layer's `arrangement` says: `pre` x + f(norm(x)); `post` x + norm(f(x)); `sandwich` x + norm(f(norm(x)));
    `parallel`: both blocks see norm(x) of the layer's input. What is added is dropped out and multiplied by
    `multipliers.residual`. A layer with a `shortcut` has a feed-forward and a MoE, which both see norm(x) behind the
    attention; the MoE's output is added at the end of the next layer. Then comes the layer's own input, if the model
    has `layer_inputs`, and last, the stream is multiplied by the layer's `output_scale`, if it has one.

    Args:
        spec: the model.
        parameters: canonical name -> float64 array.
        tokens_BT: int, 0 <= token < V.
        forced: one int [P, K] for each MoE layer: experts to use instead of the routers' own choice, -1 for an unused
            slot.
        record: filled with named intermediates, in the order in which they are computed.
        key: uint32 [2], the key of a training step; None: no noise, no dropout.
        inference: route as generation does: causal, and every token served.

    Source: Radford et al. 2019 (pre-norm decoder); Touvron et al. 2023, arXiv 2302.13971 (RMSNorm, RoPE, SwiGLU); the
    sources of the options stand in the spec (LayerSpec, ModelSpec).
    """
    record = {} if record is None else record
    routings: list[Routing] = []
    index_losses: list[tuple[int, float, Array]] = []
    first_value_BTMH = None
    shortcut_BTD: Array | None = None
    sources: dict[int, tuple[Array, Array] | None] = {}
    x_BTD = _embedded(spec, parameters, tokens_BT)
    record["embedding"] = x_BTD
    if spec.layer_inputs is not None:
        inputs_BTLZ = layer_inputs(spec.layer_inputs, spec.norm, inside(parameters, "layer_inputs"), tokens_BT, x_BTD)

    def normed(name: str, x: Array) -> Array:
        return normalize(spec.norm, inside(parameters, name), x)

    def added(out_BTD: Array, layer_key: Array | None, purpose: int) -> Array:
        purpose_key = None if layer_key is None else fold_in(layer_key, purpose)
        return spec.multipliers.residual * dropout(out_BTD, spec.dropout, purpose_key)

    for index, layer in enumerate(spec.all_layers):
        name, arrangement = f"layers.{index}", layer.arrangement
        layer_key = None if key is None else fold_in(key, index)
        seen_BTD = x_BTD if arrangement == "post" else normed(f"{name}.attention_norm", x_BTD)
        attended = _attended(
            layer.attention, inside(parameters, f"{name}.attention"), seen_BTD, first_value_BTMH, sources
        )
        sources[index] = attended.source
        out = attended.out_BTD
        record[f"{name}.attention"] = out
        if index == 0:
            first_value_BTMH = attended.value_BTMH
        if isinstance(layer.attention, LatentAttentionSpec) and layer.attention.indexer is not None:
            index_losses.append((index, layer.attention.indexer.loss_coefficient, attended.index_loss))
        if arrangement in ("post", "sandwich"):
            out = normed(f"{name}.attention_norm" if arrangement == "post" else f"{name}.attention_output_norm", out)
        x_BTD = x_BTD + added(out, layer_key, ATTENTION_DROPOUT)
        if arrangement != "parallel":
            seen_BTD = x_BTD if arrangement == "post" else normed(f"{name}.feed_forward_norm", x_BTD)
        if layer.moe is not None:
            out, routing = moe(
                layer.moe,
                inside(parameters, f"{name}.moe"),
                seen_BTD,
                RoutingContext(
                    tokens_BT.reshape(-1),
                    routings[-1].logits_PE if routings else None,
                    None if forced is None else forced[len(routings)],
                    layer_key,
                    inference,
                ),
                raw_BTD=x_BTD,
                record=record,
                name=f"{name}.moe",
            )
            routings.append(routing)
            record[f"{name}.moe"] = out
        joining_BTD, shortcut_BTD = shortcut_BTD, None
        if layer.shortcut:
            shortcut_BTD = added(out, layer_key, SHORTCUT_DROPOUT)
        if layer.feed_forward is not None:
            out = feed_forward(layer.feed_forward, inside(parameters, f"{name}.feed_forward"), seen_BTD)
            record[f"{name}.feed_forward"] = out
        if arrangement in ("post", "sandwich"):
            which = "feed_forward_norm" if arrangement == "post" else "feed_forward_output_norm"
            out = normed(f"{name}.{which}", out)
        x_BTD = x_BTD + added(out, layer_key, FEED_FORWARD_DROPOUT)
        x_BTD = x_BTD if joining_BTD is None else x_BTD + joining_BTD
        if spec.layer_inputs is not None:
            own = inside(parameters, f"{name}.layer_input")
            out = layer_input(spec.layer_inputs, spec.norm, own, x_BTD, inputs_BTLZ[:, :, index])
            record[f"{name}.layer_input"] = out
            x_BTD = x_BTD + out
        if layer.output_scale:
            x_BTD = x_BTD * parameters[f"{name}.output_scale"]
        record[name] = x_BTD
    x_BTD = normed("final_norm", x_BTD)
    record["final_norm"] = x_BTD
    logits_BTV = _logits(spec, parameters, x_BTD)
    record["logits"] = logits_BTV
    return Forward(logits_BTV, routings, index_losses)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Set each element to zero with probability `rate` and divide the others by `1 - rate`; without a key, x.

    An element is kept where its uniform number is at least `rate`. Source: Srivastava et al. 2014, JMLR 15(56).
    """
    if rate == 0 or key is None:
        return x
    return np.where(uniform(key, x.shape) >= np.float32(rate), x / (1 - rate), 0.0)


def _embedded(spec: ModelSpec, parameters: Parameters, tokens_BT: Array) -> Array:
    x_BTD = parameters["embedding.weight"][tokens_BT] * spec.multipliers.embedding
    if spec.position is not None:
        position_T = np.arange(tokens_BT.shape[1])
        x_BTD = x_BTD + embedding_positions(spec.position, spec.embed_dim, inside(parameters, "position"), position_T)
    return x_BTD


def _attended(
    spec: AttentionSpec,
    parameters: Parameters,
    x_BTD: Array,
    first_value_BTMH: Array | None,
    sources: Mapping[int, tuple[Array, Array] | None],
) -> Attended:
    match spec:
        case GroupedQueryAttentionSpec(keys_of_layer=int(other)):
            return grouped_query_attention(spec, parameters, x_BTD, source=sources[other])
        case GroupedQueryAttentionSpec():
            return grouped_query_attention(spec, parameters, x_BTD, first_value_BTMH=first_value_BTMH)
        case GatedDeltaAttentionSpec():
            return gated_delta_attention(spec, parameters, x_BTD)
        case LatentAttentionSpec():
            return latent_attention(spec, parameters, x_BTD)
        case ShortConvolutionSpec():
            return short_convolution(spec, parameters, x_BTD)


def _logits(spec: ModelSpec, parameters: Parameters, x_BTD: Array) -> Array:
    match spec.head:
        case TiedHeadSpec():
            logits_BTV = np.einsum("BTD,VD->BTV", x_BTD, parameters["embedding.weight"])
        case UntiedHeadSpec():
            logits_BTV = np.einsum("BTD,DV->BTV", x_BTD, parameters["head.w_head"])
    logits_BTV = logits_BTV + parameters["head.b_head"] if spec.head.bias else logits_BTV
    logits_BTV = spec.multipliers.logits * logits_BTV
    return logits_BTV if spec.softcap is None else spec.softcap * np.tanh(logits_BTV / spec.softcap)
