"""Indexers of sparse attention as data."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from moezoo.core.spec.base import Part, impossible
from moezoo.core.spec.norms import LayerNormSpec, NormSpec, RMSNormSpec


class IndexerSpec(Part):
    """Lightning indexer of DeepSeek sparse attention: selects the `top_k` earlier tokens each query attends to.

    `index(t, s) = sum over index heads of w_h(t) * relu(q_h(t) . k(s))`; the query attends to the `top_k` causal
    positions with the highest index (to all of them if there are fewer). The selection has no gradient; the indexer is
    trained with `loss_coefficient` times the KL divergence of its softmax from the attention's mean distribution over
    the selected positions. The key, shared by all index heads, is normalized by `key_norm`; the first (or
    last: `rotated`, HY-V4) `rope_head_dim` features of queries and key are rotated like the attention's, but with pairs
    arranged by `layout` (DeepSeek-V3.2 uses half-split here and interleaved in the attention; GLM-5 interleaves both).
    Source: DeepSeek-AI 2025 (DeepSeek-V3.2-Exp), eq. 1, 2 and 4.

    With `pool_size` a query chooses complete pools of that many tokens, `top_k` tokens in all, and always attends to
    the tokens behind the last complete pool, its own among them. The key of a pool is the mean of its tokens' keys,
    weighted feature by feature with the softmax of a projection of these tokens and a learned bias by their place in
    the pool. The loss compares pools. Source: Z.ai 2026 (GLM-5.3; transformers 5.23, `Glm5NextTextIndexer`).
    """

    num_heads: PositiveInt
    head_dim: PositiveInt
    top_k: PositiveInt
    layout: Literal["half_split", "interleaved"] = "half_split"
    rotated: Literal["first", "last"] = "first"
    key_norm: NormSpec = LayerNormSpec(epsilon=1e-6)
    pool_size: PositiveInt | None = None
    loss_coefficient: Annotated[float, Field(ge=0)] = 1.0

    @property
    def cached_dim(self) -> int:
        """Numbers that a cache keeps of each token: its key, and if keys are pooled its weights there."""
        return self.head_dim if self.pool_size is None else 2 * self.head_dim

    @property
    def most_chosen(self) -> int:
        """Greatest number of tokens that a query attends to."""
        return self.top_k if self.pool_size is None else self.top_k + self.pool_size - 1

    @model_validator(mode="after")
    def _pools(self) -> "IndexerSpec":
        if self.pool_size is not None and self.top_k % self.pool_size:
            raise impossible(
                "top_k",
                f"is {self.top_k}, which is not divisible by pool_size = {self.pool_size}",
                "Use a multiple of pool_size",
            )
        return self


class DynamicMaskSpec(Part):
    """Dynamic mask: a bias for each key, by key/value head, and only the `keep` unmasked keys with the greatest one.

    The bias is computed from the values of the key's token and is added to its scores; it depends on no query. Ties go
    to the later token. Source: Shi et al. 2025, arXiv 2508.02124; in the form of Doge (transformers 5.23,
    `DogeAttention`).
    """

    keep: PositiveInt = 2048


class BlockIndexerSpec(Part):
    """Indexer of blocks: selects the `top_k` complete blocks of `block_size` earlier tokens that a query attends to.

    Tokens behind the last complete block, the query's own among them, are always attended to. A block has one key: the
    mean of its tokens' index keys, normalized by `norm`, and rotated like the attention's at the place of its first
    token. Its index is `sum over index heads of relu(q_h . key)`, of queries that are normalized and rotated too. The
    selection has no gradient, and nothing trains the indexer: the published code has no loss for it. Source: Qwen Team
    2026 (Qwen4; transformers 5.23, `Qwen4ExpTextQSAIndexer`), after DeepSeek-AI 2025 (DeepSeek-V3.2-Exp).

    With `pooled: scores` each token has a key, normalized and rotated at its own place; each index head selects for
    the query heads of one key/value head, and the index of a block is the largest `q . key` of those of its tokens that
    the query may see. The query's own block takes part, and is selected first, as the last of `local_blocks`. Source:
    MiniMax 2026 (MiniMax-M3; transformers 5.23, `MiniMaxM3VLIndexer`).
    """

    num_heads: PositiveInt
    head_dim: PositiveInt
    top_k: PositiveInt
    block_size: PositiveInt
    norm: NormSpec = RMSNormSpec()
    pooled: Literal["keys", "scores"] = "keys"
    local_blocks: NonNegativeInt = 0

    @model_validator(mode="after")
    def _local(self) -> "BlockIndexerSpec":
        if self.local_blocks and self.pooled == "keys":
            raise impossible(
                "local_blocks",
                "is set, but with pooled: keys the tokens behind the last complete block are always attended to",
                "Use pooled: scores, or remove local_blocks",
            )
        if self.local_blocks > self.top_k:
            raise impossible(
                "local_blocks", f"is {self.local_blocks}, but only top_k = {self.top_k} blocks are chosen", "Use fewer"
            )
        return self
