"""Nemotron-H, Nemotron-3. Source: NVIDIA 2025, arXiv 2504.03624 and 2512.20848; transformers, `nemotron_h`."""

from collections.abc import Callable
from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import OURS
from moezoo.core.huggingface.tensors import Fused, Tensor
from moezoo.core.spec import (
    GroupedTopKChoiceSpec,
    LayerSpec,
    Mamba2Spec,
    ModelSpec,
    MoESpec,
    NoAttentionSpec,
    NoPositionSpec,
    PlainFeedForwardSpec,
    RMSNormSpec,
    RouterSpec,
    SelectionBiasSpec,
    SharedExpertsSpec,
    TopKChoiceSpec,
)

# Letters of `hybrid_override_pattern`, and older words; one block per layer.
LETTERS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
OLDER_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}


def spec(fields: Fields) -> ModelSpec:
    norm = RMSNormSpec(epsilon=fields.number("layer_norm_epsilon", 1e-5))
    known: dict[str, Callable[[Fields], LayerSpec]] = {
        "linear_attention": _mamba2,
        "full_attention": _attention,
        "mlp": _dense,
        "moe": _mixture,
    }
    types = _types(fields, tuple(known))
    layers = {kind: read(fields) for kind, read in known.items()}
    fields.expect("tie_word_embeddings", False, because="transformers does not tie the head of this family")
    fields.expect("sliding_window", because="transformers has no windows in this family")
    fields.only_in_training("hidden_dropout")
    return parts.model(fields, [layers[kind] for kind in types], norm=norm)


def _types(fields: Fields, known: tuple[str, ...]) -> list[str]:
    """Return each layer's block, from a list under either name, or from a pattern of letters."""
    name, older = fields.either("layers_block_type", "layer_types"), "hybrid_override_pattern"
    by_pattern = [LETTERS.get(letter, letter) for letter in fields.text(older, "ME*-")]
    if name not in fields and not set(by_pattern) <= set(known):
        raise fields.refuse(older, f"each layer to be one of {', '.join(LETTERS)}")
    listed = fields.get(name, by_pattern)
    number = fields.count("num_hidden_layers", len(listed) if isinstance(listed, list) else None)
    types = [OLDER_TYPES.get(kind, kind) for kind in fields.items(name, number, by_pattern, (*known, *OLDER_TYPES))]
    if older in fields and by_pattern != types:
        raise fields.refuse(older, f"the layers of {name}")
    return types


def _attention(fields: Fields) -> LayerSpec:
    attention = parts.attention(fields, NoPositionSpec(), kv_heads=8, head_dim=128)
    return LayerSpec(attention=attention, mixer_only=True)


def _mamba2(fields: Fields) -> LayerSpec:
    fields.expect("mamba_hidden_act", "silu", "swish", because=parts.SILU_CONVOLUTIONS)
    mixer = Mamba2Spec(
        num_heads=fields.count("mamba_num_heads", 128),
        head_dim=fields.count("mamba_head_dim", 64),
        state_dim=fields.count("ssm_state_size", 128),
        num_groups=fields.count(fields.either("n_groups", "mamba_n_groups"), 8),
        conv_width=fields.count(fields.either("conv_kernel", "mamba_d_conv"), 4),
        conv_bias=fields.flag(fields.either("use_conv_bias", "mamba_conv_bias"), True),
        bias=fields.flag("use_bias", False),
        # Trap: the least step of initialization limits the steps, and time_step_limit is ignored.
        min_step=fields.number(fields.either("time_step_min", "mamba_dt_min"), 0.001),
        norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
    )
    return LayerSpec(attention=mixer, mixer_only=True)


def _dense(fields: Fields) -> LayerSpec:
    return LayerSpec(attention=NoAttentionSpec(), feed_forward=_plain(fields, fields.count("intermediate_size", 21504)))


def _mixture(fields: Fields) -> LayerSpec:
    count, keep = fields.count("n_group", 1), fields.count("topk_group", 1)
    choice = GroupedTopKChoiceSpec(num_groups=count, keep=keep, group_value="top2") if count > 1 else TopKChoiceSpec()
    divided = fields.flag("norm_topk_prob", True)
    router = RouterSpec(
        top_k=fields.count("num_experts_per_tok", 2),
        score="sigmoid",
        selection_bias=SelectionBiasSpec(),
        choice=choice,
        renormalize="sum" if divided else "none",
        renormalize_epsilon=1e-20 if divided else 0.0,
        scale=fields.number("routed_scaling_factor", 1.0),
    )
    experts = _plain(fields, fields.count("moe_intermediate_size", 7688), bias=False)
    moe = MoESpec(
        num_experts=fields.count(fields.either("n_routed_experts", "num_local_experts"), 8),
        router=router,
        experts=experts,
        latent_dim=fields.count_or_null("moe_latent_size"),
        shared=SharedExpertsSpec(
            hidden_dim=fields.count("moe_shared_expert_intermediate_size", 7688),
            bias=True if fields.flag("mlp_bias", False) else None,
        ),
    )
    if moe.latent_dim is not None and fields.flag("mlp_bias", False):
        # Of the projections to and from the latent space; the bias of the second one is added to the layer's output.
        moe = moe.model_copy(update={"latent_bias": True, "output_bias": True})
    return LayerSpec(attention=NoAttentionSpec(), moe=moe)


