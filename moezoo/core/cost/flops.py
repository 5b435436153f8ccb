"""Floating-point operations per token, by formula. Writing: writings/cost.md."""

from dataclasses import dataclass
from fractions import Fraction
from typing import assert_never

from moezoo.core.cost.parameters import active_experts
from moezoo.core.parameters import ROLES, Role, parameter_table
from moezoo.core.spec import (
    AttentionSpec,
    GatedDeltaAttentionSpec,
    GroupedQueryAttentionSpec,
    LatentAttentionSpec,
    ModelSpec,
    ShortConvolutionSpec,
)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token by part; a part that the model lacks has 0."""

    attention_projections: int
    attention_scores: int
    feed_forward: int
    router: int
    routed_experts: int
    shared_experts: int
    head: int

    @property
    def by_part(self) -> dict[str, int]:
        """Name for people -> operations, in the order of the forward pass."""
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
    """Useful operations of one token, 2 per multiply-add, averaged over the T positions of a sequence.

    A matrix costs 2 a parameter: of attention, feed-forward, router, shared experts and head, and of the experts that a
    token uses (`active_experts`). For SwiGLU attention with N query and M key/value heads that is `2 D H (2 N + 2 M)`,
    `6 D F` and `2 D E`. Beside them, per layer:

    - scores of softmax attention: `2 (query width + value width) * visible positions` for each of the N heads: query
      times key and probability times value; `(T + 1) / 2` positions on average, fewer with a window or a chunk, and at
      most `top_k` of them with an indexer, whose own scores are `2 width * visible` for each of its heads;
    - the recurrence of linear attention: three products of a vector with the state, `6 H F` for each value head.

    A short convolution has no scores; its filter, as any matrix, costs 2 a parameter.

    Looking up an embedding row is free; norms, biases, rotations, softmax and the combine are left out, as they cost a
    few operations an element. Training is 3 times forward: the backward pass makes two products for each one. What a
    backend computes beyond this (masked scores, padding) is overhead, not counted here.

    Source: Kaplan et al. 2020, arXiv 2001.08361, table 1 (2 a multiply-add, backward twice forward); attention scores
    and the head counted as Hoffmann et al. 2022, arXiv 2203.15556, appendix F.
    Differs: causal scores are counted at their average length, half of Hoffmann's, who also counts the embedding as a
    product.
    """
    products: dict[Role, Fraction] = dict.fromkeys(ROLES, Fraction(0))
    layers = spec.all_layers
    for row in parameter_table(spec):
        if not row.decay:
            continue  # biases, scales and state multiply nothing
        used = Fraction(2 * row.size)
        if row.role == "routed experts" and ".experts." in row.name:
            moe = layers[int(row.name.split(".")[1])].moe
            assert moe is not None
            used *= active_experts(moe) / moe.num_experts
        products[row.role] += used
    scores = sum((_score_flops(layer.attention, sequence_length) for layer in layers), Fraction(0))
    times = 3 if training else 1
    return Flops(
        attention_projections=round(times * products["attention"]),
        attention_scores=round(times * scores),
        feed_forward=round(times * products["feed-forward"]),
        router=round(times * products["router"]),
        routed_experts=round(times * products["routed experts"]),
        shared_experts=round(times * products["shared experts"]),
        head=times * 2 * spec.embed_dim * spec.vocab,
    )


def _score_flops(attention: AttentionSpec, length: int) -> Fraction:
    match attention:
        case GroupedQueryAttentionSpec(num_heads=heads, head_dim=width, value_dim=value_width):
            most = attention.window if attention.chunk is None else attention.chunk
            return 2 * heads * (width + value_width) * _visible(length, most, in_chunks=attention.chunk is not None)
        case LatentAttentionSpec(num_heads=heads, indexer=indexer):
            width = attention.head_dim + attention.rope_head_dim + attention.value_head_dim
            chosen = _visible(length, None if indexer is None else indexer.top_k)
            index = (
                Fraction(0) if indexer is None else 2 * indexer.num_heads * indexer.head_dim * _visible(length, None)
            )
            return 2 * heads * width * chosen + index
        case GatedDeltaAttentionSpec(num_value_heads=heads):
            return Fraction(6 * heads * attention.key_head_dim * attention.value_head_dim)
        case ShortConvolutionSpec():
            return Fraction(0)
        case _:
            assert_never(attention)


def _visible(length: int, most: int | None, *, in_chunks: bool = False) -> Fraction:
    """Mean number of positions that a token sees, itself included: `(T + 1) / 2`, at most `most` each, or in chunks."""
    if most is None or most >= length:
        return Fraction(length + 1, 2)
    if in_chunks:
        chunks, rest = divmod(length, most)
        return Fraction(chunks * most * (most + 1) + rest * (rest + 1), 2 * length)
    return Fraction(most * (most + 1) + 2 * most * (length - most), 2 * length)
