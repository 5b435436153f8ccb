"""Parsing of config fields shared by several families: attention, feed-forward, MoE layers, layer types."""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from types import MappingProxyType
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
    NoPositionSpec,
    NormSpec,
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
    with_repeats,
)

SILU_CONVOLUTIONS = "causal convolutions have SiLU, here as in the kernels that transformers uses"
NO_OLDER: Mapping[str, Any] = MappingProxyType({})


# Activations of transformers that are one function, up to rounding.
GELU_BY_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh")


def attention(
    fields: Fields,
    position: PositionSpec,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    **options: Any,
) -> GroupedQueryAttentionSpec:
    """Return grouped-query attention with the config's numbers of heads.

    `kv_heads` and `head_dim` are the family's defaults for absent fields. If a field is null or has no default,
    `num_attention_heads` and `hidden_size / num_attention_heads` apply.
    """
    heads = fields.count("num_attention_heads")
    return _grouped_query(
        num_heads=heads,
        num_kv_heads=fields.count_or_null("num_key_value_heads", kv_heads) or heads,
        head_dim=fields.count_or_null("head_dim", head_dim) or fields.count("hidden_size") // heads,
        position=position,
        **options,
    )


# A family may ask for equal parts once per layer, and a search reads hundreds of models: each is checked once.
_grouped_query = lru_cache(maxsize=1024, typed=True)(GroupedQueryAttentionSpec)
_latent = lru_cache(maxsize=1024, typed=True)(LatentAttentionSpec)


def swiglu(
    fields: Fields, hidden_dim: int, *, bias: bool = False, name: str = "hidden_act", default: str = "silu"
) -> GatedFeedForwardSpec:
    """Return a gated feed-forward with the config's activation."""
    kinds = {
        "silu": "swiglu",
        "swish": "swiglu",
        **dict.fromkeys(GELU_BY_TANH, "geglu"),
        "gelu": "exact_geglu",
        "gelu_python": "exact_geglu",
        "relu": "reglu",
        "relu2": "relu_squared_glu",
    }
    return GatedFeedForwardSpec(kind=fields.choice(name, kinds, default), hidden_dim=hidden_dim, bias=bias)


def rms_norm(fields: Fields, default: float = 1e-6) -> RMSNormSpec:
    """Return the RMS norm of all layers."""
    return RMSNormSpec(epsilon=fields.number("rms_norm_eps", default))


def head(fields: Fields, tied: bool = False, *, bias: bool = False) -> HeadSpec:
    """Return the output projection, tied to the embedding or not."""
    return (TiedHeadSpec if fields.flag("tie_word_embeddings", tied) else UntiedHeadSpec)(bias=bias)


def jitter(fields: Fields, name: str = "router_jitter_noise") -> JitterSpec | None:
    """Return the training noise on the input of the whole MoE layer, or None."""
    amount = fields.number(name, 0.0)
    if not 0 <= amount < 1:
        raise fields.refuse(name, "a number of at least 0 and below 1")
    return JitterSpec(of="mixture", amount=amount) if amount else None


def pooled_balance(fields: Fields, default: float = 0.001) -> tuple[PooledBalanceLossSpec, ...]:
    """Return the auxiliary loss of transformers, `router_aux_loss_coef`, or no loss."""
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
    names: Mapping[str, str] = NO_OLDER,
    others: Literal["never", "zero"] = "never",
) -> MoESpec:
    """Return the MoE layer of DeepSeek-V3, used by several families: sigmoid scores, selection bias, expert groups.

    Arguments are the family's field names and defaults: of the experts, of the shared experts, (`n_group`,
    `topk_group`), `norm_topk_prob`, `routed_scaling_factor`; `names`: other names of fields. `others`: how experts of
    other groups are masked. The bias is trained, as in the paper.
    """

    def named(name: str) -> str:
        return fields.either(names[name], name) if name in names else name

    fields.expect("scoring_func", "sigmoid", "noaux_tc")  # "noaux_tc" occurs in files of dots.llm1
    fields.expect("topk_method", "noaux_tc")
    fields.only_in_training("aux_loss_alpha")  # a sequence-wise balance loss, which transformers does not have
    fields.get("seq_aux")
    count, keep = fields.count(named("n_group"), groups[0]), fields.count("topk_group", groups[1])
    groups_of = partial(GroupedTopKChoiceSpec, num_groups=count, keep=keep, group_value="top2", others=others)
    choice = groups_of() if count > 1 else TopKChoiceSpec()
    width, shared = fields.count("moe_intermediate_size"), fields.integer(named(num_shared[0]), num_shared[1])
    divided = fields.flag(named("norm_topk_prob"), renormalize)
    router = RouterSpec(
        top_k=fields.count(named("num_experts_per_tok")),
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
    fields: Fields,
    num_layers: int,
    default: Sequence[str] | None = None,
    *,
    window: int | None = None,
    older: Mapping[str, Any] = NO_OLDER,
) -> list[int | None]:
    """Return each layer's sliding window, from `layer_types` and `sliding_window`.

    `default` (all full attention) and `window` (none) apply to absent fields; `older` as for `layer_types`.
    """
    types = layer_types(fields, num_layers, default or ["full_attention"] * num_layers, older=older)
    if "sliding_attention" not in types:
        fields.get("sliding_window")  # has no effect without sliding layers
        return [None] * num_layers
    width = fields.count_or_null("sliding_window", window)
    if width is None:
        raise fields.refuse("sliding_window", "a number, because layer_types has sliding_attention")
    return [width if kind == "sliding_attention" else None for kind in types]


