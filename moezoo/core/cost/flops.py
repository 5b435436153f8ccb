"""FLOPs per token, by formula. Writing: writings/cost.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import assert_never

from moezoo.core.cost.parameters import used_parameters
from moezoo.core.parameters import ROLES, Role, parameter_table
from moezoo.core.spec import (
    AttentionSpec,
    CompressedAttentionSpec,
    GatedDeltaAttentionSpec,
    GroupedQueryAttentionSpec,
    LatentAttentionSpec,
    LayerSpec,
    LightningAttentionSpec,
    Mamba2Spec,
    MambaSpec,
    ModelSpec,
    NoAttentionSpec,
    ShortConvolutionSpec,
)


@dataclass(frozen=True)
class Flops:
    """FLOPs per token by part of the model; 0 for a part that the model does not have."""

    attention_projections: int
    attention_scores: int
    feed_forward: int
    router: int
    routed_experts: int
    shared_experts: int
    head: int

    @property
    def by_part(self) -> dict[str, int]:
        """FLOPs by label, in the order of the forward pass."""
        return {
            "attention projections": self.attention_projections,
            "attention scores": self.attention_scores,
            "feed-forward": self.feed_forward,
            "router": self.router,
            "routed experts": self.routed_experts,
            "shared experts": self.shared_experts,
            "head": self.head,
        }

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(self.by_part.values())


def flops_per_token(spec: ModelSpec, sequence_length: int, training: bool) -> Flops:
    """Return the model FLOPs of one token, 2 per multiply-add, averaged over the T positions of a sequence.

    Matrices cost 2 FLOPs per parameter: those of attention, feed-forward, router, shared experts and head, and of the
    routed experts that a token uses (`active_experts`). For attention with N query and M key/value heads, SwiGLU and a
    router, that is `2 D H (2 N + 2 M)`, `6 D F` and `2 D E`. In addition, per layer:

    - scores of softmax attention: `2 (query width + value width) * visible positions` for each of the N heads: query
      times key and probability times value; `(T + 1) / 2` positions on average, fewer with a window or a chunk, and at
      most `top_k` of them with an indexer, whose own scores cost `2 width * visible` for each of its heads; compressed
      entries count as positions, one for each complete group; of blocks, at most `(top_k + 1) block_size - 1`, and a
      score for each block; of a dynamic mask at most `keep`, of whose choice only the projection counts; relative
      position logits add `2 dim` for each head and visible position in their extent;
    - the recurrence of linear attention: three products of a vector with the state, `6 H F` for each value head; of
      Mamba-2 two, `4 H F`; and of Mamba-1 two, `4 Z` for each channel.

    A short convolution has no scores; its filter costs 2 FLOPs per parameter, as a matrix does. The low-rank gate of a
    norm counts as a feed-forward, and so do the maps of hyper-connections; the sums of streams themselves, `2 J (J + 2)
    D` for each block that mixes J, are not counted: with J = 4, a fourth of their map.

    An embedding lookup is free. Norms, biases, RoPE, softmax and the combine are not counted: they cost a few
    operations per element. Training costs 3 times forward, since the backward pass needs two products for each one.
    Overhead of a backend (masked scores, padding) is not counted.

    Source: Kaplan et al. 2020, arXiv 2001.08361, table 1 (2 per multiply-add, backward twice forward); attention scores
    and the head counted as in Hoffmann et al. 2022, arXiv 2203.15556, appendix F.
    Differs: causal scores are counted at their average length, half of Hoffmann's, who also counts the embedding as a
    product.
    """
    products: dict[Role, Fraction] = dict.fromkeys(ROLES, Fraction(0))
    layers = spec.all_layers
    for row in parameter_table(spec):
        if not row.decay:
            continue  # biases, scales and state are not matrices
        products[row.role] += 2 * used_parameters(row, layers)
    scores = sum(
        (layer.head_share * _score_flops(layer.attention, sequence_length, layers) for layer in layers), Fraction(0)
    )
    times = 3 if training else 1
    return Flops(
        attention_projections=round(times * products["attention"]),
        attention_scores=round(times * scores),
        feed_forward=round(times * (products["feed-forward"] + products["norms"])),
        router=round(times * products["router"]),
        routed_experts=round(times * products["routed experts"]),
        shared_experts=round(times * products["shared experts"]),
        head=times * 2 * spec.embed_dim * spec.vocab,
    )


def _score_flops(attention: AttentionSpec, length: int, layers: Sequence[LayerSpec]) -> Fraction:
    match attention:
        case GroupedQueryAttentionSpec(num_heads=heads, head_dim=width, value_dim=value_width):
            most = most_visible(attention)
            index, indexer = Fraction(0), attention.indexer
            if indexer is not None:
                index = 2 * indexer.num_heads * indexer.head_dim * mean_visible(length, None)
                index /= indexer.block_size if indexer.pooled == "keys" else 1
            scores = (
                2 * heads * (width + value_width) * mean_visible(length, most, in_chunks=attention.chunk is not None)
            )
            if attention.relative is not None:
                near = min(attention.relative.extent, length if most is None else most)
                index += 2 * heads * attention.relative.dim * mean_visible(length, near)
            return scores + index
        case LatentAttentionSpec(num_heads=heads, indexer=indexer):
            width = attention.head_dim + attention.rope_head_dim + attention.value_head_dim
            chosen = mean_visible(length, _chosen(attention, layers))
            index = Fraction(0)
            if indexer is not None:
                index = 2 * indexer.num_heads * indexer.head_dim * mean_visible(length, None)
                index /= indexer.pool_size or 1
            return 2 * heads * width * chosen + index
        case CompressedAttentionSpec():
            return _compressed_score_flops(attention, length)
        case GatedDeltaAttentionSpec(num_value_heads=heads):
            return Fraction(6 * heads * attention.key_head_dim * attention.value_head_dim)
        case Mamba2Spec(num_heads=heads):
            return Fraction(4 * heads * attention.state_dim * attention.head_dim)
        case LightningAttentionSpec(num_heads=heads, head_dim=width):
            return Fraction(4 * heads * width * width)
        case MambaSpec():
            return Fraction(4 * attention.inner_dim * attention.state_dim)
        case ShortConvolutionSpec() | NoAttentionSpec():
            return Fraction(0)
        case _:
            assert_never(attention)


def most_visible(attention: GroupedQueryAttentionSpec) -> int | None:
    """Return how many positions a query attends to at most; None: all."""
    if (indexer := attention.indexer) is not None:
        behind = indexer.block_size - 1 if indexer.pooled == "keys" else 0  # the tokens after the last complete block
        return indexer.top_k * indexer.block_size + behind
    if attention.chunk is not None:
        return attention.chunk
    limits = (attention.window, None if attention.dynamic_mask is None else attention.dynamic_mask.keep)
    return min((limit for limit in limits if limit is not None), default=None)


def _chosen(attention: LatentAttentionSpec, layers: Sequence[LayerSpec]) -> int | None:
    """Return how many positions a query attends to: of a window, or of an indexer, its own or another's; None: all."""
    if attention.indexer_of_layer is None:
        return attention.window if attention.indexer is None else attention.indexer.most_chosen
    other = layers[attention.indexer_of_layer].attention
    assert isinstance(other, LatentAttentionSpec)
    return _chosen(other, layers)


