"""Attention to a window and to compressed entries, as data."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from moezoo.core.spec.base import Part, impossible
from moezoo.core.spec.indexer import IndexerSpec
from moezoo.core.spec.norms import RMSNormSpec
from moezoo.core.spec.positions import RoPESpec


class CompressionSpec(Part):
    """Compressed entries of an attention: each complete group of `ratio` tokens becomes one more key, and value.

    The tokens of a group are projected, and summed with weights: for each feature, a softmax over the group of another
    projection, plus a learned bias of the token's place in it. The sum is normalized, and rotated by the position of
    the group's first token. A query attends to the entries of all groups that are complete by then (heavily compressed
    attention), or, with an `indexer`, to the `top_k` of the highest index, whose keys are compressed in the same way,
    at the indexer's width (compressed sparse attention). With `overlap`, an entry also draws on the group before its
    own, whose tokens have a second pair of projections for that; the softmax is over both groups. Source: DeepSeek-AI
    2026 (DeepSeek-V4), sections 2.3.1 and 2.3.2; transformers 5.23, `deepseek_v4`.
    """

    ratio: Annotated[int, Field(ge=2)]
    overlap: bool = False
    indexer: IndexerSpec | None = None

    @model_validator(mode="after")
    def _entries(self) -> "CompressionSpec":
        if self.indexer is not None and self.indexer.pool_size is not None:
            raise impossible(
                "indexer.pool_size",
                f"is {self.indexer.pool_size}, but the indexer chooses among entries of {self.ratio} tokens",
                "Remove it",
            )
        return self

    @property
    def width(self) -> int:
        """Number of tokens that an entry draws on."""
        return 2 * self.ratio if self.overlap else self.ratio


class CompressedAttentionSpec(Part):
    """Attention to the last `window` tokens and to compressed entries of earlier ones, by one shared key, also value.

    Queries are projected from a normalized latent of width `query_latent_dim`, and normalized per head, without scale.
    All heads share one key per token, which is also its value; it is normalized by `norm`. The last `rope_head_dim` of
    the `head_dim` features of queries and keys are rotated, and so are those of the heads' output, by the negative
    position of the query: what a value contributes depends on its distance alone. Each head has an attention sink.
    The output projection has two steps: each of `output_groups` groups of consecutive heads is projected to
    `output_latent_dim` features, and these to the model's width. `compression`: null leaves the window alone. Source:
    DeepSeek-AI 2026 (DeepSeek-V4), section 2.3; transformers 5.23, `deepseek_v4`.
    """

    kind: Literal["compressed"] = "compressed"
    num_heads: PositiveInt
    head_dim: PositiveInt
    rope_head_dim: PositiveInt
    query_latent_dim: PositiveInt
    output_groups: PositiveInt
    output_latent_dim: PositiveInt
    window: PositiveInt
    position: RoPESpec = RoPESpec(layout="interleaved")
    norm: RMSNormSpec = RMSNormSpec()
    compression: CompressionSpec | None = None

    @model_validator(mode="after")
    def _sizes(self) -> "CompressedAttentionSpec":
        self.position.check(self.rope_head_dim, "rope_head_dim")
        if self.num_heads % self.output_groups:
            raise impossible(
                "num_heads",
                f"is {self.num_heads}, which is not divisible by output_groups = {self.output_groups}",
                "Use a multiple of output_groups",
            )
        if self.rope_head_dim > self.head_dim:
            raise impossible(
                "rope_head_dim",
                f"is {self.rope_head_dim}, but a head has head_dim = {self.head_dim} features",
                f"Use at most {self.head_dim}",
            )
        indexer = None if self.compression is None else self.compression.indexer
        if indexer is not None and indexer.head_dim < self.rope_head_dim:
            raise impossible(
                "compression.indexer.head_dim",
                f"is {indexer.head_dim}, but it rotates rope_head_dim = {self.rope_head_dim} features",
                f"Use at least {self.rope_head_dim}",
            )
        return self
