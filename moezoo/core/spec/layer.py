"""Layers as data."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from pydantic import PositiveFloat, PositiveInt, ValidationError, model_validator

from moezoo.core.spec.attention import AttentionSpec, GroupedQueryAttentionSpec, LatentAttentionSpec, NoAttentionSpec
from moezoo.core.spec.base import Part, impossible
from moezoo.core.spec.compressed_attention import CompressedAttentionSpec, CompressionSpec
from moezoo.core.spec.convolution import ResidualConvolutionSpec
from moezoo.core.spec.feed_forward import FeedForwardSpec, PlainFeedForwardSpec
from moezoo.core.spec.indexer import IndexerSpec
from moezoo.core.spec.losses import AuxiliaryLossSpec
from moezoo.core.spec.moe import MoESpec
from moezoo.core.spec.ngram_embeddings import NGramEmbeddingsSpec
from moezoo.core.spec.routing import RouterSpec
from moezoo.core.spec.shared_experts import ParallelFeedForwardSpec


class BlockFactorsSpec(Part):
    """Constants of what a block f adds: the stream x becomes `stream * x + block * f`."""

    stream: PositiveFloat = 1.0
    block: PositiveFloat = 1.0


class HeadRouterSpec(Part):
    """Router over attention heads (mixture of attention heads): of the G query heads per key/value head, top_k compute.

    An expert is one query head of each key/value head, with its query and output projections; keys and values are
    shared. Each token's router chooses experts for it, and their outputs are weighted. Source: Zhang et al. 2022 (MoA),
    arXiv 2210.05144; Shen et al. 2024 (JetMoE), arXiv 2404.07413.
    """

    router: RouterSpec
    losses: tuple[AuxiliaryLossSpec, ...] = ()


class LayerSpec(Part):
    """One transformer layer, or `repeat` identical ones: attention, then a dense feed-forward or a MoE layer.

    `norm_placement` is the norm placement around each block f: `pre` is `x + f(norm(x))` (Xiong et al. 2020, arXiv
    2002.04745); `post` is `x + norm(f(x))` (OLMo 2, arXiv 2501.00656); `sandwich` is `x + norm(f(norm(x)))` (Gemma 2,
    arXiv 2408.00118); `parallel` is `x + attention(norm(x)) + feed_forward(norm(x))` with one norm (GPT-J; Chowdhery et
    al. 2022, arXiv 2204.02311); `stream` normalizes the stream itself, `n + f(n)` with `n = norm(x)` (the transformer
    of 2017, whose norm after a block is that before the next; with `attention_factors` and `feed_forward_factors`,
    DeepNorm: Wang et al. 2022, arXiv 2203.00555; MiniMax-01, arXiv 2501.08313). `shortcut` (ScMoE): the layer has both
    a dense feed-forward and a MoE layer with the same input; the MoE output is added to the residual stream only at the
    end of the next layer, so it can be computed in parallel with that layer (Cai et al. 2024, arXiv 2404.05019;
    LongCat-Flash, arXiv 2509.01322, whose layer is two of these). `output_scale`: the residual stream that leaves the
    layer is multiplied by a scalar that is not trained, 1 unless loaded from a checkpoint (Gemma 4). A layer may have
    one block only: `attention: {kind: none}` leaves a feed-forward, and `mixer_only` means that there is none
    (Nemotron-H). `attention_norm_gate`, `feed_forward_norm_gate`: rank of a gate on the normalized input y of that
    block, `y * sigmoid(silu(y w_down) w_up)` (A.X-K2); null: none. `ngram_embeddings` are added to the residual stream
    before the layer. `output_convolution`: a short convolution of what each block returns, before it is normalized or
    added; `feed_forward_scale`: the dense feed-forward's output is multiplied by a learned number that starts at 1
    (both: Inkling). `head_router`: a router over attention heads. `separate_inputs`: queries (with gates and sinks),
    keys and values are projected from separate reads of the residual stream, each with its own norm (Inkling 2).
    """

    repeat: PositiveInt = 1
    norm_placement: Literal["pre", "post", "sandwich", "parallel", "stream"] = "pre"
    attention: AttentionSpec
    feed_forward: FeedForwardSpec | None = None
    moe: MoESpec | None = None
    shortcut: bool = False
    output_scale: bool = False
    mixer_only: bool = False
    head_router: HeadRouterSpec | None = None
    attention_factors: BlockFactorsSpec = BlockFactorsSpec()
    feed_forward_factors: BlockFactorsSpec = BlockFactorsSpec()
    attention_norm_gate: PositiveInt | None = None
    feed_forward_norm_gate: PositiveInt | None = None
    ngram_embeddings: NGramEmbeddingsSpec | None = None
    output_convolution: ResidualConvolutionSpec | None = None
    feed_forward_scale: bool = False
    separate_inputs: bool = False

    @property
    def has_mixer(self) -> bool:
        """False if the layer is a feed-forward alone."""
        return not isinstance(self.attention, NoAttentionSpec)

    @property
    def indexer(self) -> IndexerSpec | None:
        """The indexer of the layer's attention, if it has one of its own."""
        match self.attention:
            case LatentAttentionSpec(indexer=indexer):
                return indexer
            case CompressedAttentionSpec(compression=CompressionSpec(indexer=indexer)):
                return indexer
            case _:
                return None

    @property
    def routed(self) -> MoESpec | None:
        """The MoE that the layer's router chooses from: its own, or its attention heads as experts."""
        attention = self.attention
        if self.head_router is None or not isinstance(attention, GroupedQueryAttentionSpec):
            return self.moe
        return MoESpec(
            num_experts=attention.num_heads // attention.num_kv_heads,
            router=self.head_router.router,
            experts=PlainFeedForwardSpec(kind="relu", hidden_dim=attention.num_kv_heads * attention.head_dim),
            losses=self.head_router.losses,
        )

    @property
    def head_share(self) -> Fraction:
        """Share of the attention's query heads that compute a token."""
        routed = None if self.head_router is None else self.routed
        return Fraction(1) if routed is None else Fraction(routed.router.top_k, routed.num_experts)

    @model_validator(mode="after")
    def _heads(self) -> "LayerSpec":
        if self.head_router is None:
            return self
        if not self.mixer_only:
            raise impossible(
                "head_router",
                "is set, but a layer has one router",
                "Use mixer_only: true, and a layer with attention: {kind: none} for the feed-forward",
            )
        attention, router = self.attention, self.head_router.router
        if not isinstance(attention, GroupedQueryAttentionSpec) or attention.sinks:
            raise impossible(
                "head_router", "is set, which needs grouped_query attention without sinks", "Remove one of the two"
            )
        if router.apply_to == "input" or (router.jitter is not None and router.jitter.of == "mixture"):
            raise impossible(
                "head_router.router",
                "has apply_to: input or jitter {of: mixture}, which need experts with an input of their own",
                "Use apply_to: output, and jitter {of: input} or {of: logits}",
            )
        try:
            _ = self.routed
        except ValidationError as error:
            found = error.errors()[0].get("ctx", {})
            raise impossible(f"head_router.{found['path']}", found["problem"], found["advice"]) from None
        return self

    @model_validator(mode="after")
    def _one_feed_forward(self) -> "LayerSpec":
        if self.mixer_only or not self.has_mixer:
            return self._one_block()
        if self.shortcut:
            if self.feed_forward is None or self.moe is None:
                raise impossible(
                    "shortcut",
                    f"is true, but the layer has no {'moe' if self.moe is None else 'feed_forward'}",
                    "Set both feed_forward (dense) and moe",
                )
            if self.norm_placement != "pre":
                raise impossible(
                    "shortcut",
                    f"is true, but norm_placement is {self.norm_placement}",
                    "Use norm_placement: pre",
                )
        elif (self.feed_forward is None) == (self.moe is None):
            both = "both feed_forward and moe" if self.moe is not None else "neither feed_forward nor moe"
            raise impossible(
                "", f"has {both}", "Set exactly one of feed_forward (dense) and moe, or both and shortcut: true"
            )
        shared = None if self.moe is None else self.moe.shared
        if isinstance(shared, ParallelFeedForwardSpec) and self.norm_placement in ("post", "parallel"):
            raise impossible(
                "moe.shared",
                f"is parallel, which needs a norm before the MoE, but norm_placement {self.norm_placement} has none",
                "Use norm_placement: pre or sandwich, or shared: {kind: sum, hidden_dim: ...}",
            )
        return self

    @model_validator(mode="after")
    def _outputs(self) -> "LayerSpec":
        if self.output_convolution is not None and (self.shortcut or self.output_convolution.dynamic):
            other = "the layer has a shortcut" if self.shortcut else "it is dynamic, and has no heads"
            raise impossible("output_convolution", f"is set, but {other}", "Remove one of the two")
        match self.attention:
            case GroupedQueryAttentionSpec(keys_of_layer=None, projects_values=True):
                has_inputs = self.norm_placement in ("pre", "sandwich")
            case _:
                has_inputs = False
        if self.separate_inputs and not has_inputs:
            raise impossible(
                "separate_inputs",
                "is true, but there are no queries, keys and values with a projection and a norm before it each",
                "Use grouped_query attention with norm_placement: pre",
            )
        if self.feed_forward_scale and self.feed_forward is None:
            raise impossible("feed_forward_scale", "is true, but there is no dense feed_forward", "Remove it")
        return self

    @model_validator(mode="after")
    def _gates_and_factors(self) -> "LayerSpec":
        gates = {
            "attention_norm_gate": (self.attention_norm_gate, self.has_mixer, ("post",)),
            "feed_forward_norm_gate": (self.feed_forward_norm_gate, not self.mixer_only, ("post", "parallel")),
        }
        for name, (rank, has_block, without) in gates.items():
            if rank is not None and (not has_block or self.norm_placement in without):
                why = (
                    f"norm_placement {self.norm_placement} has no norm before it" if has_block else "there is no block"
                )
                raise impossible(name, f"is {rank}, but {why}", "Remove it, or use norm_placement: pre")
        for name, factors, has_block in (
            ("attention_factors", self.attention_factors, self.has_mixer),
            ("feed_forward_factors", self.feed_forward_factors, not self.mixer_only),
        ):
            if factors != BlockFactorsSpec() and not has_block:
                raise impossible(name, "is set, but there is no block", "Remove it")
        return self

    def _one_block(self) -> "LayerSpec":
        """Check a layer that has no feed-forward, or nothing but one."""
        alone = "mixer_only is true" if self.mixer_only else "attention is none"
        if self.mixer_only and not self.has_mixer:
            raise impossible("mixer_only", "is true, but attention is none", "Remove one of the two")
        if self.mixer_only and (self.feed_forward is not None or self.moe is not None):
            raise impossible("mixer_only", "is true, but the layer has a feed-forward", "Remove one of the two")
        if not self.mixer_only and (self.feed_forward is None) == (self.moe is None):
            raise impossible("attention", "is none, which leaves one block", "Set exactly one of feed_forward and moe")
        if self.shortcut or self.norm_placement == "parallel":
            needs = "shortcut" if self.shortcut else "norm_placement"
            value = "true" if self.shortcut else "parallel"
            raise impossible(needs, f"is {value}, but {alone}, and the layer has one block", "Use both blocks")
        return self


