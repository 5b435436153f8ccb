"""What several families spell alike: parts of their config.json, and of their name tables."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.tensors import Fused, Part, Tensor
from moezoo.core.spec import (
    AttentionSpec,
    DynamicScalingSpec,
    FeedForwardSpec,
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    GroupedTopKChoiceSpec,
    HeadSpec,
    JitterSpec,
    LatentAttentionSpec,
    LayerSpec,
    LinearScalingSpec,
    Llama3ScalingSpec,
    LongRoPEScalingSpec,
    ModelSpec,
    MoESpec,
    PooledBalanceLossSpec,
    PositionSpec,
    RMSNormSpec,
    RoPEScalingSpec,
    RoPESpec,
    RouterSpec,
    SelectionBiasSpec,
    SharedExpertsSpec,
    TiedHeadSpec,
    TopKChoiceSpec,
    UntiedHeadSpec,
    YaRNScalingSpec,
)

LAYER = "model.layers.{layer}"
OURS = "layers.{layer}"

# --- config.json -----------------------------------------------------------------------------------------------------


def rope(
    fields: Fields,
    *,
    base: float = 10_000.0,
    fraction: float | None = None,
    layout: Literal["half_split", "interleaved"] = "half_split",
    layer_type: str | None = None,
    theta: str = "rope_theta",
    harmless: Sequence[str] = (),
) -> RoPESpec:
    """The rotation: `rope_parameters` (transformers 5; by `layer_type` where it has such), or `rope_theta` (or what
    `theta` names), `rope_scaling` and `partial_rotary_factor` (transformers 4). `base` and `fraction` where neither
    says; a family without `fraction` rotates whole heads and knows no other. `harmless`: fields of the former that
    change nothing."""
    base = fields.number(theta, base)
    part = _fraction(fields, fraction)
    where = "rope_parameters" if "rope_parameters" in fields else "rope_scaling"
    inner = fields.inside(where)
    if inner is not None and layer_type is not None and layer_type in inner:
        inner = inner.inside(layer_type)
    if inner is None:
        return RoPESpec(base=base, fraction=part, layout=layout)
    base, part = inner.number("rope_theta", base), _fraction(inner, None if fraction is None else part)
    proportional = part < 1 and inner.get("rope_type") == "proportional"
    of: Literal["features", "pairs"] = "pairs" if proportional else "features"
    scaling = _scaling(fields, inner, harmless)
    return RoPESpec(base=base, fraction=part, fraction_of=of, layout=layout, scaling=scaling)


def _fraction(fields: Fields, default: float | None) -> float:
    """The share of a head that is rotated."""
    if default is None:
        fields.expect("partial_rotary_factor", 1.0)
        return 1.0
    return fields.number("partial_rotary_factor", default)


def _scaling(fields: Fields, inner: Fields, harmless: Sequence[str]) -> RoPEScalingSpec | None:
    makers: Mapping[str, Callable[[Fields, Fields], RoPEScalingSpec | None]] = {
        "default": lambda outer, inside: None,
        "proportional": lambda outer, inside: _linear(inside) if "factor" in inside else None,
        "linear": lambda outer, inside: _linear(inside),
        "dynamic": _dynamic,
        "llama3": _llama3,
        "yarn": _yarn,
        "longrope": _longrope,
    }
    old = "type" in inner  # transformers 4 called it so
    kind = inner.choice("rope_type" if "rope_type" in inner or not old else "type", makers, "default")
    scaling: RoPEScalingSpec | None = kind(fields, inner)
    inner.finish(("type", "rope_type", "max_position_embeddings", "original_max_position_embeddings", *harmless))
    return scaling


def _linear(inner: Fields) -> LinearScalingSpec:
    return LinearScalingSpec(factor=inner.number("factor"))


def _dynamic(fields: Fields, inner: Fields) -> DynamicScalingSpec:
    original = fields.count("max_position_embeddings")
    return DynamicScalingSpec(factor=inner.number("factor"), original_length=original, length=_length(fields, original))


def _length(fields: Fields, original: int) -> int:
    """Of texts that the rotation is made for.

    Transformers goes by the text at hand, and so turns a growing text's earlier tokens otherwise than its later ones;
    here it is a number of the spec.
    """
    return max(original, fields.max_length or 0)


def _original_length(fields: Fields, inner: Fields) -> int:
    longest = fields.get("original_max_position_embeddings", fields.get("max_position_embeddings"))
    return inner.count("original_max_position_embeddings", longest)


def _llama3(fields: Fields, inner: Fields) -> Llama3ScalingSpec:
    return Llama3ScalingSpec(
        factor=inner.number("factor"),
        original_length=_original_length(fields, inner),
        low_frequency_factor=inner.number("low_freq_factor"),
        high_frequency_factor=inner.number("high_freq_factor"),
    )


def _yarn(fields: Fields, inner: Fields) -> YaRNScalingSpec:
    original = _original_length(fields, inner)
    stretched = fields.count("max_position_embeddings", original) / original
    # Trap: 0 and null both mean "not given" to transformers.
    return YaRNScalingSpec(
        factor=inner.number("factor", stretched),
        original_length=original,
        beta_fast=inner.get("beta_fast") or 32.0,
        beta_slow=inner.get("beta_slow") or 1.0,
        attention_factor=inner.get("attention_factor"),
        mscale=inner.get("mscale") or None,
        mscale_all_dim=inner.get("mscale_all_dim") or None,
        truncate=inner.flag("truncate", True),
    )


def _longrope(fields: Fields, inner: Fields) -> LongRoPEScalingSpec:
    # Trap: the attention factor is that of the longest text, whatever the text at hand.
    original = _original_length(fields, inner)
    length = _length(fields, original)
    stretched = inner.number("factor", fields.count("max_position_embeddings", original) / original)
    attention_factor = math.sqrt(1 + math.log(stretched) / math.log(original)) if stretched > 1 else 1.0
    if "long_mscale" in inner:  # of texts beyond; phimoe gives the factors themselves
        short, long = inner.number("short_mscale"), inner.number("long_mscale")
        attention_factor = short if length == original else long
    if fields.count("max_position_embeddings") > length:
        fields.notes.append(
            f"texts of more than {length} tokens are refused; load with a larger max_length to read them by long_factor"
        )
    return LongRoPEScalingSpec(
        short_factors=tuple(inner.get("short_factor", ())),
        long_factors=tuple(inner.get("long_factor", ())),
        original_length=original,
        length=length,
        attention_factor=inner.number("attention_factor", attention_factor),
    )


def attention(
    fields: Fields,
    position: PositionSpec,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    **options: Any,
) -> GroupedQueryAttentionSpec:
    """Grouped-query attention with as many heads as the config says. `kv_heads` and `head_dim` are the family's where
    the config is silent; null there, or no default: as many as `num_attention_heads`, and the width shared by them."""
    heads = fields.count("num_attention_heads")
    return GroupedQueryAttentionSpec(
        num_heads=heads,
        num_kv_heads=fields.count_or_null("num_key_value_heads", kv_heads) or heads,
        head_dim=fields.count_or_null("head_dim", head_dim) or fields.count("hidden_size") // heads,
        position=position,
        **options,
    )


def swiglu(
    fields: Fields, hidden_dim: int, *, bias: bool = False, name: str = "hidden_act", default: str = "silu"
) -> GatedFeedForwardSpec:
    """A gated feed-forward whose activation the config names."""
    kinds = {
        "silu": "swiglu",
        "swish": "swiglu",
        "gelu_pytorch_tanh": "geglu",
        "gelu_new": "geglu",
        "relu2": "relu_squared_glu",
    }
    return GatedFeedForwardSpec(kind=fields.choice(name, kinds, default), hidden_dim=hidden_dim, bias=bias)


def rms_norm(fields: Fields, default: float = 1e-6) -> RMSNormSpec:
    """The norm of every layer."""
    return RMSNormSpec(epsilon=fields.number("rms_norm_eps", default))


def head(fields: Fields, tied: bool = False, *, bias: bool = False) -> HeadSpec:
    """The output projection: tied to the embedding or not."""
    return (TiedHeadSpec if fields.flag("tie_word_embeddings", tied) else UntiedHeadSpec)(bias=bias)


def jitter(fields: Fields, name: str = "router_jitter_noise") -> JitterSpec | None:
    """Noise on all that a mixture sees, in training."""
    amount = fields.number(name, 0.0)
    if not 0 <= amount < 1:
        raise fields.refuse(name, "a number from 0 to 1")
    return JitterSpec(of="mixture", amount=amount) if amount else None


def pooled_balance(fields: Fields, default: float = 0.001) -> tuple[PooledBalanceLossSpec, ...]:
    """The families' own auxiliary loss."""
    coefficient = fields.number("router_aux_loss_coef", default)
    return (PooledBalanceLossSpec(coefficient=coefficient),) if coefficient else ()


