"""Attention layers as data."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moezoo.core.spec.base import Part, default_kind, impossible
from moezoo.core.spec.norms import LayerNormSpec, NormSpec, RMSNormSpec
from moezoo.core.spec.positions import PositionSpec, RoPESpec


class TemperatureTuningSpec(Part):
    """Queries of late positions grow: `1 + scale * ln(floor((t + first) / floor_length) + 1)` times query t.

    `first`: what the first token counts as. Source: Nakanishi 2025, arXiv 2501.19399 (scalable softmax), in the form of
    Llama-4; Mistral 4 counts from 0.
    """

    floor_length: PositiveInt = 8192
    scale: PositiveFloat = 0.1
    first: Annotated[int, Field(ge=0, le=1)] = 1


class GroupedQueryAttentionSpec(Part):
    """Causal attention whose N query heads share M key/value heads. Source: Ainslie et al. 2023, arXiv 2305.13245.

    M = N is multi-head attention, M = 1 is multi-query attention. `qk_norm` normalizes queries and keys (Henry et al.
    2020, arXiv 2010.04245, with RMSNorm): each `head`, with a scale that all heads share, or the whole `projection`
    (OLMoE), before the rotation or after it (Hunyuan, Llama-4). What a query may look at: `window` the last so many
    tokens, itself included (Beltagy et al. 2020, arXiv 2004.05150); `chunk` only tokens of its own chunk of so many
    (Llama-4). `sinks`: each head has a learned logit that takes part in the softmax and carries no value (gpt-oss; Xiao
    et al. 2023, arXiv 2309.17453). `gate`: the heads' output times a sigmoid of a projection of the layer's input, one
    number for each head or for each feature (Qiu et al. 2025, arXiv 2505.06708). `softcap`: scores become `softcap *
    tanh(score / softcap)` (Gemma 2, arXiv 2408.00118). `scale` multiplies the scores; null is `1 / sqrt(head_dim)`.
    `clip`: queries and keys, after a norm before the rotation, and values are cut to [-clip, clip] (MPT, DBRX, OLMoE).
    Values are `value_head_dim` wide (null: as keys are) and multiplied by `value_multiplier` (MiMo-V2); `value_norm`
    normalizes each head of them; with `values_from_keys` they have no projection of their own and are the keys as
    projected, before any norm and rotation (both: Gemma 4). `value_residual`: values are mixed with those of the
    model's first layer, `(1 - mix) * own + mix * first`, mix learned, 0.5 at first (Zhou et al. 2024, arXiv
    2410.17897). `keys_of_layer`: keys and values are those of that earlier layer, counted from 0 with repeats written
    out; this one has none of its own, nor a cache (Gemma 3n, 4; Brandon et al. 2024, arXiv 2405.12981).
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
    softcap: PositiveFloat | None = None
    scale: PositiveFloat | None = None
    temperature_tuning: TemperatureTuningSpec | None = None
    value_norm: NormSpec | None = None
    value_multiplier: PositiveFloat = 1.0
    values_from_keys: bool = False
    value_residual: bool = False
    keys_of_layer: NonNegativeInt | None = None

    @property
    def value_dim(self) -> int:
        """Width of a head's values."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @model_validator(mode="after")
    def _sizes(self) -> "GroupedQueryAttentionSpec":
        if self.num_heads % self.num_kv_heads:
            raise impossible(
                "num_heads",
                f"is {self.num_heads}, which num_kv_heads = {self.num_kv_heads} does not divide",
                "Use a multiple of num_kv_heads",
            )
        if isinstance(self.position, RoPESpec):
            self.position.check(self.head_dim, "head_dim")
        if self.qk_norm is None and (self.qk_norm_over != "head" or self.qk_norm_after_rotation):
            raise impossible(
                "qk_norm", "is null, but how it is done is given", "Add qk_norm: {}, or leave the rest out"
            )
        if self.window is not None and self.chunk is not None:
            raise impossible("chunk", f"is {self.chunk}, but window is {self.window} too", "Give one of the two")
        if self.values_from_keys and self.value_dim != self.head_dim:
            raise impossible(
                "value_head_dim",
                f"is {self.value_head_dim}, but values_from_keys takes keys of head_dim = {self.head_dim} for values",
                "Leave one of the two out",
            )
        own = {
            "value_norm": self.value_norm is not None,
            "value_multiplier": self.value_multiplier != 1,
            "values_from_keys": self.values_from_keys,
            "value_residual": self.value_residual,
        }
        for name, given in own.items():
            if given and self.keys_of_layer is not None:
                raise impossible(
                    name,
                    f"is given, but with keys_of_layer = {self.keys_of_layer} the values are that layer's",
                    "Leave one of the two out",
                )
        return self


class IndexerSpec(Part):
    """Which `top_k` earlier tokens a query attends to, by a small attention of its own (DeepSeek sparse attention).

    `index(t, s) = sum over index heads of w_h(t) * relu(q_h(t) . k(s))`; the query attends to the `top_k` causal
    positions of the highest index (to all of them where there are fewer). The choice has no gradient; the indexer is
    trained by `loss_coefficient` times the KL divergence of its softmax from the attention's mean distribution over
    the chosen positions. The key, one for all index heads, is normalized by `key_norm`; of queries and key, the first
    `rope_head_dim` features are rotated as the attention's are, but with pairs by `layout` (DeepSeek-V3.2 splits
    halves here and interleaves there; GLM-5 interleaves both). Source: DeepSeek-AI 2025 (DeepSeek-V3.2-Exp), eq. 1, 2
    and 4.
    """

    num_heads: PositiveInt
    head_dim: PositiveInt
    top_k: PositiveInt
    layout: Literal["half_split", "interleaved"] = "half_split"
    key_norm: NormSpec = LayerNormSpec(epsilon=1e-6)
    loss_coefficient: Annotated[float, Field(ge=0)] = 1.0


class LatentAttentionSpec(Part):
    """Multi-head latent attention: keys and values of all heads from one vector of width Z a token, which is all that
    the cache holds beside one rotated key. Source: DeepSeek-AI 2024 (DeepSeek-V2), arXiv 2405.04434, section 2.1.

    `query_latent_dim`: queries pass through a low rank too, or not (null). Each head's query and key are `head_dim`
    features without position and `rope_head_dim` rotated ones; its value has `value_head_dim`. `bias`: the projections
    out of the model's width and back into it have one, `w_query` excepted (`attention_bias` of DeepSeek-V3).
    `latent_multiplier` is a constant on the normalized latent (LongCat-Flash); one on queries is part of `scale`, which
    multiplies the scores; null is `1 / sqrt(head_dim + rope_head_dim)`, and YaRN's mscale multiplies either.
    """

    kind: Literal["latent"] = "latent"
    num_heads: PositiveInt
    head_dim: PositiveInt
    rope_head_dim: PositiveInt
    value_head_dim: PositiveInt
    latent_dim: PositiveInt
    query_latent_dim: PositiveInt | None = None
    position: PositionSpec = RoPESpec(layout="interleaved")
    norm: NormSpec = RMSNormSpec()
    bias: bool = False
    latent_multiplier: PositiveFloat = 1.0
    scale: PositiveFloat | None = None
    temperature_tuning: TemperatureTuningSpec | None = None
    indexer: IndexerSpec | None = None

    @model_validator(mode="after")
    def _sizes(self) -> "LatentAttentionSpec":
        if isinstance(self.position, RoPESpec):
            self.position.check(self.rope_head_dim, "rope_head_dim")
            if self.indexer is not None and self.indexer.head_dim < self.rope_head_dim:
                raise impossible(
                    "indexer.head_dim",
                    f"is {self.indexer.head_dim}, less than rope_head_dim = {self.rope_head_dim}, which it rotates",
                    "Use a larger one",
                )
        return self


class GatedDeltaAttentionSpec(Part):
    """Linear attention with a recurrent state of fixed size: Gated DeltaNet. Source: Yang et al. 2024, 2412.06464.

    Each of `num_value_heads` heads keeps a matrix of `key_head_dim x value_head_dim` that maps keys to values; a token
    decays it, replaces what it says about its key, and reads it with its query. Queries and keys are shared by groups
    of value heads (Qwen3-Next). Causal convolutions of `conv_width` tokens, the token itself included, stand behind the
    projections of queries, keys and values. `norm` normalizes what each head reads, before an output gate.
    """

    kind: Literal["gated_delta"] = "gated_delta"
    num_key_heads: PositiveInt
    num_value_heads: PositiveInt
    key_head_dim: PositiveInt
    value_head_dim: PositiveInt
    conv_width: Annotated[int, Field(ge=2)] = 4
    norm: NormSpec = RMSNormSpec()

    @model_validator(mode="after")
    def _sizes(self) -> "GatedDeltaAttentionSpec":
        if self.num_value_heads % self.num_key_heads:
            raise impossible(
                "num_value_heads",
                f"is {self.num_value_heads}, which num_key_heads = {self.num_key_heads} does not divide",
                "Use a multiple of num_key_heads",
            )
        return self


class ShortConvolutionSpec(Part):
    """No attention: each feature sees its own last `conv_width` tokens, between two gates.

    The layer's input is projected to two gates and a value; value times input gate goes through a causal convolution of
    each feature with itself, the token itself included, then times the output gate, and is projected back. As many
    features as the model is wide. `bias`: projections and convolution have biases. Source: Amini et al. 2025, arXiv
    2511.23404 (LFM2).
    """

    kind: Literal["short_convolution"] = "short_convolution"
    conv_width: Annotated[int, Field(ge=2)] = 3
    bias: bool = False


AttentionSpec = Annotated[
    GroupedQueryAttentionSpec | LatentAttentionSpec | GatedDeltaAttentionSpec | ShortConvolutionSpec,
    Field(discriminator="kind"),
    default_kind("grouped_query"),
]
