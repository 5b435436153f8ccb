"""DeepSeek-V3, R1, Kimi-K2, Moonlight. Source: DeepSeek-AI 2024, arXiv 2412.19437; transformers, `deepseek_v3`."""

from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.spec import GroupedTopKChoiceSpec, LatentAttentionSpec, ModelSpec, RoPESpec, SharedExpertsSpec


def spec(fields: Fields) -> ModelSpec:
    attention = parts.latent_attention(fields)
    moe = parts.grouped_sigmoid(fields, groups=(8, 4), scale=2.5)
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    first = fields.integer("first_k_dense_replace", 3)
    fields.expect("moe_layer_freq", 1)
    layers = [
        parts.layer(attention, dense if index < first else moe) for index in range(fields.count("num_hidden_layers"))
    ]
    return parts.model(fields, layers, norm=parts.rms_norm(fields))


def config(spec: ModelSpec) -> dict[str, Any] | None:
    layers = spec.all_layers
    attention = layers[0].attention
    if not isinstance(attention, LatentAttentionSpec) or not spec.moes:
        return None
    first, moe = spec.moes[0]
    router = moe.router
    groups = (
        (router.choice.num_groups, router.choice.keep) if isinstance(router.choice, GroupedTopKChoiceSpec) else (1, 1)
    )
    interleaved = isinstance(attention.position, RoPESpec) and attention.position.layout == "interleaved"
    width = layers[0].feed_forward.hidden_dim if layers[0].feed_forward is not None else moe.experts.hidden_dim
    return {
        **parts.common_config(spec, "DeepseekV3ForCausalLM"),
        **parts.mixture_config(moe, "moe_intermediate_size"),
        "attention_bias": attention.bias,
        "first_k_dense_replace": first,
        "intermediate_size": width,
        "kv_lora_rank": attention.latent_dim,
        "moe_layer_freq": 1,
        "n_group": groups[0],
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared.num_experts if isinstance(moe.shared, SharedExpertsSpec) else 0,
        "norm_topk_prob": router.renormalize == "sum",
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.query_latent_dim,
        "qk_nope_head_dim": attention.head_dim,
        "qk_rope_head_dim": attention.rope_head_dim,
        "rope_interleave": interleaved,
        **parts.rope_config(attention.position),
        "routed_scaling_factor": router.scale,
        "scoring_func": "sigmoid",
        "topk_group": groups[1],
        "topk_method": "noaux_tc",
        "v_head_dim": attention.value_head_dim,
    }


FAMILY = Family(
    model_types=("deepseek_v3", "kimi_k2", "joyai_llm_flash"),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.latent(),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        *parts.router(),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
    ),
    mlx=(*parts.switch(), *parts.absorbed()),
    mlx_lm=MlxLM(floats=("*.mlp.gate",)),
    kept=("*.rotary_emb.inv_freq",),
    later_layers_kept=True,
    harmless=(
        "head_dim",
        "max_position_embeddings",
        "qk_head_dim",
    ),
    config=config,
)
