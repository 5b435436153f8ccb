"""The whole model. Spec: moezoo.core.reference.transformer."""

from collections.abc import Sequence
from typing import NamedTuple, assert_never

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import (
    HeadSpec,
    ModelSpec,
    TiedHeadSpec,
    UntiedHeadSpec,
)
from moezoo.core.tokens import ExpertMasks
from moezoo.mlx_backend.adapter import held, keyed, take
from moezoo.mlx_backend.arrays import DTYPES, Weights
from moezoo.mlx_backend.choice import given_routing
from moezoo.mlx_backend.dispatch import Dispatch
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.kernels.early_start import start_early
from moezoo.mlx_backend.kv_cache import Caches, Shared
from moezoo.mlx_backend.layer import Layer, LayerOutput, Record, ResidualState, StepInputs, WrapBlock
from moezoo.mlx_backend.layer_inputs import LayerInputs
from moezoo.mlx_backend.moe import Exchange
from moezoo.mlx_backend.normalization import norm
from moezoo.mlx_backend.positions import Documents, EmbeddingPosition, packed_documents, positions
from moezoo.mlx_backend.random import fold_in
from moezoo.mlx_backend.residual import enter, final_residual, first_residual
from moezoo.mlx_backend.routing import Routing


class Forward(NamedTuple):
    """Spec: moezoo.core.reference.transformer.Forward; with extended caches if there are any.

    Also the dispatch of each MoE layer, or None of few tokens, of which nothing is dropped.
    """

    logits_BTV: mx.array
    routings: list[Routing]
    dispatches: list[Dispatch | None]
    caches: Caches | None
    index_losses: list[tuple[int, float, mx.array]]


