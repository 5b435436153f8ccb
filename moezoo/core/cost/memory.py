"""Memory of the KV cache and of a training step, by formula, before a model is built.

All numbers are exact integers of the formulas below; only `training_memory`'s activations are an estimate.
Writing: writings/cost.md.
"""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import assert_never

from moezoo.core.config.run_config import Config
from moezoo.core.config.training import Rematerialize
from moezoo.core.config.update_rules import state_shapes
from moezoo.core.cost.parameters import parameter_counts
from moezoo.core.parameters import Parameter
from moezoo.core.parameters.precision import COMPUTE_BYTES, compute_dtype
from moezoo.core.parameters.trained import trained_rows
from moezoo.core.spec import (
    AttentionSpec,
    BlockAttentionResidualSpec,
    CompressedAttentionSpec,
    DepthScaledResidualSpec,
    FeedForwardSpec,
    GatedDeltaAttentionSpec,
    GatedStreamsSpec,
    GroupedQueryAttentionSpec,
    HyperConnectionsSpec,
    LatentAttentionSpec,
    LayerSpec,
    LightningAttentionSpec,
    Mamba2Spec,
    MambaSpec,
    ModelSpec,
    NoAttentionSpec,
    PlainFeedForwardSpec,
    ScaledResidualSpec,
    ShortConvolutionSpec,
    SumResidualSpec,
)

_FLOAT32_BYTES = 4


def kv_cache_bytes_per_token(spec: ModelSpec) -> int:
    """Return the KV-cache bytes that each further token adds, in the compute dtype of c bytes.

    Per layer: keys and values, `2 c M H` if values are as wide as keys, 0 if the layer reuses another layer's; latent
    attention one latent and one rotated key, `c (Z + rope_head_dim)`, and the indexer's key, with gates as wide if it
    pools keys; linear attention and short convolutions nothing, their state has a fixed size; compressed attention one
    key, and one entry for each `ratio` tokens, with that of the indexer. A layer with a window or chunks caches only
    the tokens that it can attend to: `cache_bytes` takes that limit into account, this number does not.

    Source: Shazeer 2019, arXiv 1911.02150 (fewer key/value heads to shrink this); arXiv 2405.04434, table 1 (latent).
    """
    size = COMPUTE_BYTES[compute_dtype(spec)]
    return round(sum(size * _cached_numbers(layer.attention) for layer in spec.all_layers))


def cache_bytes(spec: ModelSpec, length: int) -> int:
    """Return the KV-cache bytes of a sequence of `length` tokens; windows and chunks limit their layers' tokens."""
    size = COMPUTE_BYTES[compute_dtype(spec)]
    kept = [length if reach is None else min(length, reach) for reach in spec.reaches]
    numbers = 0
    for layer, tokens in zip(spec.all_layers, kept, strict=True):
        if isinstance(layer.attention, CompressedAttentionSpec):
            window = min(length, layer.attention.window)
            numbers += window * layer.attention.head_dim + _entry_numbers(layer.attention, length)
        else:
            numbers += tokens * int(_cached_numbers(layer.attention))
    return size * numbers


def largest_context(spec: ModelSpec, free_bytes: int) -> int | None:
    """Return the most tokens of one sequence whose KV cache takes at most `free_bytes`; None: there is no limit."""
    longest = 1 << 40
    if cache_bytes(spec, longest) <= free_bytes:
        return None
    fits = range(longest)  # by bisection: the cache never shrinks
    return bisect.bisect_right(fits, free_bytes, key=lambda length: cache_bytes(spec, length)) - 1


def _entry_numbers(attention: CompressedAttentionSpec, length: int) -> int:
    """Return the numbers of the compressed entries of `length` tokens, the indexer's included."""
    if attention.compression is None:
        return 0
    indexer = attention.compression.indexer
    width = attention.head_dim + (0 if indexer is None else indexer.head_dim)
    return length // attention.compression.ratio * width


