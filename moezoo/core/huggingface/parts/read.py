"""What several families' config.json say alike: attention, feed-forwards, mixtures, kinds of layers."""

from collections.abc import Sequence
from typing import Any, Literal

from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts.rotations import rope
from moezoo.core.spec import (
    AttentionSpec,
    FeedForwardSpec,
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    GroupedTopKChoiceSpec,
    HeadSpec,
    JitterSpec,
    LatentAttentionSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    PooledBalanceLossSpec,
    PositionSpec,
    RMSNormSpec,
    RoPESpec,
    RouterSpec,
    SelectionBiasSpec,
    SharedExpertsSpec,
    TiedHeadSpec,
    TopKChoiceSpec,
    UntiedHeadSpec,
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
    heads = fields.count("num_attention_heads")
    fields.expect("num_key_value_heads", heads)  # every head has keys of its own
    return LatentAttentionSpec(
        num_heads=heads,
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
