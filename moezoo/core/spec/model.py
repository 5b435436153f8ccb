"""The whole model as data."""

from itertools import pairwise
from operator import attrgetter
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from moezoo.core.errors import SpecError
from moezoo.core.spec.adapter import AdapterRole, AdapterSpec
from moezoo.core.spec.attention import AttentionSpec, GroupedQueryAttentionSpec, LatentAttentionSpec
from moezoo.core.spec.base import Part, impossible
from moezoo.core.spec.compressed_attention import CompressedAttentionSpec
from moezoo.core.spec.feed_forward import GatedFeedForwardSpec
from moezoo.core.spec.head import HeadSpec, UntiedHeadSpec
from moezoo.core.spec.layer import LayerSpec, check_ngram_embeddings
from moezoo.core.spec.losses import PooledBalanceLossSpec
from moezoo.core.spec.moe import MoESpec
from moezoo.core.spec.norms import NormSpec, RMSNormSpec
from moezoo.core.spec.positions import EmbeddingPositionSpec, LearnedPositionsSpec, RoPESpec
from moezoo.core.spec.residual import (
    GatedStreamsSpec,
    HyperConnectionsSpec,
    ResidualSpec,
    SumResidualSpec,
    check_residual,
)
from moezoo.core.spec.routing import RouterSpec

MAX_LAYERS = 2_000
"""Largest number of layers of a model; the deepest published ones have 1,000 (DeepNet, arXiv 2203.00555)."""


class MultipliersSpec(Part):
    """Constant multipliers of the embedding, of each block's residual update, and of the logits (Granite, muP)."""

    embedding: PositiveFloat = 1.0
    residual: PositiveFloat = 1.0
    logits: PositiveFloat = 1.0


class LayerInputsSpec(Part):
    """Per-layer embeddings: each layer receives a vector of `dim` features per token, besides the residual stream.

    The vector is the sum of a separate embedding of the token and a projection of the model's embedding, over
    sqrt(2). After its two blocks the layer adds `norm((f(x w_gate) * vector) w_output)`, f being the activation of that
    gated feed-forward. Source: Google 2025 (Gemma 3n, per-layer embeddings), and Gemma 4.
    """

    dim: PositiveInt
    activation: Literal["swiglu", "geglu"] = "geglu"

    @property
    def gated(self) -> GatedFeedForwardSpec:
        """The gate as a gated feed-forward spec of width `dim`."""
        return GatedFeedForwardSpec(kind=self.activation, hidden_dim=self.dim)


class NormalInitializerSpec(Part):
    """Matrices drawn from a normal distribution with standard deviation `std`; scales are one, biases zero."""

    kind: Literal["normal"] = "normal"
    std: PositiveFloat = 0.02


class DepthScaledInitializerSpec(Part):
    """Like `normal`, but projections into the residual stream use `std / sqrt(2 L)`.

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """

    kind: Literal["depth_scaled"] = "depth_scaled"
    std: PositiveFloat = 0.02


class ZeroOutputInitializerSpec(Part):
    """Like `normal`, but projections into the residual stream start at zero, so each layer starts as the identity.

    Source: Zhang et al. 2019 (Fixup), arXiv 1901.09321; tiny_moe, modded-nanogpt.
    """

    kind: Literal["zero_output"] = "zero_output"
    std: PositiveFloat = 0.02


InitializerSpec = Annotated[
    NormalInitializerSpec | DepthScaledInitializerSpec | ZeroOutputInitializerSpec, Field(discriminator="kind")
]


class PrecisionSpec(Part):
    """Compute dtype of activations and matrix products.

    Parameters keep the dtype of their files; `core/parameters/precision.py` lists the cast points.
    """

    compute: Literal["float32", "bfloat16"] = "float32"


