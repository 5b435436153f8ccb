"""Attention layers as data."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moezoo.core.spec.base import Part, default_kind, impossible
from moezoo.core.spec.compressed_attention import CompressedAttentionSpec
from moezoo.core.spec.convolution import ResidualConvolutionSpec
from moezoo.core.spec.indexer import BlockIndexerSpec, DynamicMaskSpec, IndexerSpec
from moezoo.core.spec.norms import NormSpec, RMSNormSpec
from moezoo.core.spec.positions import NoPositionSpec, PositionSpec, RelativePositionSpec, RoPESpec
from moezoo.core.spec.state_space import LightningAttentionSpec, Mamba2Spec, MambaSpec


class TemperatureTuningSpec(Part):
    """Position-dependent query scale: query t is multiplied by `1 + scale * ln(floor((t + first) / floor_length) + 1)`.

    With `form: power` it is multiplied by `((t + first) / floor_length + 1) ** scale`, without steps (Beam); with
    `form: log` by `1 + scale * ln(max(1, (t + first) / floor_length))` (Inkling). `first`: index of the first token.
    Source: Nakanishi 2025, arXiv 2501.19399 (scalable softmax), in the form of Llama-4; Mistral 4 counts from 0.
    """

    form: Literal["steps", "power", "log"] = "steps"

    floor_length: PositiveInt = 8192
    scale: PositiveFloat = 0.1
    first: Annotated[int, Field(ge=0, le=1)] = 1


class HeadConvolutionSpec(Part):
    """Causal convolutions over the projected queries and keys, and values of which half are the token's before.

    Two follow each other: a depthwise one over `conv_width` tokens, then one over `mix_width` tokens that mixes the
    features of each head; both have biases, and both windows include the token itself. To their output is added what
    they saw, queries averaged with their group's key, and keys with their group's mean query. The first half of a
    token's values (all M heads as one row) is projected from the token, the second from the token before it. Source:
    Figliolia et al. 2025 (compressed convolutional attention), arXiv 2510.04476; transformers 5.23, zaya.
    """

    conv_width: Annotated[int, Field(ge=2)] = 2
    mix_width: Annotated[int, Field(ge=2)] = 2


class GroupedQueryAttentionSpec(Part):
    """Causal attention whose N query heads share M key/value heads. Source: Ainslie et al. 2023, arXiv 2305.13245.

    M = N is multi-head attention, M = 1 is multi-query attention. `qk_norm` normalizes queries and keys (Henry et al.
    2020, arXiv 2010.04245, with RMSNorm): per `head`, with one scale shared by all heads, or over the whole
    `projection` (OLMoE), before RoPE or after it (Hunyuan, Llama-4). `window`: sliding window, each query attends to
    the last `window` tokens, itself included (Beltagy et al. 2020, arXiv 2004.05150). `chunk`: chunked attention, each
    query attends only within its own chunk of `chunk` tokens (Llama-4). `sinks`: attention sinks, a learned logit per
    head that enters the softmax and carries no value (gpt-oss; Xiao et al. 2023, arXiv 2309.17453); `projected_sinks`:
    the logit is a projection of the query's input. `gate`: the heads' output is multiplied by the sigmoid of a
    projection of the layer's input, one gate per head or per feature (Qiu et al. 2025, arXiv 2505.06708);
    `gate_function`: or by its softplus (Laguna); `gate_bias`: the projection has a bias, per head (Beam) or feature.
    `softcap`: scores become `softcap * tanh(score / softcap)` (Gemma 2, arXiv 2408.00118). `scale` multiplies the
    scores; null is `1 / sqrt(head_dim)`. `relative` adds a bias by distance and query behind all this. `qk_l2_clip`:
    queries, times a learned scale, and keys that are longer than this L2 norm are shortened to it, before RoPE.
    `kv_convolution`: a short convolution of the projected keys, and one of the values, before any norm. `clip`: queries
    and keys (after a norm before RoPE) and values are clipped to [-clip, clip] (MPT, DBRX, OLMoE). Values are
    `value_head_dim` wide (null: `head_dim`) and multiplied by `value_multiplier` (MiMo-V2); `value_norm` normalizes
    them per head; with `values_from_keys` values have no projection and equal the projected keys, before any norm and
    RoPE (both: Gemma 4). `value_residual`: values are mixed with those of the model's first layer, `(1 - mix) * own +
    mix * first`; mix is learned, initially 0.5 (Zhou et al. 2024, arXiv 2410.17897). `keys_of_layer`: KV sharing, keys
    and values are those of that earlier layer (index from 0, repeats expanded), and this layer has no key or value
    projections and no cache (Gemma 3n, 4; Brandon et al. 2024, arXiv 2405.12981). `convolution`: queries, keys and
    values mix those of the last tokens, before any norm. `key_temperature`: keys, after norm and rotation, are
    multiplied by a learned number per head (both: ZAYA1). `indexer`: a query attends to the blocks of tokens that it
    chooses (Qwen4, MiniMax-M3). `dynamic_mask`: keys have a bias by their values, and those with the greatest are
    attended to (Doge); its projection has a bias with `qkv_bias`.
    """

    kind: Literal["grouped_query"] = "grouped_query"
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    value_head_dim: PositiveInt | None = None
    position: PositionSpec = RoPESpec()
    qk_norm: NormSpec | None = None
    qk_norm_over: Literal["head", "projection"] = "head"
    qk_norm_after_rotation: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    clip: PositiveFloat | None = None
    window: PositiveInt | None = None
    chunk: PositiveInt | None = None
    sinks: bool = False
    gate: Literal["headwise", "elementwise"] | None = None
    gate_function: Literal["sigmoid", "softplus"] = "sigmoid"
    gate_bias: Literal["headwise", "elementwise"] | None = None
    softcap: PositiveFloat | None = None
    scale: PositiveFloat | None = None
    relative: RelativePositionSpec | None = None
    projected_sinks: bool = False
    qk_l2_clip: PositiveFloat | None = None
    kv_convolution: ResidualConvolutionSpec | None = None
    temperature_tuning: TemperatureTuningSpec | None = None
    value_norm: NormSpec | None = None
    value_multiplier: PositiveFloat = 1.0
    values_from_keys: bool = False
    value_residual: bool = False
    keys_of_layer: NonNegativeInt | None = None
    convolution: HeadConvolutionSpec | None = None
    key_temperature: bool = False
    indexer: BlockIndexerSpec | None = None
    dynamic_mask: DynamicMaskSpec | None = None

    @property
    def value_dim(self) -> int:
        """Width of each head's values."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def projects_values(self) -> bool:
        """True if values are a projection of their own, not keys or halves of two tokens' values."""
        return not self.values_from_keys and self.convolution is None

    @property
    def plain_scores(self) -> bool:
        """True if scores are scaled products of queries and keys, and sinks constants: what kernels compute."""
        biased = self.relative is not None or self.dynamic_mask is not None
        return self.softcap is None and not biased and not self.projected_sinks

    @model_validator(mode="after")
    def _sizes(self) -> "GroupedQueryAttentionSpec":
        if self.num_heads % self.num_kv_heads:
            raise impossible(
                "num_heads",
                f"is {self.num_heads}, which is not divisible by num_kv_heads = {self.num_kv_heads}",
                "Use a multiple of num_kv_heads",
            )
        if isinstance(self.position, RoPESpec):
            self.position.check(self.head_dim, "head_dim")
        self._check_indexer()
        if self.qk_norm is None and (self.qk_norm_over != "head" or self.qk_norm_after_rotation):
            raise impossible(
                "qk_norm",
                "is null, but qk_norm_over or qk_norm_after_rotation is set",
                "Add qk_norm: {}, or remove these options",
            )
        self._check_gate()
        if self.window is not None and self.chunk is not None:
            raise impossible(
                "chunk", f"is {self.chunk}, but window is also set to {self.window}", "Set only one of them"
            )
        if self.sinks and self.projected_sinks:
            raise impossible("projected_sinks", "is true, but sinks is also set", "Set only one of them")
        if self.kv_convolution is not None and not (self.projects_values and self.keys_of_layer is None):
            raise impossible(
                "kv_convolution", "is set, but the layer does not project both keys and values", "Remove one of the two"
            )
        if self.values_from_keys and self.value_dim != self.head_dim:
            raise impossible(
                "value_head_dim",
                f"is {self.value_head_dim}, but values_from_keys uses keys of head_dim = {self.head_dim} as values",
                "Remove one of the two",
            )
        options = {
            "value_norm": self.value_norm is not None,
            "value_multiplier": self.value_multiplier != 1,
            "values_from_keys": self.values_from_keys,
            "value_residual": self.value_residual,
            "convolution": self.convolution is not None,
            "key_temperature": self.key_temperature,
        }
        for name, is_set in options.items():
            if is_set and self.keys_of_layer is not None:
                raise impossible(
                    name,
                    f"is set, but with keys_of_layer = {self.keys_of_layer} the values are those of that layer",
                    "Remove one of the two",
                )
        if self.convolution is not None:
            self._check_halves()
        return self

    def _check_halves(self) -> None:
        if self.values_from_keys:
            raise impossible(
                "values_from_keys",
                "is true, but with a convolution half of the values are those of the token before",
                "Remove one of the two",
            )
        if self.num_kv_heads * self.value_dim % 2:
            raise impossible(
                "convolution",
                f"is set, but values of {self.num_kv_heads} heads of width {self.value_dim} have no halves",
                "Use an even width",
            )

    def _check_gate(self) -> None:
        if self.gate is None and (self.gate_function != "sigmoid" or self.gate_bias is not None):
            raise impossible(
                "gate",
                "is null, but gate_function or gate_bias is set",
                "Use gate: headwise or elementwise, or remove these options",
            )
        if self.gate == "headwise" and self.gate_bias == "elementwise":
            raise impossible("gate_bias", "is elementwise, but gate is headwise", "Use the same for both")

    def _check_indexer(self) -> None:
        """Raise if an indexer chooses among tokens of which another option leaves some out, or rotates too few."""
        if self.indexer is None:
            return
        others: dict[str, object] = {"window": self.window, "chunk": self.chunk, "keys_of_layer": self.keys_of_layer}
        others |= {"convolution": self.convolution, "dynamic_mask": self.dynamic_mask}
        for name, value in others.items():
            if value is not None:
                raise impossible(name, "is set, but an indexer selects the positions", "Set only one of them")
        if isinstance(self.position, RoPESpec) and self.position.rotated_dim(self.head_dim) > self.indexer.head_dim:
            rotated = self.position.rotated_dim(self.head_dim)
            raise impossible(
                "indexer.head_dim",
                f"is {self.indexer.head_dim}, but {rotated} features are rotated",
                f"Use at least {rotated}",
            )
        if self.indexer.pooled == "scores" and self.indexer.num_heads != self.num_kv_heads:
            raise impossible(
                "indexer.num_heads",
                f"is {self.indexer.num_heads}, but with pooled: scores each chooses for one of num_kv_heads = "
                f"{self.num_kv_heads}",
                f"Use {self.num_kv_heads}",
            )


class LatentAttentionSpec(Part):
    """Multi-head latent attention (MLA). Source: DeepSeek-AI 2024 (DeepSeek-V2), arXiv 2405.04434, section 2.1.

    Keys and values of all heads are projected from one latent of width Z per token; the cache holds only this latent
    and one rotated key. `query_latent_dim`: width of the low-rank query projection; null for a full-rank one. Each
    head's query and key have `head_dim` features without position and `rope_head_dim` rotated ones, 0 with position
    `none` (GLM-5.3); its value has `value_head_dim`. `bias`: the projections from and to the model width have a bias,
    except `w_query` (`attention_bias` of DeepSeek-V3). `latent_multiplier` is a constant on the normalized latent
    (LongCat-Flash); a constant on queries is part of `scale`, which multiplies the scores; null is `1 / sqrt(head_dim +
    rope_head_dim)`, and YaRN's mscale multiplies either. `rope_key_norm`: the shared key is normalized before its
    rotation. `window`: sliding window, each query attends to the last `window` tokens, itself included. `gate`: each
    head's output is multiplied by the sigmoid of a projection of the layer's input (these three: dots3-note,
    transformers), or each of its features is (`elementwise`; HY-V4). `sinks`: each head has a logit that takes part of
    its attention, as in `grouped_query` (HY-V4). With an `indexer` a query attends only to the tokens that it chooses;
    with `indexer_of_layer`, to those that the indexer of that earlier layer chose (index from 0, repeats expanded), and
    this layer has none (GLM-5.2; arXiv 2603.12201). With `raw_query_latent` queries are projected from their latent
    twice over, normalized and as it is; with `query_gate` the heads' output is multiplied by the sigmoid of another
    projection of what queries are projected from, per feature (both: A.X-K2).
    """

    kind: Literal["latent"] = "latent"
    num_heads: PositiveInt
    head_dim: PositiveInt
    rope_head_dim: NonNegativeInt
    value_head_dim: PositiveInt
    latent_dim: PositiveInt
    query_latent_dim: PositiveInt | None = None
    position: PositionSpec = RoPESpec(layout="interleaved")
    norm: NormSpec = RMSNormSpec()
    bias: bool = False
    latent_multiplier: PositiveFloat = 1.0
    scale: PositiveFloat | None = None
    temperature_tuning: TemperatureTuningSpec | None = None
    rope_key_norm: bool = False
    window: PositiveInt | None = None
    gate: Literal["headwise", "elementwise"] | None = None
    sinks: bool = False
    indexer: IndexerSpec | None = None
    indexer_of_layer: NonNegativeInt | None = None
    raw_query_latent: bool = False
    query_gate: bool = False

    @property
    def query_source_dim(self) -> int | None:
        """Width of what queries are projected from; None: the model's."""
        latent_dim = self.query_latent_dim
        return None if latent_dim is None else (2 if self.raw_query_latent else 1) * latent_dim

    @model_validator(mode="after")
    def _sizes(self) -> "LatentAttentionSpec":
        if self.window is not None and (self.indexer is not None or self.indexer_of_layer is not None):
            raise impossible(
                "window", f"is {self.window}, but an indexer selects the positions", "Set only one of them"
            )
        if self.rope_head_dim == 0:
            self._check_without_rotation()
        if isinstance(self.position, RoPESpec):
            self.position.check(self.rope_head_dim, "rope_head_dim")
            if self.indexer is not None and self.indexer.head_dim < self.rope_head_dim:
                raise impossible(
                    "indexer.head_dim",
                    f"is {self.indexer.head_dim}, but it rotates rope_head_dim = {self.rope_head_dim} features",
                    f"Use at least {self.rope_head_dim}",
                )
        if self.indexer is not None and self.indexer_of_layer is not None:
            raise impossible(
                "indexer_of_layer",
                f"is {self.indexer_of_layer}, but this layer has its own indexer",
                "Remove one of the two",
            )
        if self.raw_query_latent and self.query_latent_dim is None:
            raise impossible(
                "raw_query_latent", "is true, but query_latent_dim is null", "Set query_latent_dim, or remove it"
            )
        return self

    def _check_without_rotation(self) -> None:
        if not isinstance(self.position, NoPositionSpec):
            raise impossible(
                "position",
                f"is {self.position.kind}, but rope_head_dim is 0, so that no feature has a position",
                "Use position: {kind: none}, or a larger rope_head_dim",
            )
        if self.rope_key_norm:
            raise impossible(
                "rope_key_norm",
                "is true, but rope_head_dim is 0, so that there is no such key",
                "Remove one of the two",
            )


class GatedDeltaAttentionSpec(Part):
    """Gated DeltaNet: linear attention with a recurrent state of fixed size. Source: Yang et al. 2024, 2412.06464.

    Each of `num_value_heads` heads has a state matrix of `key_head_dim x value_head_dim` that maps keys to values; each
    token decays the state, overwrites the value stored for its key (delta rule), and reads the state with its query.
    Groups of value heads share queries and keys (Qwen3-Next). Causal convolutions over `conv_width` tokens, the current
    one included, follow the projections of queries, keys and values. `norm` normalizes each head's output, before an
    output gate of kind `gate`.

    `decay`: a factor per token and `head`, or also per `channel`, the features of the key (Kimi delta attention;
    arXiv 2510.26692). With `log_decay_floor` its logarithm is `floor * sigmoid(...)`, in place of `-softplus(...)`
    (Ling 3.0). `decay_rank`, `gate_rank`: width between the two matrices that project to decays and to the output
    gate; null is one matrix.
    """

    kind: Literal["gated_delta"] = "gated_delta"
    num_key_heads: PositiveInt
    num_value_heads: PositiveInt
    key_head_dim: PositiveInt
    value_head_dim: PositiveInt
    conv_width: Annotated[int, Field(ge=2)] = 4
    norm: NormSpec = RMSNormSpec()
    gate: Literal["silu", "sigmoid"] = "silu"
    gate_rank: PositiveInt | None = None
    decay: Literal["head", "channel"] = "head"
    decay_rank: PositiveInt | None = None
    log_decay_floor: Annotated[float, Field(lt=0)] | None = None

    @model_validator(mode="after")
    def _sizes(self) -> "GatedDeltaAttentionSpec":
        if self.num_value_heads % self.num_key_heads:
            raise impossible(
                "num_value_heads",
                f"is {self.num_value_heads}, which is not divisible by num_key_heads = {self.num_key_heads}",
                "Use a multiple of num_key_heads",
            )
        return self


class ShortConvolutionSpec(Part):
    """Gated short convolution in place of attention: a depthwise causal convolution over `conv_width` tokens.

    The layer's input is projected to two gates and a value; the value times the input gate passes a depthwise causal
    convolution (the window includes the current token), is multiplied by the output gate, and is projected back. The
    convolution has as many features as the model (D). `bias`: projections and convolution have biases. Source: Amini et
    al. 2025, arXiv 2511.23404 (LFM2).
    """

    kind: Literal["short_convolution"] = "short_convolution"
    conv_width: Annotated[int, Field(ge=2)] = 3
    bias: bool = False


class NoAttentionSpec(Part):
    """No attention, nor anything in its place: the layer is a feed-forward alone (Nemotron-H, arXiv 2504.03624)."""

    kind: Literal["none"] = "none"


MixerSpec = (
    GroupedQueryAttentionSpec
    | LatentAttentionSpec
    | CompressedAttentionSpec
    | GatedDeltaAttentionSpec
    | ShortConvolutionSpec
    | Mamba2Spec
    | MambaSpec
    | LightningAttentionSpec
)
AttentionSpec = Annotated[
    MixerSpec | NoAttentionSpec,
    Field(discriminator="kind"),
    default_kind("grouped_query"),
]