def grouped_sigmoid(
    fields: Fields,
    *,
    num_experts: tuple[str, ...] = ("n_routed_experts", "num_local_experts"),
    num_shared: tuple[str, int] = ("n_shared_experts", 1),
    groups: tuple[int, int] = (1, 1),
    renormalize: bool = True,
    scale: float = 1.0,
) -> MoESpec:
    """The mixture of DeepSeek-V3, which several families take over: sigmoid scores, a bias for the choice, groups.

    Names and defaults are the family's: of the experts, of the shared ones, (`n_group`, `topk_group`),
    `norm_topk_prob`, `routed_scaling_factor`. The bias is trained, as in the paper.
    """
    fields.expect("scoring_func", "sigmoid", "noaux_tc")  # the latter in files of dots.llm1
    fields.expect("topk_method", "noaux_tc")
    fields.only_in_training("aux_loss_alpha")  # a balance loss of each sequence, which transformers does not have
    fields.get("seq_aux")
    count, keep = fields.count("n_group", groups[0]), fields.count("topk_group", groups[1])
    choice = GroupedTopKChoiceSpec(num_groups=count, keep=keep, group_value="top2") if count > 1 else TopKChoiceSpec()
    width, shared = fields.count("moe_intermediate_size"), fields.integer(*num_shared)
    divided = fields.flag("norm_topk_prob", renormalize)
    router = RouterSpec(
        top_k=fields.count("num_experts_per_tok"),
        score="sigmoid",
        selection_bias=SelectionBiasSpec(),
        choice=choice,
        renormalize="sum" if divided else "none",
        renormalize_epsilon=1e-20 if divided else 0.0,
        scale=fields.number("routed_scaling_factor", scale),
    )
    return MoESpec(
        num_experts=fields.count(fields.either(*num_experts)),
        router=router,
        experts=swiglu(fields, width),
        shared=SharedExpertsSpec(num_experts=shared, hidden_dim=width) if shared else None,
    )