def _plain(fields: Fields, width: int, *, bias: bool | None = None) -> PlainFeedForwardSpec:
    kinds = {
        "relu2": "relu_squared",
        "relu": "relu",
        "silu": "silu",
        "swish": "silu",
        **dict.fromkeys(parts.GELU_BY_TANH, "gelu"),
    }
    bias = fields.flag("mlp_bias", False) if bias is None else bias
    return PlainFeedForwardSpec(kind=fields.choice("mlp_hidden_act", kinds, "relu2"), hidden_dim=width, bias=bias)


OURS_MOE = f"{OURS}.moe"


def plain(theirs: str, ours: str, names: tuple[str, str] = ("up_proj", "down_proj")) -> tuple[Fused, ...]:
    """Return rules for a feed-forward without a gate: two matrices, with biases if the model has them."""
    up, down = names
    return (
        Tensor(f"{theirs}.{up}.weight", "f d", f"{ours}.w_up", "d f"),
        Tensor(f"{theirs}.{down}.weight", "d f", f"{ours}.w_down", "f d"),
        Tensor(f"{theirs}.{up}.bias", "f", f"{ours}.b_up", "f"),
        Tensor(f"{theirs}.{down}.bias", "d", f"{ours}.b_down", "d"),
    )


def tensors(prefix: str) -> tuple[Fused, ...]:
    """Return the mapping of the whole model: `backbone` on the hub, `model` inside of transformers 5."""
    layer, experts = f"{prefix}.layers.{{layer}}", f"{OURS_MOE}.experts"
    mixer = f"{layer}.mixer"
    return (
        Tensor(f"{prefix}.embeddings.weight", "v d", "embedding.weight", "v d"),
        Tensor(f"{prefix}.norm_f.weight", "d", "final_norm.scale", "d"),
        # The one norm of a layer.
        Tensor(f"{layer}.norm.weight", "d", f"{OURS}.attention_norm.scale", "d"),
        Tensor(f"{layer}.norm.weight", "d", f"{OURS}.feed_forward_norm.scale", "d"),
        *parts.mamba2(mixer),
        *parts.grouped_query(mixer),
        *plain(mixer, f"{OURS}.feed_forward"),
        *parts.router(f"{mixer}.gate"),
        Tensor(f"{mixer}.fc1_latent_proj.weight", "z d", f"{OURS_MOE}.w_latent", "d z"),
        Tensor(f"{mixer}.fc2_latent_proj.weight", "d z", f"{OURS_MOE}.w_output", "z d"),
        Tensor(f"{mixer}.fc1_latent_proj.bias", "z", f"{OURS_MOE}.b_latent", "z"),
        Tensor(f"{mixer}.fc2_latent_proj.bias", "d", f"{OURS_MOE}.b_output", "d"),
        *plain(f"{mixer}.shared_experts", f"{OURS_MOE}.shared"),
        Tensor(f"{mixer}.experts.{{expert}}.up_proj.weight", "f d", f"{experts}.w_up", "e d f"),
        Tensor(f"{mixer}.experts.{{expert}}.down_proj.weight", "d f", f"{experts}.w_down", "e f d"),
        Tensor(f"{mixer}.experts.up_proj", "e f d", f"{experts}.w_up", "e d f"),
        Tensor(f"{mixer}.experts.down_proj", "e d f", f"{experts}.w_down", "e f d"),
    )


def mlx_config(spec: ModelSpec) -> dict[str, Any]:
    """Return fields of config.json that mlx-lm requires."""
    mixers = [each.attention for each in spec.layers if isinstance(each.attention, Mamba2Spec)]
    biased = any(mixer.bias for mixer in mixers)
    fed = [
        each.moe.shared_feed_forward if each.moe else each.feed_forward for each in spec.layers if not each.mixer_only
    ]
    return {
        "attention_bias": False,
        "mamba_proj_bias": biased,
        "mlp_bias": any(each is not None and each.bias for each in fed),
        "n_shared_experts": 1 if any(moe.shared is not None for _, moe in spec.moes) else None,
        "use_bias": biased,
        # It ignores time_step_min; transformers ignores this.
        **({"time_step_limit": parts.written_limits(mixers[0].min_step, mixers[0].max_step)} if mixers else {}),
    }


BLOCK = "backbone.layers.{layer}.mixer"

FAMILY = Family(
    model_types=("nemotron_h",),
    spec=spec,
    tensors=(*tensors("backbone"), Tensor("lm_head.weight", "v d", "head.w_head", "d v"), *tensors("model")),
    mlx=(
        *parts.mlx_mamba2(BLOCK),
        Tensor(f"{BLOCK}.switch_mlp.fc1.weight", "e f d", f"{OURS_MOE}.experts.w_up", "e d f"),
        Tensor(f"{BLOCK}.switch_mlp.fc2.weight", "e d f", f"{OURS_MOE}.experts.w_down", "e f d"),
    ),
    mlx_lm=MlxLM(config=mlx_config, replaces=("time_step_limit",)),
    kept=("mtp.*",),
    harmless=(
        # transformers has no biases of attention, one shared expert, and the residual stream in the model's dtype.
        *("attention_bias", "n_shared_experts", "residual_in_fp32"),
        *("max_position_embeddings", "num_logits_to_keep", "rescale_prenorm_residual", "use_mamba_kernels"),
        *("expand", "mamba_expand", "mamba_proj_bias", "chunk_size", "mamba_chunk_size", "mamba_ssm_cache_dtype"),
        # Of initialization alone, or of code outside of transformers.
        *("time_step_floor", "time_step_limit", "time_step_max", "mamba_dt_init_floor", "mamba_dt_limit"),
        *("mamba_dt_max", "moe_shared_expert_overlap", "norm_eps", "partial_rotary_factor", "rope_theta"),
    ),
)