def check_ngram_embeddings(layers: Sequence[LayerSpec], vocab_size: int | None) -> None:
    """Raise if n-gram embeddings share their hash functions, or end contexts behind a token that there is not."""
    places: dict[int, int] = {}
    for place, layer in enumerate(layers):
        if layer.ngram_embeddings is None:
            continue
        path, index = f"layers[{place}].ngram_embeddings", layer.ngram_embeddings.index
        if index in places or layer.repeat > 1:
            where = f"layers[{places[index]}]" if index in places else f"{layer.repeat} layers, by repeat"
            raise impossible(f"{path}.index", f"is {index}, as in {where}", "Number them from 0 on, in order")
        places[index] = place
        token = layer.ngram_embeddings.reset_token
        if vocab_size is not None and token >= vocab_size:
            raise impossible(f"{path}.reset_token", f"is {token}, but vocab_size is {vocab_size}", "Use a smaller one")


def with_repeats(layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """Merge equal consecutive layers into one, whose `repeat` is the sum of theirs."""
    found: list[tuple[LayerSpec, int]] = []
    for layer in layers:
        single = layer if layer.repeat == 1 else layer.model_copy(update={"repeat": 1})
        if found and (single is found[-1][0] or single == found[-1][0]):
            found[-1] = (single, found[-1][1] + layer.repeat)
        else:
            found.append((single, layer.repeat))
    return tuple(single if repeat == 1 else single.model_copy(update={"repeat": repeat}) for single, repeat in found)