def _compressed_score_flops(attention: CompressedAttentionSpec, length: int) -> Fraction:
    positions, index, compression = mean_visible(length, attention.window), Fraction(0), attention.compression
    if compression is not None:
        indexer = compression.indexer
        positions += _entries(length, compression.ratio, None if indexer is None else indexer.top_k)
        if indexer is not None:
            index = 2 * indexer.num_heads * indexer.head_dim * _entries(length, compression.ratio, None)
    return 4 * attention.num_heads * attention.head_dim * positions + index


def _entries(length: int, ratio: int, most: int | None) -> Fraction:
    """Return the mean number of complete groups of `ratio` tokens that a query sees, at most `most` of them."""
    number = length // ratio if most is None else min(most, length // ratio)
    total = ratio * number * (number - 1) // 2 + number * (length - ratio * number + 1)
    return Fraction(total, length)


def mean_visible(length: int, most: int | None, *, in_chunks: bool = False) -> Fraction:
    """Return the mean number of visible positions, including the token's own: `(T + 1) / 2` without a limit `most`."""
    if most is None or most >= length:
        return Fraction(length + 1, 2)
    if in_chunks:
        chunks, rest = divmod(length, most)
        return Fraction(chunks * most * (most + 1) + rest * (rest + 1), 2 * length)
    return Fraction(most * (most + 1) + 2 * most * (length - most), 2 * length)