# Words of released files, which transformers replaces (configuration_utils, `remap_legacy_layer_types`).
_RENAMED_KINDS = {"deepseek_sparse_attention": "indexed_attention", "qwen_sparse_attention": "indexed_attention"}


def layer_types(
    fields: Fields,
    num_layers: int,
    default: Sequence[str] | None,
    known: Sequence[str] = ("full_attention", "sliding_attention"),
    *,
    older: Mapping[str, Any] = NO_OLDER,
) -> list[str]:
    """Return each layer's kind of attention; `default` follows from the fields `older` (see `Fields.agree`)."""
    renamed = [word for word, newer in _RENAMED_KINDS.items() if newer in known]
    types = fields.items("layer_types", num_layers, default, (*known, *renamed))
    fields.agree("layer_types", default, older)
    return [_RENAMED_KINDS.get(kind, kind) for kind in types]


def model(
    fields: Fields, layers: Sequence[LayerSpec], *, norm: NormSpec, tied: bool = False, head_bias: bool = False
) -> ModelSpec:
    """Return the model with these layers; `tied` is the default of `tie_word_embeddings`."""
    fields.only_in_training("attention_dropout")
    return ModelSpec(
        vocab_size=fields.count("vocab_size"),
        embed_dim=fields.count("hidden_size"),
        layers=with_repeats(layers),
        norm=norm,
        head=head(fields, tied, bias=head_bias),
    )


@lru_cache(maxsize=1024)
def layer(attention: AttentionSpec, block: FeedForwardSpec | MoESpec) -> LayerSpec:
    """Return a pre-norm layer whose second block is a dense feed-forward or a MoE layer."""
    if isinstance(block, MoESpec):
        return LayerSpec(attention=attention, moe=block)
    return LayerSpec(attention=attention, feed_forward=block)


def layout(fields: Fields) -> Literal["half_split", "interleaved"]:
    """Return how RoPE pairs features, from `rope_interleave`."""
    return "interleaved" if fields.flag("rope_interleave", True) else "half_split"


def latent_attention(
    fields: Fields,
    position: RoPESpec | NoPositionSpec | None = None,
    *,
    queries: int | None = 1536,
    kv_heads_ignored: bool = False,
    norm: NormSpec | None = None,
    rope_head_dim: int | None = None,
    **options: Any,
) -> LatentAttentionSpec:
    """Return multi-head latent attention from the fields of DeepSeek's configs.

    `position`: by default the config's RoPE. `queries`: the family's default of `q_lora_rank` (an explicit null means
    full-rank queries). `kv_heads_ignored`: the class replaces `num_key_value_heads`, whatever the file says. `norm`: of
    latents, in classes that give them `rms_norm_eps`. `rope_head_dim`: the one that the class allows.
    """
    heads = fields.count("num_attention_heads")
    if not kv_heads_ignored:
        fields.expect("num_key_value_heads", heads)  # MLA: every head has its own keys
    return _latent(
        num_heads=heads,
        head_dim=fields.count("qk_nope_head_dim"),
        rope_head_dim=fields.count("qk_rope_head_dim") if rope_head_dim is None else rope_head_dim,
        value_head_dim=fields.count("v_head_dim"),
        latent_dim=fields.count("kv_lora_rank"),
        query_latent_dim=fields.count_or_null("q_lora_rank", queries),
        position=rope(fields, layout=layout(fields)) if position is None else position,
        norm=RMSNormSpec(epsilon=1e-6) if norm is None else norm,  # Trap: rms_norm_eps does mostly not apply to these.
        bias=fields.flag("attention_bias", False),
        **options,
    )


def dense_layers(fields: Fields, num_layers: int, only: Sequence[int] = ()) -> list[bool]:
    """Return a flag per layer, true if it is dense, from `mlp_only_layers` and `decoder_sparse_step` (Qwen).

    `only`: the family's default of `mlp_only_layers`.
    """
    step, listed = fields.count("decoder_sparse_step", 1), fields.integers("mlp_only_layers", only)
    return [layer in listed or (layer + 1) % step > 0 for layer in range(num_layers)]


def dense_by_type(
    fields: Fields, num_layers: int, default: Sequence[bool], *, older: Mapping[str, Any] = NO_OLDER
) -> list[bool]:
    """Return a flag per layer, true if it is dense, from `mlp_layer_types`, or `default` if absent.

    `default` follows from the fields `older` (see `Fields.agree`).
    """
    by_default = ["dense" if is_dense else "sparse" for is_dense in default]
    types = fields.items("mlp_layer_types", num_layers, by_default, ("dense", "sparse"))
    fields.agree("mlp_layer_types", by_default, older)
    return [kind == "dense" for kind in types]