class Embedding(nn.Module):
    """Token embedding; also the head of a tied model."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.weight = weights.parameter("weight")


class Head(nn.Module):
    """Parameters of the output projection: a matrix where it is untied, and a bias where it has one."""

    def __init__(self, spec: HeadSpec, weights: Weights):
        super().__init__()
        if isinstance(spec, UntiedHeadSpec):
            self.w_head = weights.parameter("w_head")
        if spec.bias:
            self.b_head = weights.parameter("b_head")


class Transformer(nn.Module):
    """Spec: moezoo.core.reference.transformer.forward."""

    def __init__(self, spec: ModelSpec, weights: Weights):
        super().__init__()
        self.spec = spec
        weights = weights.adapted_by(spec.adapter)
        self.embedding = Embedding(weights.inside("embedding"))
        if spec.embedding_norm:
            self.embedding_norm = norm(spec.norm, weights.inside("embedding_norm"))
        if spec.position is not None:
            self.position = EmbeddingPosition(spec.position, spec.embed_dim, weights.inside("position"))
        if spec.layer_inputs is not None:
            self.layer_inputs = LayerInputs(spec.layer_inputs, spec.norm, weights.inside("layer_inputs"))
        self.layers = [
            Layer(layer, spec, weights.inside(f"layers.{index}"), index) for index, layer in enumerate(spec.all_layers)
        ]
        self.first_residual = first_residual(spec.residual, weights.inside("first_residual"))
        self.final_residual = final_residual(spec.residual, spec.norm, weights.inside("final_residual"))
        if spec.has_norms:
            self.final_norm = norm(spec.last_norm, weights.inside("final_norm"))
        if isinstance(spec.head, UntiedHeadSpec) or spec.head.bias:
            self.head = Head(spec.head, weights.inside("head"))

    def __call__(
        self,
        tokens_BT: mx.array,
        *,
        forced: Sequence[mx.array] | None = None,
        masks: Sequence[ExpertMasks] | None = None,
        caches: Caches | None = None,
        record: Record | None = None,
        key: mx.array | None = None,
        inference: bool = False,
        document_BT: mx.array | None = None,
        exchange: Exchange | None = None,
        wrap_block: WrapBlock | None = None,
    ) -> Forward:
        """With `caches`, tokens follow the cached ones, routing is of inference, and logits are the last token's.

        `exchange` runs the experts; `wrap_block` transforms each layer's blocks.
        """
        given = given_routing(self.spec.moe_layers, forced, masks, tokens_BT.shape[1])
        inference = inference or caches is not None
        documents = packed_documents(document_BT)
        inputs = StepInputs(tokens_BT, given, caches, record, key, inference, documents, exchange, wrap_block)
        x_BTD = self._embed(tokens_BT, caches, documents)
        if record is not None:
            record["embedding"] = x_BTD
        inputs_BTLZ = None if self.spec.layer_inputs is None else self.layer_inputs(tokens_BT, x_BTD)
        x_BTD = x_BTD if self.first_residual is None else self.first_residual(x_BTD)
        state, outputs = self._run_layers(ResidualState(enter(self.spec.residual, x_BTD)), inputs, inputs_BTLZ)
        x_BTD = state.streams if self.final_residual is None else self.final_residual(state.streams)
        x_BTD = x_BTD if caches is None else x_BTD[:, -1:]
        x_BTD = self.final_norm(x_BTD) if self.spec.has_norms else x_BTD
        logits_BTV = self._logits(x_BTD, key)
        if record is not None:
            record |= {"final_norm": x_BTD, "logits": logits_BTV}
        return self._collected(logits_BTV, outputs, caches)

    def _run_layers(
        self, state: ResidualState, inputs: StepInputs, inputs_BTLZ: mx.array | None
    ) -> tuple[ResidualState, list[LayerOutput]]:
        """Run all layers in order: the state after the last one, and the output of each."""
        sources: dict[int, Shared | None] = {}
        outputs: list[LayerOutput] = []
        for index in range(len(self.spec.all_layers)):
            input_BTZ = None if inputs_BTLZ is None else inputs_BTLZ[:, :, index]
            state, output = self.layers[index](state, inputs, index, input_BTZ, sources)
            if index in self.spec.shared_layers:
                sources[index] = output.source
            outputs.append(output._replace(source=None))  # so that no other layer's keys are kept
            if inputs.caches is not None:
                start_early(state.streams)
        return state, outputs

    def _collected(self, logits_BTV: mx.array, outputs: list[LayerOutput], caches: Caches | None) -> Forward:
        extended = [output.cache for output in outputs if output.cache is not None]
        return Forward(
            logits_BTV,
            [output.routing for output in outputs if output.routing is not None],
            [output.dispatched for output in outputs if output.routing is not None],
            None if caches is None else Caches(extended, caches.first_B),
            [
                (index, layer.indexer.loss_coefficient, output.index_loss)
                for index, (layer, output) in enumerate(zip(self.spec.all_layers, outputs, strict=True))
                if layer.indexer is not None and output.index_loss is not None
            ],
        )

    def _embed(self, tokens_BT: mx.array, caches: Caches | None, documents: Documents | None) -> mx.array:
        x_BTD = take(held(self.embedding.weight), tokens_BT).astype(mx.float32)
        if self.spec.embedding_norm:
            x_BTD = self.embedding_norm(x_BTD)
        if self.spec.multipliers.embedding != 1:
            x_BTD = x_BTD * self.spec.multipliers.embedding
        if self.spec.position is not None:
            start, first_B = (0, None) if caches is None else (caches.places, caches.first_B)
            x_BTD = x_BTD + self.position(mx.maximum(positions(tokens_BT.shape[1], start, first_B, documents), 0))
        return x_BTD.astype(DTYPES[self.spec.precision.compute])

    def _logits(self, x_BTD: mx.array, key: mx.array | None) -> mx.array:
        key = None if key is None else fold_in(key, len(self.spec.all_layers))
        match self.spec.head:
            case TiedHeadSpec():
                w = keyed(self.spec.adapter, self.embedding, "embedding", key).weight
                logits_BTV = projection.einsum("BTD,VD->BTV", x_BTD, w.astype(x_BTD.dtype))
            case UntiedHeadSpec():
                w = keyed(self.spec.adapter, self.head, "head", key).w_head
                logits_BTV = projection.einsum("BTD,DV->BTV", x_BTD, w.astype(x_BTD.dtype))
            case _:
                assert_never(self.spec.head)
        if self.spec.head.bias:
            logits_BTV = logits_BTV + self.head.b_head.astype(x_BTD.dtype)
        logits_BTV = logits_BTV[..., : self.spec.num_logits].astype(mx.float32)
        if self.spec.multipliers.logits != 1:
            logits_BTV = logits_BTV * self.spec.multipliers.logits
        if self.spec.softcap is not None:
            logits_BTV = self.spec.softcap * mx.tanh(logits_BTV / self.spec.softcap)
        return logits_BTV
