"""What a model costs: parameters, floating-point operations, cache and memory, by formula and before it is built.

All numbers are exact integers of the formulas below; only `training_memory`'s activations are an estimate.
Writing: writings/cost.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moezoo.core.config import Config
from moezoo.core.parameters import ROLES, Role, parameter_table
from moezoo.core.precision import COMPUTE_BYTES, compute_dtype
from moezoo.core.spec import LayerSpec, ModelSpec

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters, in the order of ROLES, roles that the model lacks included with 0.

    Fields:
        by_role: every parameter of the role.
        active_by_role: those that one token uses.
    """

    by_role: Mapping[Role, int]
    active_by_role: Mapping[Role, int]

    @property
    def total(self) -> int:
        """Every parameter."""
        return sum(self.by_role.values())

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        return sum(self.active_by_role.values())


def parameter_counts(spec: ModelSpec) -> ParameterCounts:
    """Total and active parameters: `active = routed experts * K / E + everything else`.

    Embeddings (the table, and the head where it is untied) count whole in both numbers, a tied matrix once. So does
    `norms`. Routed experts count as if no capacity dropped anything. Raises SpecError while vocab_size is null.

    Source: active parameters as Jiang et al. 2024, arXiv 2401.04088, section 2 counts them.
    Differs: Kaplan et al. 2020, arXiv 2001.08361, leave embeddings out of N; subtract `by_role["embeddings"]` for that.
    """
    total: dict[Role, int] = dict.fromkeys(ROLES, 0)
    active: dict[Role, int] = dict.fromkeys(ROLES, 0)
    layers = spec.all_layers
    for row in parameter_table(spec):
        total[row.role] += row.size
        used = row.size
        if row.role == "routed experts":
            moe = layers[int(row.name.split(".")[1])].moe
            assert moe is not None
            used = row.size // moe.num_experts * moe.router.top_k
        active[row.role] += used
    return ParameterCounts(total, active)


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

    Per layer, forward:

    - attention projections: `2 D H (2 N + 2 M)` (query, output; key, value)
    - attention scores: `2 * 2 N H * (T + 1) / 2 = 2 N H (T + 1)`: query times key and probability times value, with
      (T + 1) / 2 visible positions on average
    - feed-forward: `2 * 3 D F`
    - router: `2 D E`; routed experts: `K * 2 * 3 D F`, the chosen ones only; shared experts: `2 * 3 D F` of their sum

    and once: head `2 D V`. Looking up an embedding row is free; norms, biases, rotations, softmax and the combine are
    left out, as they cost a few operations an element. Training is 3 times forward: the backward pass makes two
    products for each one. What a backend computes beyond this (masked scores, padding) is overhead, not counted here.

    Source: Kaplan et al. 2020, arXiv 2001.08361, table 1 (2 a multiply-add, backward twice forward); attention scores
    and the head counted as Hoffmann et al. 2022, arXiv 2203.15556, appendix F.
    Differs: causal scores are counted at their average length, half of Hoffmann's, who also counts the embedding as a
    product.
    """
    d = spec.embed_dim
    projections = scores = feed_forward = router = routed = shared = 0
    for layer in spec.all_layers:
        attention = layer.attention
        n, m, h = attention.num_heads, attention.num_kv_heads, attention.head_dim
        projections += 2 * d * h * (2 * n + 2 * m)
        scores += 2 * n * h * (sequence_length + 1)
        if layer.feed_forward is not None:
            feed_forward += 2 * 3 * d * layer.feed_forward.hidden_dim
        if layer.moe is not None:
            router += 2 * d * layer.moe.num_experts
            routed += layer.moe.router.top_k * 2 * 3 * d * layer.moe.experts.hidden_dim
            if layer.moe.shared is not None:
                shared += 2 * 3 * d * layer.moe.shared_feed_forward.hidden_dim
    times = 3 if training else 1
    return Flops(
        attention_projections=times * projections,
        attention_scores=times * scores,
        feed_forward=times * feed_forward,
        router=times * router,
        routed_experts=times * routed,
        shared_experts=times * shared,
        head=times * 2 * d * spec.vocab,
    )


def kv_cache_bytes_per_token(spec: ModelSpec) -> int:
    """Keys and values that one token leaves in the cache: `sum over layers of 2 M H * bytes of the compute dtype`.

    Source: Shazeer 2019, arXiv 1911.02150 (fewer key/value heads to shrink this).
    """
    size = COMPUTE_BYTES[compute_dtype(spec)]
    return sum(2 * layer.attention.num_kv_heads * layer.attention.head_dim * size for layer in spec.all_layers)


def training_memory(config: Config) -> dict[str, int]:
    """Bytes of one training step, by what they hold; `activations` is an estimate, the rest is exact.

    With n parameters, A micro-batches of `P = batch_size / A * sequence_length` tokens, and c bytes of
    the compute dtype:

    - `parameters`: 4 n; `gradients`: 4 n, or 8 n with A > 1 (the sum and the newest); `moments`: 8 n. All float32.
    - `activations`: P times what the backward pass needs of a token, without recomputation. Per layer:
      attention `c (4 D + 3 N H + 3 M H) + 4 N T` (two norms in and out; query, key and value, rotated ones again, the
      heads' output; float32 probabilities, whole); dense feed-forward `c (4 F + D)` (gate, up, silu, product; output);
      routed experts `8 E + c K (4 F + 2 D)` (logits and scores; each copy in and out); shared experts `4 F c`.
      And once `2 c D`, the final norm.
    - `logits`: `8 P V`, the float32 logits and their gradient.

    A backend that fuses attention (MLX, and JAX with a fused kernel) keeps less; one that pads or copies keeps more.

    Source: Korthikanti et al. 2022, arXiv 2205.05198, section 4.1 (what is kept, counted per layer).
    """
    spec = config.model
    parameters = parameter_counts(spec).total
    parts = config.training.gradient_accumulation
    length = config.training.sequence_length
    tokens = config.training.batch_size // parts * length
    compute = COMPUTE_BYTES[compute_dtype(spec)]
    per_token = sum(_activation_bytes(layer, spec.embed_dim, length, compute) for layer in spec.all_layers)
    return {
        "parameters": _FLOAT32_BYTES * parameters,
        "gradients": _FLOAT32_BYTES * parameters * (1 if parts == 1 else 2),
        "moments": 2 * _FLOAT32_BYTES * parameters,
        "activations": tokens * (per_token + 2 * compute * spec.embed_dim),
        "logits": 2 * _FLOAT32_BYTES * tokens * spec.vocab,
    }


def _activation_bytes(layer: LayerSpec, embed_dim: int, length: int, compute: int) -> int:
    """Bytes that one token leaves in one layer for the backward pass; the formula of `training_memory`."""
    attention = layer.attention
    query, key = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    held = compute * (4 * embed_dim + 3 * query + 3 * key) + _FLOAT32_BYTES * attention.num_heads * length
    if layer.feed_forward is not None:
        held += compute * (4 * layer.feed_forward.hidden_dim + embed_dim)
    if layer.moe is not None:
        held += 2 * _FLOAT32_BYTES * layer.moe.num_experts
        held += compute * layer.moe.router.top_k * (4 * layer.moe.experts.hidden_dim + 2 * embed_dim)
        if layer.moe.shared is not None:
            held += compute * 4 * layer.moe.shared_feed_forward.hidden_dim
    return held