def _cached_numbers(attention: AttentionSpec) -> Fraction | int:
    match attention:
        case GroupedQueryAttentionSpec(keys_of_layer=int()):
            return 0
        case GroupedQueryAttentionSpec():
            index = 0 if attention.indexer is None else attention.indexer.head_dim
            return attention.num_kv_heads * (attention.head_dim + attention.value_dim) + index
        case LatentAttentionSpec(indexer=indexer):
            return attention.latent_dim + attention.rope_head_dim + (0 if indexer is None else indexer.cached_dim)
        case CompressedAttentionSpec(compression=compression):
            ratio = 1 if compression is None else compression.ratio
            return attention.head_dim + Fraction(_entry_numbers(attention, ratio), ratio)
        case GatedDeltaAttentionSpec() | LightningAttentionSpec() | Mamba2Spec() | MambaSpec():
            return 0
        case ShortConvolutionSpec() | NoAttentionSpec():
            return 0
        case _:
            assert_never(attention)


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of one training step in bytes, by kind; the fields are explained in `training_memory`."""

    parameters: int
    gradients: int
    moments: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, int]:
        """Return the total and the bytes of each kind."""
        return {"total": self.total, **asdict(self)}


def training_memory(config: Config) -> TrainingMemory:
    """Return the memory of one training step; `activations` is an estimate, the rest is exact.

    With n parameters, t of them trained, A micro-batches of `P = batch_size / A * sequence_length` tokens, and c bytes
    of the compute dtype:

    - `parameters`: 4 n; `gradients`: 4 t, or 8 t with A > 1 (the accumulated and the newest gradient; with
      `rematerialize: block` the newest exists for one layer at a time, with `experts` for one layer's experts at a
      time and for all other parameters); `moments`: what the optimizer keeps, 8 t for AdamW. All float32.
    - `activations`: P times the bytes per token that are saved for the backward pass. Per layer: attention
      `c (4 D + 3 Q) + 4 N T` (inputs and outputs of two norms; queries, keys and values, before and after RoPE, and the
      heads' output, Q numbers together with N H + M H for grouped heads; all float32 probabilities, if there are any);
      dense feed-forward `c (4 F + D)` (gate, up, activated, product; output), `c (2 F + D)` without a gate; routed
      experts `8 E + c K (4 F + 2 D)` (logits and scores; input and output of each token-expert assignment); shared
      experts `4 F c`. And once `2 c D`, the final norm. With `rematerialize: block`, each layer saves `4 c D` and, for
      routed experts, `8 E`; the rest exists for one layer at a time. With `experts`, `c K (4 F + 2 D)` exists for one
      layer at a time. With packed documents, a mask of T bytes (`mask_bytes`), for one layer at a time. With J residual
      streams, `c J D` for each block, which reads them, and `8 J^2` for each iteration of its mixing matrix.
    - `logits`: `8 P V`, the float32 logits and their gradient.

    A backend that fuses attention (MLX, and JAX with a fused kernel) needs less; padding or copying needs more.

    Source: Korthikanti et al. 2022, arXiv 2205.05198, section 4.1 (saved activations, counted per layer).
    """
    spec = config.model
    parameters = parameter_counts(spec).total
    trained = trained_rows(spec, config.training.only)
    size = sum(row.size for row in trained)
    micro_batches = config.training.gradient_accumulation
    length = config.training.sequence_length
    tokens = config.training.batch_size // micro_batches * length
    compute = COMPUTE_BYTES[compute_dtype(spec)]
    layers = [layer_activation_bytes(layer, spec.embed_dim, length, compute) for layer in spec.all_layers]
    experts = [expert_activation_bytes(layer, spec.embed_dim, compute) for layer in spec.all_layers]
    newest = size if micro_batches > 1 else 0
    match config.training.rematerialize:
        case "none":
            pass
        case "experts":
            routed = _layer_parameters(spec, trained, ".moe.experts.")
            newest = min(newest, size - sum(routed) + max(routed))
        case "block":
            newest = min(newest, max(_layer_parameters(spec, trained)))
        case _:
            assert_never(config.training.rematerialize)
    return TrainingMemory(
        parameters=_FLOAT32_BYTES * parameters,
        gradients=_FLOAT32_BYTES * (size + newest),
        moments=_FLOAT32_BYTES * sum(map(math.prod, state_shapes(config.optimizer, trained).values())),
        activations=round(
            tokens * (activation_bytes(spec, config.training.rematerialize, layers, experts) + mask_bytes(config))
        ),
        logits=2 * _FLOAT32_BYTES * tokens * spec.vocab,
    )


def _layer_parameters(spec: ModelSpec, rows: Iterable[Parameter], pattern: str = "") -> list[int]:
    """Return the number of parameters of each layer among these rows, or of those whose name contains `pattern`."""
    layers = [0] * len(spec.all_layers)
    for row in rows:
        part, *rest = row.name.split(".")
        if part == "layers" and pattern in row.name:
            layers[int(rest[0])] += row.size
    return layers


def activation_bytes(
    spec: ModelSpec, rematerialize: Rematerialize, layers: Sequence[Fraction], experts: Sequence[Fraction]
) -> Fraction:
    """Return the bytes per token that are saved for the backward pass; see `training_memory`.

    Args:
        spec: the model, of width D.
        rematerialize: the part that the backward pass recomputes.
        layers: `layer_activation_bytes` of each layer.
        experts: `expert_activation_bytes` of each layer.
    """
    compute = COMPUTE_BYTES[compute_dtype(spec)]
    outside = Fraction(2 * compute * spec.embed_dim + stream_bytes(spec))
    match rematerialize:
        case "none":
            return sum(layers, outside)
        case "experts":
            return sum(layers, outside) - sum(experts) + max(experts)
        case "block":
            choices = sum(moe.num_choices for _, moe in spec.moes)
            inputs = 4 * compute * spec.embed_dim * len(layers) + 2 * _FLOAT32_BYTES * choices
            return outside + inputs + max(layers)
        case _:
            assert_never(rematerialize)


def stream_bytes(spec: ModelSpec) -> int:
    """Return the bytes per token that are saved of several residual streams; see `training_memory`."""
    match spec.residual:
        case SumResidualSpec() | DepthScaledResidualSpec() | ScaledResidualSpec():
            return 0
        case HyperConnectionsSpec(num_streams=streams, sinkhorn_iterations=iterations):
            blocks = sum(int(layer.has_mixer) + int(not layer.mixer_only) for layer in spec.all_layers)
            mixing = 0 if iterations is None else _FLOAT32_BYTES * 2 * iterations * streams**2
            return blocks * (COMPUTE_BYTES[compute_dtype(spec)] * streams * spec.embed_dim + mixing)
        case GatedStreamsSpec(num_streams=streams, rank=rank):
            blocks = sum(int(layer.has_mixer) + int(not layer.mixer_only) for layer in spec.all_layers)
            return blocks * COMPUTE_BYTES[compute_dtype(spec)] * (3 * streams * spec.embed_dim + rank)
        case BlockAttentionResidualSpec(layers_per_block=layers):
            sums = sum(1 + -(-block // (2 * layers)) for block in range(1, 2 * len(spec.all_layers) + 1))
            return 2 * _FLOAT32_BYTES * sums * spec.embed_dim
        case _:
            assert_never(spec.residual)


def mask_bytes(config: Config) -> int:
    """Return the bytes per token of the mask of packed documents, [B, T, S]: one of each pair that attention scores."""
    attends = any(attention_widths(layer.attention, 0)[0] for layer in config.model.layers)
    return config.training.sequence_length if attends and config.data.documents == "separate" else 0


def layer_activation_bytes(
    layer: LayerSpec,
    embed_dim: int,
    length: int,
    compute: int,
    *,
    rows: Fraction | None = None,
    shards: Mapping[str, int] | None = None,
) -> Fraction:
    """Return the bytes per token that one layer saves for the backward pass, by the formula of `training_memory`.

    Args:
        layer: a layer of a model of width D = `embed_dim`.
        embed_dim: D.
        length: sequence length T.
        compute: bytes of an activation.
        rows: rows that routed experts compute per token; None: top_k.
        shards: number of shards of each logical axis; axes that are left out are not sharded.
    """
    shards = shards or {}
    heads, projected = attention_widths(layer.attention, embed_dim)
    head_shards = shards.get("head", 1)
    blocks = int(layer.has_mixer) + int(not layer.mixer_only)
    saved = compute * (2 * blocks * embed_dim + Fraction(3 * projected, head_shards))
    saved += Fraction(_FLOAT32_BYTES * heads * length, head_shards)

    def hidden(feed_forward: FeedForwardSpec) -> Fraction:
        return Fraction(hidden_arrays(feed_forward) * feed_forward.hidden_dim, shards.get("hidden", 1))

    if layer.feed_forward is not None:
        saved += compute * (hidden(layer.feed_forward) + embed_dim)
    if layer.moe is not None:
        moe = layer.moe
        saved += 2 * _FLOAT32_BYTES * moe.num_choices
        saved += expert_activation_bytes(layer, embed_dim, compute, rows=rows, shards=shards)
        if moe.shared is not None:
            saved += compute * hidden(moe.shared_feed_forward)
    return saved


def expert_activation_bytes(
    layer: LayerSpec,
    embed_dim: int,
    compute: int,
    *,
    rows: Fraction | None = None,
    shards: Mapping[str, int] | None = None,
) -> Fraction:
    """Return the part of `layer_activation_bytes` that is due to token-expert assignments; same arguments."""
    moe = layer.moe
    if moe is None:
        return Fraction(0)
    width = embed_dim if moe.latent_dim is None else moe.latent_dim
    hidden = Fraction(hidden_arrays(moe.experts) * moe.experts.hidden_dim, (shards or {}).get("hidden", 1))
    return compute * (moe.router.top_k if rows is None else rows) * (hidden + 2 * width)


def attention_widths(attention: AttentionSpec, embed_dim: int) -> tuple[int, int]:
    """Return the number of heads with softmax probabilities, and the projected width Q of an attention layer per token.

    Q is half the sum of the widths of queries, keys, values and the heads' output: `N H + M H` for grouped heads; `2 D`
    for a short convolution, a third of the activations that it saves: gates and value, and three products of them.
    """
    match attention:
        case GroupedQueryAttentionSpec():
            both = (attention.num_heads + attention.num_kv_heads) * (attention.head_dim + attention.value_dim)
            if attention.convolution is not None:  # three more of queries and keys: projected, filtered, mixed
                both += 2 * (attention.num_heads + attention.num_kv_heads) * attention.head_dim
            return attention.num_heads, both // 2
        case LatentAttentionSpec():
            width = attention.head_dim + attention.rope_head_dim + attention.value_head_dim
            return attention.num_heads, attention.num_heads * width + attention.latent_dim
        case CompressedAttentionSpec():
            return attention.num_heads, (attention.num_heads + 1) * attention.head_dim + _entry_widths(attention)
        case GatedDeltaAttentionSpec():
            keys, heads = 2 * attention.num_key_heads * attention.key_head_dim, attention.num_value_heads
            decays = heads * attention.key_head_dim if attention.decay == "channel" else 0
            return 0, keys + 2 * heads * attention.value_head_dim + decays
        case Mamba2Spec():
            keys = 2 * attention.num_groups * attention.state_dim
            return 0, keys + 2 * attention.num_heads * attention.head_dim
        case LightningAttentionSpec():
            return 0, 4 * attention.num_heads * attention.head_dim
        case ShortConvolutionSpec():
            return 0, 2 * embed_dim
        case MambaSpec():
            return 0, 2 * attention.inner_dim
        case NoAttentionSpec():
            return 0, 0
        case _:
            assert_never(attention)


def _entry_widths(attention: CompressedAttentionSpec) -> int:
    """Return the width of the two projections of the compressors, of which an attention's Q has a half."""
    if attention.compression is None:
        return 0
    indexer = attention.compression.indexer
    width = attention.head_dim + (0 if indexer is None else indexer.head_dim)
    return (2 if attention.compression.overlap else 1) * width


def hidden_arrays(spec: FeedForwardSpec) -> int:
    """Return the number of arrays of hidden width that are saved: gate, up, activated, product; 2 without a gate."""
    return 2 if isinstance(spec, PlainFeedForwardSpec) else 4