def windows(
    fields: Fields, num_layers: int, default: Sequence[str] | None = None, *, window: int | None = None
) -> list[int | None]:
    """The sliding window of each layer, by `layer_types` and `sliding_window`; `default` (all full) and `window` (none)
    where the config does not say."""
    types = layer_types(fields, num_layers, default or ["full_attention"] * num_layers)
    if "sliding_attention" not in types:
        fields.get("sliding_window")  # no number of the model depends on it
        return [None] * num_layers
    width = fields.count_or_null("sliding_window", window)
    if width is None:
        raise fields.refuse("sliding_window", "a number, since layer_types names sliding_attention")
    return [width if kind == "sliding_attention" else None for kind in types]


def layer_types(
    fields: Fields,
    num_layers: int,
    default: Sequence[str] | None,
    known: Sequence[str] = ("full_attention", "sliding_attention"),
) -> list[str]:
    """What kind of attention each layer has."""
    types = fields.items("layer_types", num_layers, default)
    if any(kind not in known for kind in types):
        raise fields.refuse("layer_types", f"each one of {', '.join(known)}")
    return types


def per_layer(fields: Fields, name: str, num_layers: int, default: int | None = None) -> list[int]:
    """A whole number, at least 1, for each layer: a list, or one number for all."""
    if not isinstance(fields.get(name), list):
        return [fields.count(name, default)] * num_layers
    numbers = fields.items(name, num_layers)
    if any(type(number) is not int or number < 1 for number in numbers):
        raise fields.refuse(name, "whole numbers, 1 or more")
    return numbers


