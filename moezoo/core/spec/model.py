"""Layers and the whole model as data."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from moezoo.core.errors import SpecError
from moezoo.core.spec.attention import AttentionSpec, GroupedQueryAttentionSpec, LatentAttentionSpec
from moezoo.core.spec.base import Part, impossible
from moezoo.core.spec.feed_forward import FeedForwardSpec, GatedFeedForwardSpec
from moezoo.core.spec.losses import PooledBalanceLossSpec
from moezoo.core.spec.moe import MoESpec, ParallelFeedForwardSpec
from moezoo.core.spec.norms import NormSpec, RMSNormSpec
from moezoo.core.spec.positions import EmbeddingPositionSpec, LearnedPositionsSpec, RoPESpec


class LayerSpec(Part):
    """One transformer layer, or `repeat` equal ones: attention, then a dense feed-forward or a MoE, each a block f.

    `arrangement` of norms: `pre` is `x + f(norm(x))` (Xiong et al. 2020, arXiv 2002.04745); `post` is `x + norm(f(x))`
    (OLMo 2, arXiv 2501.00656); `sandwich` is `x + norm(f(norm(x)))` (Gemma 2, arXiv 2408.00118); `parallel` is
    `x + attention(norm(x)) + feed_forward(norm(x))` with one norm (GPT-J; Chowdhery et al. 2022, arXiv 2204.02311).
    `shortcut`: the layer has both; its mixture sees what its feed-forward sees, and joins the residual stream only at
    the end of the next layer, beside which it can be computed (Cai et al. 2024, arXiv 2404.05019; LongCat-Flash, arXiv
    2509.01322, whose layer is two of these). `output_scale`: what leaves the layer, residual stream and all, is
    multiplied by a number that training leaves alone, 1 unless a checkpoint has another (Gemma 4).
    """

    repeat: PositiveInt = 1
    arrangement: Literal["pre", "post", "sandwich", "parallel"] = "pre"
    attention: AttentionSpec
    feed_forward: FeedForwardSpec | None = None
    moe: MoESpec | None = None
    shortcut: bool = False
    output_scale: bool = False

    @model_validator(mode="after")
    def _one_feed_forward(self) -> "LayerSpec":
        if self.shortcut:
            if self.feed_forward is None or self.moe is None:
                raise impossible(
                    "shortcut",
                    f"is true, but the layer has no {'moe' if self.moe is None else 'feed_forward'}",
                    "Give both feed_forward (dense) and moe",
                )
            if self.arrangement != "pre":
                raise impossible(
                    "shortcut",
                    f"is true, but arrangement is {self.arrangement}",
                    "Use arrangement: pre",
                )
        elif (self.feed_forward is None) == (self.moe is None):
            both = "both feed_forward and moe" if self.moe is not None else "neither feed_forward nor moe"
            raise impossible(
                "", f"has {both}", "Give exactly one of feed_forward (dense) and moe, or both and shortcut: true"
            )
        shared = None if self.moe is None else self.moe.shared
        if isinstance(shared, ParallelFeedForwardSpec) and self.arrangement in ("post", "parallel"):
            raise impossible(
                "moe.shared",
                f"is parallel, which needs a norm between attention and mixture, and {self.arrangement} has none",
                "Use arrangement: pre or sandwich, or shared: {kind: sum, hidden_dim: ...}",
            )
        return self


class TiedHeadSpec(Part):
    """The output projection is the transposed embedding. Source: Press and Wolf 2016, arXiv 1608.05859.

    `bias`: it has one, which the embedding does not share.
    """

    kind: Literal["tied"] = "tied"
    bias: bool = False


class UntiedHeadSpec(Part):
    """The output projection is a matrix of its own, with a bias or not (Phi-3.5-MoE has one)."""

    kind: Literal["untied"] = "untied"
    bias: bool = False


HeadSpec = Annotated[TiedHeadSpec | UntiedHeadSpec, Field(discriminator="kind")]


class MultipliersSpec(Part):
    """Constants on the embedding, on what each block adds to the residual stream, and on the logits (Granite, muP)."""

    embedding: PositiveFloat = 1.0
    residual: PositiveFloat = 1.0
    logits: PositiveFloat = 1.0


class LayerInputsSpec(Part):
    """Each layer has a vector of `dim` features for each token, beside the residual stream: half from an embedding of
    its own, half from the token's embedding. Behind its two blocks it adds `norm((f(x w_gate) * vector) w_output)`, f
    being the activation of that gated feed-forward. Source: Google 2025 (Gemma 3n, per-layer embeddings), and Gemma 4.
    """

    dim: PositiveInt
    activation: Literal["swiglu", "geglu"] = "geglu"

    @property
    def gated(self) -> GatedFeedForwardSpec:
        """The gate as that of a feed-forward."""
        return GatedFeedForwardSpec(kind=self.activation, hidden_dim=self.dim)


class NormalInitializerSpec(Part):
    """Matrices drawn from N(0, std); scales are one, biases zero."""

    kind: Literal["normal"] = "normal"
    std: PositiveFloat = 0.02


class DepthScaledInitializerSpec(Part):
    """As `normal`, but projections that write into the residual stream use std / sqrt(2 L).

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """

    kind: Literal["depth_scaled"] = "depth_scaled"
    std: PositiveFloat = 0.02


class ZeroOutputInitializerSpec(Part):
    """As `normal`, but projections that write into the residual stream start at zero: each layer starts as nothing.

    Source: Zhang et al. 2019 (Fixup), arXiv 1901.09321; tiny_moe, modded-nanogpt.
    """

    kind: Literal["zero_output"] = "zero_output"
    std: PositiveFloat = 0.02


InitializerSpec = Annotated[
    NormalInitializerSpec | DepthScaledInitializerSpec | ZeroOutputInitializerSpec, Field(discriminator="kind")
]


class PrecisionSpec(Part):
    """Dtype of activations and products. Parameters keep that of their files; `core/precision.py` lists cast points."""

    compute: Literal["float32", "bfloat16"] = "float32"


class ModelSpec(Part):
    """A decoder-only language model. `vocab_size: null` in a config means: as many as the tokenizer has.

    `position`: vectors added to the embedding, beside what the attention layers do. `softcap`: logits become
    `softcap * tanh(logit / softcap)` (Gemma 2, arXiv 2408.00118). `dropout`: in training, this share of what each block
    adds to the residual stream is set to zero and the rest scaled up (Srivastava et al. 2014).
    """

    vocab_size: PositiveInt | None = None
    embed_dim: PositiveInt
    position: EmbeddingPositionSpec | None = None
    layer_inputs: LayerInputsSpec | None = None
    layers: tuple[LayerSpec, ...]
    norm: NormSpec = RMSNormSpec()
    head: HeadSpec = UntiedHeadSpec()
    multipliers: MultipliersSpec = MultipliersSpec()
    softcap: PositiveFloat | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    initializer: InitializerSpec = DepthScaledInitializerSpec()
    precision: PrecisionSpec = PrecisionSpec()

    @model_validator(mode="after")
    def _layers_fit(self) -> "ModelSpec":
        if not self.layers:
            raise impossible("layers", "is empty", "Give at least one layer")
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
                    f"has no values of {heads[0]} heads of {heads[1]}, which a layer with value_residual mixes in",
                    "Give the first layer grouped_query attention of the same num_kv_heads and width of values",
                )
        if self.layers[-1].shortcut:
            raise impossible(
                f"layers[{len(self.layers) - 1}].shortcut",
                "is true, but there is no next layer for the mixture to join",
                "Leave it out, or add a layer",
            )
        self._check_later_layers()
        self._check_shared_keys()
        self._check_pooled_balance()
        return self

    def _check_later_layers(self) -> None:
        """What a layer takes over from one before it is asked for where there is one."""
        places = [(place, layer) for place, layer in enumerate(self.layers) for _ in range(layer.repeat)]
        mixed = [
            isinstance(layer.attention, GroupedQueryAttentionSpec) and layer.attention.value_residual
            for _, layer in places
        ]
        if mixed[0] and not any(mixed[1:]):
            raise impossible(
                "layers[0].attention.value_residual",
                "is true, but the first layer's values are what later layers mix in, and none of them does",
                "Leave it out, or set it on later layers too",
            )
        gated = [(place, layer.moe.router.gating_residual) for place, layer in places if layer.moe is not None]
        if gated and gated[0][1] and not any(residual for _, residual in gated[1:]):
            raise impossible(
                f"layers[{gated[0][0]}].moe.router.gating_residual",
                "is true, but no mixture stands before this one, and no later one has it",
                "Leave it out, or set it on later mixtures too",
            )

    def _check_shared_keys(self) -> None:
        """Keys of another layer are there, and as wide as this layer's would be."""
        places = [(place, layer.attention) for place, layer in enumerate(self.layers) for _ in range(layer.repeat)]
        for index, (place, attention) in enumerate(places):
            if not isinstance(attention, GroupedQueryAttentionSpec) or attention.keys_of_layer is None:
                continue
            source = attention.keys_of_layer
            path = f"layers[{place}].attention.keys_of_layer"
            if source >= index:
                raise impossible(path, f"is {source}, but this is layer {index}", "Name an earlier layer")
            other = places[source][1]
            if not isinstance(other, GroupedQueryAttentionSpec) or other.keys_of_layer is not None:
                raise impossible(
                    path,
                    f"is {source}, a layer without keys of its own heads",
                    "Name one of grouped_query attention with keys of its own",
                )
            ours, theirs = ((each.num_kv_heads, each.head_dim, each.value_dim) for each in (attention, other))
            if ours != theirs:
                raise impossible(
                    path,
                    f"is {source}, which has {theirs[0]} key/value heads of {theirs[1]} and {theirs[2]}, not "
                    f"{ours[0]} of {ours[1]} and {ours[2]}",
                    "Make them equal, or name another layer",
                )

    def _check_pooled_balance(self) -> None:
        """Layers whose routers' rows are pooled have equal routers, and one coefficient."""
        named = [
            (place, moe.num_choices, moe.router.top_k, loss.coefficient)
            for place, moe in enumerate(layer.moe for layer in self.layers)
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
                        f"names pooled_balance, which pools all layers that name it, but {what} is {number} here and "
                        f"{first} in layers[{named[0][0]}]",
                        "Make them equal, or use switch_balance",
                    )

    @property
    def all_layers(self) -> tuple[LayerSpec, ...]:
        """Every layer in order, `repeat` written out: length L."""
        return tuple(layer for layer in self.layers for _ in range(layer.repeat))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have a MoE."""
        return tuple(index for index, _ in self.moes)

    @property
    def moes(self) -> tuple[tuple[int, MoESpec], ...]:
        """Each MoE layer's index in `all_layers` and its MoE spec, in order."""
        return tuple((index, layer.moe) for index, layer in enumerate(self.all_layers) if layer.moe is not None)

    @property
    def shared_layers(self) -> frozenset[int]:
        """Indices of the layers whose keys and values later ones attend to."""
        named = (
            layer.attention.keys_of_layer
            for layer in self.layers
            if isinstance(layer.attention, GroupedQueryAttentionSpec)
        )
        return frozenset(index for index in named if index is not None)

    def reach_of(self, index: int) -> int | None:
        """How many of the last tokens whoever attends to layer `index`'s keys may see; None: all."""
        reaches = [
            min((limit for limit in (attention.window, attention.chunk) if limit is not None), default=None)
            for place, attention in enumerate(layer.attention for layer in self.all_layers)
            if isinstance(attention, GroupedQueryAttentionSpec) and index in (place, attention.keys_of_layer)
        ]
        known = [reach for reach in reaches if reach is not None]
        return max(known) if known and len(known) == len(reaches) else None

    @property
    def inference_differs(self) -> bool:
        """Whether inference routes otherwise than training does without noise."""
        return any(layer.moe is not None and layer.moe.inference_differs for layer in self.layers)

    @property
    def sequences_compete(self) -> bool:
        """Whether what becomes of a token depends on the other sequences of its batch."""
        return any(layer.moe is not None and layer.moe.sequences_compete for layer in self.layers)

    @property
    def max_length(self) -> int | None:
        """The longest text that the model has positions for; None where any length goes."""
        return min((length for length, _ in self._ends()), default=None)

    @property
    def max_length_field(self) -> str:
        """Where `max_length` comes from, as a config has it: `model.position.max_length`."""
        return min(self._ends())[1]

    def _ends(self) -> list[tuple[int, str]]:
        """Lengths that something was made for, and the field of each."""
        ends = []
        if isinstance(self.position, LearnedPositionsSpec):
            ends.append((self.position.max_length, "model.position.max_length"))
        for place, layer in enumerate(self.layers):
            if isinstance(layer.attention, GroupedQueryAttentionSpec | LatentAttentionSpec):
                position = layer.attention.position
                if isinstance(position, RoPESpec) and position.max_length is not None:
                    field = f"model.layers[{place}].attention.position.scaling.length"
                    ends.append((position.max_length, field))
        return ends

    @property
    def vocab(self) -> int:
        """V. Raises SpecError while `vocab_size` is null."""
        if self.vocab_size is None:
            raise SpecError(
                "model.vocab_size is null; expected a number once the model is built. Give it, or a tokenizer."
            )
        return self.vocab_size
