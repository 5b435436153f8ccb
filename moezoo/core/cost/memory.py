"""What a model costs: parameters, floating-point operations, cache and memory, by formula and before it is built.

All numbers are exact integers of the formulas below; only `training_memory`'s activations are an estimate.
Writing: writings/cost.md.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import assert_never

from moezoo.core.config.run_config import Config
from moezoo.core.config.training import Rematerialize
from moezoo.core.cost.parameters import parameter_counts
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.precision import COMPUTE_BYTES, compute_dtype
from moezoo.core.spec import (
    AttentionSpec,
    FeedForwardSpec,
    GatedDeltaAttentionSpec,
    GroupedQueryAttentionSpec,
    LatentAttentionSpec,
    LayerSpec,
    ModelSpec,
    PlainFeedForwardSpec,
    ShortConvolutionSpec,
)

_FLOAT32_BYTES = 4


def kv_cache_bytes_per_token(spec: ModelSpec) -> int:
    """What one more token leaves in the caches, in bytes of the compute dtype c.

    Per layer: keys and values, `2 c M H` where values are as wide as keys, 0 where they are another layer's; latent
    attention one latent and one rotated key, `c (Z + rope_head_dim)`, and the indexer's key; linear attention and short
    convolutions nothing, their state has a fixed size. A layer with a window or chunks keeps no more tokens than are
    looked back at: beyond those it is 0 there, which `cache_bytes` counts.

    Source: Shazeer 2019, arXiv 1911.02150 (fewer key/value heads to shrink this); arXiv 2405.04434, table 1 (latent).
    """
    size = COMPUTE_BYTES[compute_dtype(spec)]
    return sum(size * _cached_numbers(layer.attention) for layer in spec.all_layers)


def cache_bytes(spec: ModelSpec, length: int) -> int:
    """What a text of `length` tokens keeps in the caches: as `kv_cache_bytes_per_token`, up to what a layer reaches."""
    size = COMPUTE_BYTES[compute_dtype(spec)]
    kept = [
        length if (reach := spec.reach_of(index)) is None else min(length, reach)
        for index in range(len(spec.all_layers))
    ]
    return sum(size * kept[index] * _cached_numbers(layer.attention) for index, layer in enumerate(spec.all_layers))


def _cached_numbers(attention: AttentionSpec) -> int:
    match attention:
        case GroupedQueryAttentionSpec(keys_of_layer=int()):
            return 0
        case GroupedQueryAttentionSpec():
            return attention.num_kv_heads * (attention.head_dim + attention.value_dim)
        case LatentAttentionSpec(indexer=indexer):
            return attention.latent_dim + attention.rope_head_dim + (0 if indexer is None else indexer.head_dim)
        case GatedDeltaAttentionSpec() | ShortConvolutionSpec():
            return 0
        case _:
            assert_never(attention)


def training_memory(config: Config) -> dict[str, int]:
    """Bytes of one training step, by what they hold; `activations` is an estimate, the rest is exact.

    With n parameters, A micro-batches of `P = batch_size / A * sequence_length` tokens, and c bytes of
    the compute dtype:

    - `parameters`: 4 n; `gradients`: 4 n, or 8 n with A > 1 (the sum and the newest, which with `rematerialize: block`
      are those of one layer at a time, and with `experts` those of one layer's experts and all others); `moments`: 8 n.
      All float32.
    - `activations`: P times what the backward pass needs of a token. Per layer: attention
      `c (4 D + 3 Q) + 4 N T` (two norms in and out; queries, keys and values, again after the rotation, and the heads'
      output, Q numbers together with N H + M H of grouped heads; float32 probabilities, whole, where there are any);
      dense feed-forward `c (4 F + D)` (gate, up, activated, product; output), `c (2 F + D)` without a gate; routed
      experts `8 E + c K (4 F + 2 D)` (logits and scores; each copy in and out); shared experts `4 F c`. And once
      `2 c D`, the final norm. With `rematerialize: block`, a layer keeps `4 c D` and, of routed experts, `8 E`; one
      layer at a time has the rest too. With `experts`, `c K (4 F + 2 D)` is there for one layer at a time.
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
    layers = [layer_activation_bytes(layer, spec.embed_dim, length, compute) for layer in spec.all_layers]
    copies = [copies_bytes(layer, spec.embed_dim, compute) for layer in spec.all_layers]
    newest = parameters if parts > 1 else 0
    match config.training.rematerialize:
        case "none":
            pass
        case "experts":
            of_experts = _parameters_of_layers(spec, ".moe.experts.")
            newest = min(newest, parameters - sum(of_experts) + max(of_experts))
        case "block":
            newest = min(newest, max(_parameters_of_layers(spec)))
        case _:
            assert_never(config.training.rematerialize)
    return {
        "parameters": _FLOAT32_BYTES * parameters,
        "gradients": _FLOAT32_BYTES * (parameters + newest),
        "moments": 2 * _FLOAT32_BYTES * parameters,
        "activations": round(tokens * activation_bytes(spec, config.training.rematerialize, layers, copies)),
        "logits": 2 * _FLOAT32_BYTES * tokens * spec.vocab,
    }


def _parameters_of_layers(spec: ModelSpec, named: str = "") -> list[int]:
    """Each layer's number of parameters, or of those that have this in their name."""
    layers = [0] * len(spec.all_layers)
    for row in parameter_table(spec):
        part, *rest = row.name.split(".")
        if part == "layers" and named in row.name:
            layers[int(rest[0])] += row.size
    return layers


def activation_bytes(
    spec: ModelSpec, rematerialize: Rematerialize, layers: Sequence[Fraction], copies: Sequence[Fraction]
) -> Fraction:
    """Bytes that one token leaves for the backward pass; see `training_memory`.

    Args:
        spec: of width D.
        rematerialize: what is computed again.
        layers: of each layer, `layer_activation_bytes`.
        copies: of each layer, `copies_bytes`.
    """
    compute = COMPUTE_BYTES[compute_dtype(spec)]
    final_norm = Fraction(2 * compute * spec.embed_dim)
    match rematerialize:
        case "none":
            return sum(layers, final_norm)
        case "experts":
            return sum(layers, final_norm) - sum(copies) + max(copies)
        case "block":
            choices = sum(moe.num_choices for _, moe in spec.moes)
            entered = 4 * compute * spec.embed_dim * len(layers) + 2 * _FLOAT32_BYTES * choices
            return final_norm + entered + max(layers)
        case _:
            assert_never(rematerialize)


def layer_activation_bytes(
    layer: LayerSpec,
    embed_dim: int,
    length: int,
    compute: int,
    *,
    rows: Fraction | None = None,
    parts: Mapping[str, int] | None = None,
) -> Fraction:
    """Bytes that one token leaves in one layer for the backward pass; the formula of `training_memory`.

    Args:
        layer: of a model of this width D, in sequences of this length T.
        compute: bytes of an activation.
        rows: of routed experts, for each token; None: as many as it chooses.
        parts: into how many parts devices cut a logical axis, where they do.
    """
    cut = parts or {}
    heads, projected = attention_widths(layer.attention, embed_dim)
    of_heads = cut.get("head", 1)
    held = compute * (4 * embed_dim + Fraction(3 * projected, of_heads))
    held += Fraction(_FLOAT32_BYTES * heads * length, of_heads)

    def hidden(feed_forward: FeedForwardSpec) -> Fraction:
        return Fraction(hidden_copies(feed_forward) * feed_forward.hidden_dim, cut.get("hidden", 1))

    if layer.feed_forward is not None:
        held += compute * (hidden(layer.feed_forward) + embed_dim)
    if layer.moe is not None:
        moe = layer.moe
        held += 2 * _FLOAT32_BYTES * moe.num_choices + copies_bytes(layer, embed_dim, compute, rows=rows, parts=parts)
        if moe.shared is not None:
            held += compute * hidden(moe.shared_feed_forward)
    return held


def copies_bytes(
    layer: LayerSpec,
    embed_dim: int,
    compute: int,
    *,
    rows: Fraction | None = None,
    parts: Mapping[str, int] | None = None,
) -> Fraction:
    """Of them, what routed experts make of a token's copies. The arguments are those of `layer_activation_bytes`."""
    moe = layer.moe
    if moe is None:
        return Fraction(0)
    width = embed_dim if moe.latent_dim is None else moe.latent_dim
    hidden = Fraction(hidden_copies(moe.experts) * moe.experts.hidden_dim, (parts or {}).get("hidden", 1))
    return compute * (moe.router.top_k if rows is None else rows) * (hidden + 2 * width)


def attention_widths(attention: AttentionSpec, embed_dim: int) -> tuple[int, int]:
    """Heads that keep probabilities over positions, and the numbers per token that an attention layer projects to.

    The latter is the width of queries and heads' output, and of keys and values, halved: `N H + M H` for grouped heads;
    `2 D` for a short convolution, a third of what it keeps: gates and value, and three products of them.
    """
    match attention:
        case GroupedQueryAttentionSpec():
            both = (attention.num_heads + attention.num_kv_heads) * (attention.head_dim + attention.value_dim)
            return attention.num_heads, both // 2
        case LatentAttentionSpec():
            width = attention.head_dim + attention.rope_head_dim + attention.value_head_dim
            return attention.num_heads, attention.num_heads * width + attention.latent_dim
        case GatedDeltaAttentionSpec():
            keys = 2 * attention.num_key_heads * attention.key_head_dim
            return 0, keys + 2 * attention.num_value_heads * attention.value_head_dim
        case ShortConvolutionSpec():
            return 0, 2 * embed_dim
        case _:
            assert_never(attention)


def hidden_copies(spec: FeedForwardSpec) -> int:
    """How many arrays of its hidden width a feed-forward keeps: gate, up, activated, product; or two without a gate."""
    return 2 if isinstance(spec, PlainFeedForwardSpec) else 4