def model(
    fields: Fields, layers: Sequence[LayerSpec], *, norm: RMSNormSpec, tied: bool = False, head_bias: bool = False
) -> ModelSpec:
    """The whole of these layers; `tied` where the config does not say."""
    fields.only_in_training("attention_dropout")
    return ModelSpec(
        vocab_size=fields.count("vocab_size"),
        embed_dim=fields.count("hidden_size"),
        layers=grouped(layers),
        norm=norm,
        head=head(fields, tied, bias=head_bias),
    )


def layer(attention: AttentionSpec, block: FeedForwardSpec | MoESpec) -> LayerSpec:
    """A layer with a norm before each of its two blocks, of which the second is dense or a mixture."""
    if isinstance(block, MoESpec):
        return LayerSpec(attention=attention, moe=block)
    return LayerSpec(attention=attention, feed_forward=block)


def grouped(layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """Equal neighbours as one with `repeat`."""
    found: list[LayerSpec] = []
    for layer in layers:
        if found and found[-1].model_copy(update={"repeat": 1}) == layer:
            found[-1] = layer.model_copy(update={"repeat": found[-1].repeat + 1})
        else:
            found.append(layer)
    return tuple(found)


def layout(fields: Fields) -> Literal["half_split", "interleaved"]:
    """How a rotation pairs features, by `rope_interleave`."""
    return "interleaved" if fields.flag("rope_interleave", True) else "half_split"


def latent_attention(
    fields: Fields, position: RoPESpec | None = None, *, queries: int | None = 1536, **options: Any
) -> LatentAttentionSpec:
    """Multi-head latent attention as DeepSeek's configs describe it. Its rotation is the config's, unless one is given;
    `queries`: the family's `q_lora_rank` where the config is silent (null is a value of its own)."""
    return LatentAttentionSpec(
        num_heads=fields.count("num_attention_heads"),
        head_dim=fields.count("qk_nope_head_dim"),
        rope_head_dim=fields.count("qk_rope_head_dim"),
        value_head_dim=fields.count("v_head_dim"),
        latent_dim=fields.count("kv_lora_rank"),
        query_latent_dim=fields.count_or_null("q_lora_rank", queries),
        position=rope(fields, layout=layout(fields)) if position is None else position,
        norm=RMSNormSpec(epsilon=1e-6),  # Trap: rms_norm_eps is not of these norms.
        bias=fields.flag("attention_bias", False),
        **options,
    )


# --- the way back to a config.json -----------------------------------------------------------------------------------


def common_config(spec: ModelSpec, architecture: str) -> dict[str, Any]:
    """What most families spell alike."""
    return {
        "architectures": [architecture],
        "rms_norm_eps": spec.norm.epsilon,
        "tie_word_embeddings": isinstance(spec.head, TiedHeadSpec),
    }


def attention_config(spec: GroupedQueryAttentionSpec) -> dict[str, Any]:
    """Heads, widths and rotation."""
    return {
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "rope_parameters": rope_config(spec.position),
    }


def rope_config(position: PositionSpec) -> dict[str, Any]:
    """`rope_parameters` of a rotation that is not scaled; another one is not read back, and so refused."""
    base = position.base if isinstance(position, RoPESpec) else 10_000.0
    return {"rope_type": "default", "rope_theta": base}


def mixture_config(spec: MoESpec, width: str) -> dict[str, Any]:
    """The experts; `width` is the family's name for the width of one."""
    return {
        "num_experts_per_tok": spec.router.top_k,
        "hidden_act": "gelu_pytorch_tanh" if spec.experts.kind == "geglu" else "silu",
        width: spec.experts.hidden_dim,
    }


def balance_config(spec: MoESpec) -> dict[str, Any]:
    """The families' own auxiliary loss."""
    pooled = [loss.coefficient for loss in spec.losses if isinstance(loss, PooledBalanceLossSpec)]
    return {"router_aux_loss_coef": pooled[0] if pooled else 0.0}


# --- name tables -----------------------------------------------------------------------------------------------------

# The embedding, the last norm, the head (a tied model's files may hold a copy of the embedding), the layers' two norms.
MODEL: tuple[Fused, ...] = (
    Tensor("model.embed_tokens.weight", "v d", "embedding.weight", "v d"),
    Tensor("model.norm.weight", "d", "final_norm.scale", "d"),
    Tensor("lm_head.weight", "v d", "head.w_head", "d v"),
    Tensor("lm_head.weight", "v d", "embedding.weight", "v d", copy=True),
    Tensor("lm_head.bias", "v", "head.b_head", "v"),
)
PRE_NORMS: tuple[Fused, ...] = (
    Tensor(f"{LAYER}.input_layernorm.weight", "d", f"{OURS}.attention_norm.scale", "d"),
    Tensor(f"{LAYER}.post_attention_layernorm.weight", "d", f"{OURS}.feed_forward_norm.scale", "d"),
)


def grouped_query(
    theirs: str = f"{LAYER}.self_attn", ours: str = f"{OURS}.attention", *, output: str = "o_proj"
) -> tuple[Fused, ...]:
    """Projections of queries, keys, values and output, with their biases where the model has such."""
    found: list[Fused] = []
    for name, which, heads in (("q", "query", "n"), ("k", "key", "m"), ("v", "value", "m")):
        found.append(Tensor(f"{theirs}.{name}_proj.weight", f"({heads} h) d", f"{ours}.w_{which}", f"d {heads} h"))
        found.append(Tensor(f"{theirs}.{name}_proj.bias", f"({heads} h)", f"{ours}.b_{which}", f"{heads} h"))
    found.append(Tensor(f"{theirs}.{output}.weight", "d (n h)", f"{ours}.w_output", "n h d"))
    found.append(Tensor(f"{theirs}.{output}.bias", "d", f"{ours}.b_output", "d"))
    return tuple(found)


def qk_norm(
    theirs: str = f"{LAYER}.self_attn", names: tuple[str, str] = ("q_norm", "k_norm"), *, over: str = "head"
) -> tuple[Fused, ...]:
    """Norms of queries and keys, of each head or of the whole `projection`."""
    found = []
    for name, which in zip(names, ("query", "key"), strict=True):
        axes, our_axes = ("h", "h") if over == "head" else ("(n h)", "n h")
        found.append(Tensor(f"{theirs}.{name}.weight", axes, f"{OURS}.attention.{which}_norm.scale", our_axes))
    return tuple(found)


def latent(theirs: str = f"{LAYER}.self_attn", ours: str = f"{OURS}.attention") -> tuple[Fused, ...]:
    """Multi-head latent attention as DeepSeek names it."""
    return (
        Tensor(f"{theirs}.q_proj.weight", "(n h) d", f"{ours}.w_query", "d n h"),
        Tensor(f"{theirs}.q_a_proj.weight", "q d", f"{ours}.w_query_down", "d q"),
        Tensor(f"{theirs}.q_a_proj.bias", "q", f"{ours}.b_query_down", "q"),
        Tensor(f"{theirs}.q_a_layernorm.weight", "q", f"{ours}.query_norm.scale", "q"),
        Tensor(f"{theirs}.q_b_proj.weight", "(n h) q", f"{ours}.w_query", "q n h"),
        Fused(
            f"{theirs}.kv_a_proj_with_mqa.weight",
            "x d",
            (Part(f"{ours}.w_latent", "z", "d z"), Part(f"{ours}.w_rope_key", "o", "d o")),
        ),
        Fused(
            f"{theirs}.kv_a_proj_with_mqa.bias",
            "x",
            (Part(f"{ours}.b_latent", "z", "z"), Part(f"{ours}.b_rope_key", "o", "o")),
        ),
        Tensor(f"{theirs}.kv_a_layernorm.weight", "z", f"{ours}.latent_norm.scale", "z"),
        Fused(
            f"{theirs}.kv_b_proj.weight",
            "(n x) z",
            (Part(f"{ours}.w_key", "h", "z n h"), Part(f"{ours}.w_value", "v", "z n v")),
        ),
        Tensor(f"{theirs}.o_proj.weight", "d (n v)", f"{ours}.w_output", "n v d"),
        Tensor(f"{theirs}.o_proj.bias", "d", f"{ours}.b_output", "d"),
    )


def feed_forward(
    theirs: str,
    ours: str,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Fused, ...]:
    """A gated feed-forward: three matrices, with biases where the model has such."""
    gate, up, down = names
    return (
        Tensor(f"{theirs}.{gate}.weight", "f d", f"{ours}.w_gate", "d f"),
        Tensor(f"{theirs}.{up}.weight", "f d", f"{ours}.w_up", "d f"),
        Tensor(f"{theirs}.{down}.weight", "d f", f"{ours}.w_down", "f d"),
        Tensor(f"{theirs}.{gate}.bias", "f", f"{ours}.b_gate", "f"),
        Tensor(f"{theirs}.{up}.bias", "f", f"{ours}.b_up", "f"),
        Tensor(f"{theirs}.{down}.bias", "d", f"{ours}.b_down", "d"),
    )


def experts(
    theirs: str = f"{LAYER}.mlp.experts",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ours: str = f"{OURS}.moe.experts",
) -> tuple[Fused, ...]:
    """Routed experts: one tensor an expert, or all in one with gate and up concatenated (transformers 5 in memory)."""
    gate, up, down = names
    each = f"{theirs}.{{expert}}"
    return (
        Tensor(f"{each}.{gate}.weight", "f d", f"{ours}.w_gate", "e d f"),
        Tensor(f"{each}.{up}.weight", "f d", f"{ours}.w_up", "e d f"),
        Tensor(f"{each}.{down}.weight", "d f", f"{ours}.w_down", "e f d"),
        Tensor(f"{each}.{gate}.bias", "f", f"{ours}.b_gate", "e f"),
        Tensor(f"{each}.{up}.bias", "f", f"{ours}.b_up", "e f"),
        Tensor(f"{each}.{down}.bias", "d", f"{ours}.b_down", "e d"),
        gate_and_up(f"{theirs}.gate_up_proj", "e x d", ours),
        Tensor(f"{theirs}.down_proj", "e d f", f"{ours}.w_down", "e f d"),
    )


def gate_and_up(theirs: str, axes: str, ours: str) -> Fused:
    """Gate and up of all experts in one tensor, one behind the other along axis `x`."""
    return Fused(theirs, axes, (Part(f"{ours}.w_gate", "f", "e d f"), Part(f"{ours}.w_up", "f", "e d f")))


def router(theirs: str = f"{LAYER}.mlp.gate", ours: str = f"{OURS}.moe.router") -> tuple[Fused, ...]:
    """The router's matrix, and its selection bias where the model has one."""
    return (
        Tensor(f"{theirs}.weight", "e d", f"{ours}.w_router", "d e"),
        Tensor(f"{theirs}.e_score_correction_bias", "e", f"{ours}.selection_bias", "e"),
    )


def dense_layers(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers are dense by `mlp_only_layers` and `decoder_sparse_step` (Qwen)."""
    step, only = fields.count("decoder_sparse_step", 1), fields.integers("mlp_only_layers")
    return [layer in only or (layer + 1) % step > 0 for layer in range(num_layers)]


def dense_by_type(fields: Fields, num_layers: int, default: Sequence[bool]) -> list[bool]:
    """Which layers are dense by `mlp_layer_types`; `default` where the config does not say."""
    types = fields.items("mlp_layer_types", num_layers, ["dense" if is_dense else "sparse" for is_dense in default])
    if any(kind not in ("dense", "sparse") for kind in types):
        raise fields.refuse("mlp_layer_types", "each one of dense, sparse")
    return [kind == "dense" for kind in types]
