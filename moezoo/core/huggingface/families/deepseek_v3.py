"""DeepSeek-V3, R1, Kimi-K2, Moonlight. Source: DeepSeek-AI 2024, arXiv 2412.19437; transformers, `deepseek_v3`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.spec import (
    GroupedTopKChoiceSpec,
    LatentAttentionSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    RouterSpec,
    SelectionBiasSpec,
    SharedExpertsSpec,
    TopKChoiceSpec,
)


def spec(fields: Fields) -> ModelSpec:
    norm = parts.rms_norm(fields)
    attention = LatentAttentionSpec(
        num_heads=fields.count("num_attention_heads"),
        head_dim=fields.count("qk_nope_head_dim"),
        rope_head_dim=fields.count("qk_rope_head_dim"),
        value_head_dim=fields.count("v_head_dim"),
        latent_dim=fields.count("kv_lora_rank"),
        query_latent_dim=fields.get("q_lora_rank"),
        position=parts.rope(fields, layout="interleaved" if fields.flag("rope_interleave", True) else "half_split"),
        norm=norm,
    )
    fields.expect("attention_bias", False)
    moe = grouped_sigmoid(fields)
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    first = fields.integer("first_k_dense_replace", 3)
    fields.expect("moe_layer_freq", 1)
    layers = [
        LayerSpec(attention=attention, feed_forward=dense) if index < first else LayerSpec(attention=attention, moe=moe)
        for index in range(fields.count("num_hidden_layers"))
    ]
    fields.only_in_training("attention_dropout")
    return ModelSpec(
        vocab_size=fields.count("vocab_size"),
        embed_dim=fields.count("hidden_size"),
        layers=parts.grouped(layers),
        norm=norm,
        head=parts.head(fields),
    )


def grouped_sigmoid(fields: Fields) -> MoESpec:
    """The mixture of DeepSeek-V3, which several families take over: sigmoid scores, a bias for the choice, groups."""
    fields.expect("scoring_func", "sigmoid")
    fields.expect("topk_method", "noaux_tc")
    groups = fields.count("n_group", 1)
    keep = fields.count("topk_group", 1)
    choice = GroupedTopKChoiceSpec(num_groups=groups, keep=keep, group_value="top2") if groups > 1 else TopKChoiceSpec()
    width, shared = fields.count("moe_intermediate_size"), fields.integer("n_shared_experts", 0)
    renormalize = fields.flag("norm_topk_prob", True)
    router = RouterSpec(
        top_k=fields.count("num_experts_per_tok"),
        score="sigmoid",
        selection_bias=SelectionBiasSpec(),
        choice=choice,
        renormalize="sum" if renormalize else "none",
        renormalize_epsilon=1e-20 if renormalize else 0.0,
        scale=fields.number("routed_scaling_factor", 1.0),
    )
    return MoESpec(
        num_experts=fields.count(fields.either("n_routed_experts", "num_local_experts")),
        router=router,
        experts=parts.swiglu(fields, width),
        shared=SharedExpertsSpec(num_experts=shared, hidden_dim=width) if shared else None,
    )


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
    kept=("*.rotary_emb.inv_freq",),
    later_layers_kept=True,
    harmless=(
        "head_dim",
        "max_position_embeddings",
        "num_key_value_heads",
        "qk_head_dim",
    ),
)