class ModelSpec(Part):
    """A decoder-only language model. `vocab_size: null` in a config takes the size of the tokenizer's vocabulary.

    `embedding_norm`: the embedded token is normalized, as blocks' inputs are, before its multiplier (BLOOM, arXiv
    2211.05100; Inkling). `position`: position vectors added to the embedding, in addition to those inside attention.
    `softcap`: logits become `softcap * tanh(logit / softcap)` (Gemma 2, arXiv 2408.00118). `residual`: how blocks read
    from and add to the residual stream. `final_norm`: the last norm, where it is another. `dropout`: rate on each
    block's residual update in training (Srivastava et al. 2014). `adapter`: low-rank adapters of matrices; configs have
    it at the top.
    """

    vocab_size: PositiveInt | None = None
    embed_dim: PositiveInt
    embedding_norm: bool = False
    position: EmbeddingPositionSpec | None = None
    layer_inputs: LayerInputsSpec | None = None
    layers: tuple[LayerSpec, ...]
    norm: NormSpec = RMSNormSpec()
    final_norm: NormSpec | None = None
    head: HeadSpec = UntiedHeadSpec()
    multipliers: MultipliersSpec = MultipliersSpec()
    residual: ResidualSpec = SumResidualSpec()
    softcap: PositiveFloat | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    initializer: InitializerSpec = DepthScaledInitializerSpec()
    precision: PrecisionSpec = PrecisionSpec()
    adapter: AdapterSpec | None = None

    @model_validator(mode="after")
    def _layers_fit(self) -> "ModelSpec":
        if not self.layers:
            raise impossible("layers", "is empty", "Add at least one layer")
        depth = sum(layer.repeat for layer in self.layers)
        if depth > MAX_LAYERS:  # before anything is done for each layer
            raise impossible("layers", f"are {depth} with repeats", f"Use at most {MAX_LAYERS}")
        values = {
            (attention.num_kv_heads, attention.value_dim)
            for attention in (layer.attention for layer in self.layers)
            if isinstance(attention, GroupedQueryAttentionSpec) and attention.value_residual
        }
        first = self.layers[0].attention
        for heads in values:
            if not isinstance(first, GroupedQueryAttentionSpec) or (first.num_kv_heads, first.value_dim) != heads:
                raise impossible(
                    "layers[0].attention",
                    f"has no values of {heads[0]} heads of width {heads[1]} for the value_residual of later layers",
                    "Use grouped_query attention with the same num_kv_heads and value_head_dim in the first layer",
                )
        if self.layers[-1].shortcut:
            raise impossible(
                f"layers[{len(self.layers) - 1}].shortcut",
                "is true, but no later layer follows to which the MoE output could be added",
                "Remove it, or add a layer",
            )
        more = {"has_layer_inputs": self.layer_inputs is not None, "has_final_norm": self.final_norm is not None}
        check_residual(self.residual, self.layers, **more)
        check_ngram_embeddings(self.layers, self.vocab_size)
        self._check_later_layers()
        self._check_shared_layers()
        self._check_pooled_balance()
        if self.adapter is not None:
            self.adapter.check(len(self.all_layers), self._adaptable_roles(self.adapter))
        return self

    def _check_later_layers(self) -> None:
        """Raise if an option set on the first layer has no effect, because no later layer uses it."""
        places = [(place, layer) for place, layer in enumerate(self.layers) for _ in range(layer.repeat)]
        mixed = [
            isinstance(layer.attention, GroupedQueryAttentionSpec) and layer.attention.value_residual
            for _, layer in places
        ]
        if mixed[0] and not any(mixed[1:]):
            raise impossible(
                "layers[0].attention.value_residual",
                "is true, but it mixes the first layer's values into later layers, and none of them has it",
                "Remove it, or set it on later layers too",
            )
        routers = [(place, routed.router) for place, layer in places if (routed := layer.routed) is not None]
        for name, of in (("gating_residual", attrgetter("gating_residual")), ("mlp.depth_average", _depth_average)):
            if routers and of(routers[0][1]) and not any(of(router) for _, router in routers[1:]):
                raise impossible(
                    f"layers[{routers[0][0]}].moe.router.{name}",
                    "is true, but there is no MoE layer before this one, and no later one has it",
                    "Remove it, or set it on later MoE layers too",
                )
        for (_, before), (place, router) in pairwise(routers):
            width = None if before.mlp is None else before.mlp.hidden_dim
            if router.mlp is not None and router.mlp.depth_average and width != router.mlp.hidden_dim:
                raise impossible(
                    f"layers[{place}].moe.router.mlp.depth_average",
                    f"is true, but the router of the MoE layer before has no state of {router.mlp.hidden_dim}",
                    "Use the same mlp.hidden_dim in both, or remove it",
                )

    def _check_shared_layers(self) -> None:
        """Raise if `keys_of_layer` or `indexer_of_layer` names a layer without what this layer needs."""
        places = [(place, layer.attention) for place, layer in enumerate(self.layers) for _ in range(layer.repeat)]
        for index, (place, attention) in enumerate(places):
            match attention:
                case GroupedQueryAttentionSpec(keys_of_layer=int(source)):
                    path = f"layers[{place}].attention.keys_of_layer"
                case LatentAttentionSpec(indexer_of_layer=int(source)):
                    path = f"layers[{place}].attention.indexer_of_layer"
                case _:
                    continue
            if source >= index:
                raise impossible(path, f"is {source}, but this is layer {index}", "Use the index of an earlier layer")
            other = places[source][1]
            if isinstance(attention, GroupedQueryAttentionSpec):
                _check_shared_keys(attention, other, source, path)
            elif not isinstance(other, LatentAttentionSpec) or other.indexer is None:
                raise impossible(path, f"is {source}, but that layer has no indexer", "Use a layer that has one")

    def _check_pooled_balance(self) -> None:
        """Raise if layers with pooled_balance differ in number of experts, top_k or coefficient."""
        named = [
            (place, moe.num_choices, moe.router.top_k, loss.coefficient)
            for place, moe in enumerate(layer.routed for layer in self.layers)
            if moe is not None
            for loss in moe.losses
            if isinstance(loss, PooledBalanceLossSpec)
        ]
        for place, *numbers in named[1:]:
            for what, number, first in zip(
                ("experts", "top_k", "coefficient of pooled_balance"), numbers, named[0][1:], strict=True
            ):
                if number != first:
                    raise impossible(
                        f"layers[{place}].moe.losses",
                        f"has pooled_balance, which pools all layers that list it, but {what} is {number} here and "
                        f"{first} in layers[{named[0][0]}]",
                        "Make them equal, or use switch_balance",
                    )

    def _adaptable_roles(self, adapter: AdapterSpec) -> tuple[AdapterRole, ...]:
        """Return the roles of which an adapter on its layers could have matrices."""
        layers = [layer for index, layer in enumerate(self.all_layers) if adapter.has_layer(index)]
        moes = [layer.moe for layer in layers if layer.moe is not None]
        found: dict[AdapterRole, bool] = {
            "attention": True,
            "experts": bool(moes),
            "shared": any(moe.shared is not None for moe in moes),
            "dense": self.layer_inputs is not None
            or any(layer.feed_forward is not None or layer.ngram_embeddings is not None for layer in layers),
            "router": any(layer.routed is not None for layer in layers),
            "embedding": True,
            "head": isinstance(self.head, UntiedHeadSpec),
        }
        return tuple(role for role, exists in found.items() if exists)

    @property
    def adapted_roles(self) -> tuple[AdapterRole, ...]:
        """Roles of the adapted matrices; empty without an adapter."""
        return () if self.adapter is None else self.adapter.roles(self._adaptable_roles(self.adapter))

    @property
    def last_norm(self) -> NormSpec:
        """The norm before the head."""
        return self.norm if self.final_norm is None else self.final_norm

    @property
    def all_layers(self) -> tuple[LayerSpec, ...]:
        """Every layer in order, with `repeat` expanded: length L."""
        return tuple(layer for layer in self.layers for _ in range(layer.repeat))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers in `all_layers`."""
        return tuple(index for index, _ in self.moes)

    @property
    def moes(self) -> tuple[tuple[int, MoESpec], ...]:
        """Each layer with a router: its index in `all_layers`, and its MoE spec (`LayerSpec.routed`), in order."""
        return tuple((place, moe) for place, each in enumerate(self.all_layers) if (moe := each.routed) is not None)

    @property
    def num_streams(self) -> int:
        """Number of residual streams."""
        return self.residual.num_streams if isinstance(self.residual, HyperConnectionsSpec | GatedStreamsSpec) else 1

    @property
    def has_norms(self) -> bool:
        """False if the residual streams are normalized as they are read, so that layers and head need no norm."""
        return not isinstance(self.residual, GatedStreamsSpec)

    @property
    def shared_layers(self) -> frozenset[int]:
        """Indices of the layers whose keys and values, or whose indexer's choice, later layers share."""
        named = [
            layer.attention.keys_of_layer
            for layer in self.layers
            if isinstance(layer.attention, GroupedQueryAttentionSpec)
        ]
        named += [
            layer.attention.indexer_of_layer
            for layer in self.layers
            if isinstance(layer.attention, LatentAttentionSpec)
        ]
        return frozenset(index for index in named if index is not None)

    @property
    def reaches(self) -> tuple[int | None, ...]:
        """Number of most recent tokens that layers attending to each layer's keys can see, by layer; None: all."""
        found: list[list[int | None]] = [[] for _ in self.all_layers]
        for place, attention in enumerate(layer.attention for layer in self.all_layers):
            if isinstance(attention, GroupedQueryAttentionSpec):
                limits = [limit for limit in (attention.window, attention.chunk) if limit is not None]
                for index in {place, place if attention.keys_of_layer is None else attention.keys_of_layer}:
                    found[index].append(min(limits, default=None))
            if isinstance(attention, LatentAttentionSpec):
                found[place].append(attention.window)
            if isinstance(attention, CompressedAttentionSpec):
                found[place].append(attention.window if attention.compression is None else None)
        return tuple(
            None if None in reaches else max((reach for reach in reaches if reach is not None), default=None)
            for reaches in found
        )

    @property
    def inference_differs(self) -> bool:
        """True if routing at inference differs from noiseless training."""
        return any(moe.inference_differs for _, moe in self.moes)

    @property
    def sequences_compete(self) -> bool:
        """True if the routing of a token in training depends on the other sequences of its batch."""
        return any(moe.sequences_compete for _, moe in self.moes)

    @property
    def max_length(self) -> int | None:
        """Maximum sequence length that the model has positions for; None if unlimited."""
        return min((length for length, _ in self._ends()), default=None)

    @property
    def max_length_field(self) -> str:
        """Config path of the field that sets `max_length`, e.g. `model.position.max_length`."""
        return min(self._ends())[1]

    def _ends(self) -> list[tuple[int, str]]:
        """Maximum sequence lengths set by parts of the model, each with its config path."""
        ends = []
        if isinstance(self.position, LearnedPositionsSpec):
            ends.append((self.position.max_length, "model.position.max_length"))
        for place, layer in enumerate(self.layers):
            if isinstance(layer.attention, GroupedQueryAttentionSpec | LatentAttentionSpec | CompressedAttentionSpec):
                position = layer.attention.position
                if isinstance(position, RoPESpec) and position.max_length is not None:
                    field = f"model.layers[{place}].attention.position.scaling.length"
                    ends.append((position.max_length, field))
        return ends

    @property
    def num_logits(self) -> int:
        """Number of ids that have logits: all of the vocabulary but the `unused` ones of the head."""
        return self.vocab - self.head.unused

    @property
    def vocab(self) -> int:
        """Vocabulary size V. Raises SpecError if `vocab_size` is null."""
        if self.vocab_size is None:
            raise SpecError(
                "model.vocab_size is null; expected a number when the model is built. Set it, or set a tokenizer."
            )
        return self.vocab_size


def _depth_average(router: RouterSpec) -> bool:
    return router.mlp is not None and router.mlp.depth_average


def _check_shared_keys(attention: GroupedQueryAttentionSpec, other: AttentionSpec, source: int, path: str) -> None:
    """Raise if the layer `source` lacks keys and values of this layer's shape."""
    if not isinstance(other, GroupedQueryAttentionSpec) or other.keys_of_layer is not None:
        raise impossible(
            path,
            f"is {source}, but that layer does not compute its own grouped_query keys",
            "Use a layer with grouped_query attention and without keys_of_layer",
        )
    ours, theirs = ((each.num_kv_heads, each.head_dim, each.value_dim) for each in (attention, other))
    if ours != theirs:
        raise impossible(
            path,
            f"is {source}, which has {theirs[0]} key/value heads of widths {theirs[1]} and {theirs[2]}, not "
            f"{ours[0]} of widths {ours[1]} and {ours[2]}",
            "Make them equal, or use another layer",
        )
