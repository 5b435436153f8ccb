"""The whole model."""

from collections.abc import Sequence
from typing import NamedTuple

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, Record, adapter, inside
from moezoo.core.reference.attention import Source
from moezoo.core.reference.choice import given_routing
from moezoo.core.reference.layer import ResidualState, StepInputs, layer
from moezoo.core.reference.layer_inputs import layer_inputs
from moezoo.core.reference.normalization import normalize
from moezoo.core.reference.positions import Documents, embedding_positions, packed_documents
from moezoo.core.reference.residual import enter, leave
from moezoo.core.reference.routing import Routing
from moezoo.core.spec import (
    ModelSpec,
    TiedHeadSpec,
    UntiedHeadSpec,
)
from moezoo.core.tokens import ExpertMasks


class Forward(NamedTuple):
    """Output of a forward pass.

    Fields:
        logits_BTV: of the next token at every position; without those of `unused` ids.
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
    state, outputs = ResidualState(enter(spec.residual, inside(parameters, "first_residual"), x_BTD)), []
    sources: dict[int, Source | None] = {}
    for index in range(len(spec.all_layers)):
        input_BTZ = None if spec.layer_inputs is None else inputs_BTLZ[:, :, index]
        own = inside(parameters, f"layers.{index}")
        state, output = layer(spec, index, own, state, inputs, input_BTZ=input_BTZ, sources=sources)
        sources[index] = output.source
        outputs.append(output)
    x_BTD = leave(spec.residual, spec.norm, inside(parameters, "final_residual"), state.streams)
    x_BTD = normalize(spec.last_norm, inside(parameters, "final_norm"), x_BTD) if spec.has_norms else x_BTD
    record |= {"final_norm": x_BTD, "logits": (logits_BTV := _logits(spec, parameters, x_BTD))}
    return Forward(
        logits_BTV,
        [output.routing for output in outputs if output.routing is not None],
        [
            (index, own.indexer.loss_coefficient, output.index_loss)
            for index, (own, output) in enumerate(zip(spec.all_layers, outputs, strict=True))
            if own.indexer is not None
        ],
    )


def _embedded(spec: ModelSpec, parameters: Parameters, tokens_BT: Array, documents: Documents | None) -> Array:
    x_BTD = adapter.take(parameters["embedding.weight"], tokens_BT)
    if spec.embedding_norm:
        x_BTD = normalize(spec.norm, inside(parameters, "embedding_norm"), x_BTD)
    x_BTD = x_BTD * spec.multipliers.embedding
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
    logits_BTV = spec.multipliers.logits * logits_BTV[..., : spec.num_logits]
    return logits_BTV if spec.softcap is None else spec.softcap * np.tanh(logits_BTV / spec.softcap)
