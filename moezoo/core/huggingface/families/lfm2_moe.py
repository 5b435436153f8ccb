"""LFM2-MoE. Source: Amini et al. 2025, arXiv 2511.23404; transformers, `lfm2_moe`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Fused, Part, Tensor, beside
from moezoo.core.spec import (
    AttentionSpec,
    GatedFeedForwardSpec,
    ModelSpec,
    MoESpec,
    RMSNormSpec,
    RouterSpec,
    SelectionBiasSpec,
    ShortConvolutionSpec,
)


def spec(fields: Fields) -> ModelSpec:
    num_layers, num_dense = fields.count("num_hidden_layers"), fields.integer("num_dense_layers", 2)
    norm = RMSNormSpec(epsilon=fields.number("norm_eps", 1e-5))
    mixers: dict[str, AttentionSpec] = {
        "conv": ShortConvolutionSpec(conv_width=fields.count("conv_L_cache", 3), bias=fields.flag("conv_bias", False)),
        "full_attention": parts.attention(fields, parts.rope(fields, base=1e6), kv_heads=8, qk_norm=norm),
    }
    renormalize = fields.flag("norm_topk_prob", True)
    moe = MoESpec(
        num_experts=fields.count(fields.either("num_experts", "num_local_experts"), 32),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 4),
            score="sigmoid",
            selection_bias=SelectionBiasSpec() if fields.flag("use_expert_bias", True) else None,
            renormalize="sum" if renormalize else "none",
            renormalize_epsilon=1e-6 if renormalize else 0.0,
            scale=fields.number("routed_scaling_factor", 1.0),
        ),
        experts=GatedFeedForwardSpec(hidden_dim=fields.count("moe_intermediate_size", 1792)),
    )
    dense = GatedFeedForwardSpec(hidden_dim=fields.count("intermediate_size", 7168))
    fields.expect("use_pos_enc", True)
    layers = [
        parts.layer(mixers[kind], dense if index < num_dense else moe)
        for index, kind in enumerate(_types(fields, num_layers, tuple(mixers)))
    ]
    if "tie_embedding" in fields:  # the name in transformers 4
        fields.expect("tie_word_embeddings", fields.flag("tie_embedding"))
    tied = fields.flag("tie_embedding", True)
    return parts.model(fields, layers, norm=norm, tied=tied)


def _types(fields: Fields, num_layers: int, known: tuple[str, ...]) -> list[str]:
    """Return each layer's kind, from `layer_types` or `full_attn_idxs` (transformers 4)."""
    full = fields.integers("full_attn_idxs")
    older = ["full_attention" if index in full else "conv" for index in range(num_layers)]
    default = older if "full_attn_idxs" in fields else None
    return parts.layer_types(fields, num_layers, default, known, older={"full_attn_idxs": None})


THEIRS, ATTENTION, NAMES = f"{LAYER}.conv", f"{OURS}.attention", ("w1", "w3", "w2")
FINAL_NORM = Tensor("model.embedding_norm.weight", "d", "final_norm.scale", "d")
EXPERT_BIAS = Tensor(f"{LAYER}.feed_forward.expert_bias", "e", f"{OURS}.moe.router.selection_bias", "e")
GATES_AND_VALUE = ("input_gate", "output_gate", "value")

FAMILY = Family(
    model_types=("lfm2_moe",),
    spec=spec,
    tensors=parts.exported(
        (
            *parts.MODEL,
            Tensor(f"{LAYER}.operator_norm.weight", "d", f"{OURS}.attention_norm.scale", "d"),
            Tensor(f"{LAYER}.ffn_norm.weight", "d", f"{OURS}.feed_forward_norm.scale", "d"),
            *beside(f"{ATTENTION}.query_norm.scale", "h", parts.grouped_query(output="out_proj")),
            *parts.qk_norm(names=("q_layernorm", "k_layernorm")),
            *beside(
                f"{ATTENTION}.conv",
                "w z",
                (
                    Fused(
                        f"{THEIRS}.in_proj.weight",
                        "x d",
                        tuple(Part(f"{ATTENTION}.w_{which}", "z", "d z") for which in GATES_AND_VALUE),
                    ),
                    Fused(
                        f"{THEIRS}.in_proj.bias",
                        "x",
                        tuple(Part(f"{ATTENTION}.b_{which}", "z", "z") for which in GATES_AND_VALUE),
                    ),
                    Tensor(f"{THEIRS}.conv.weight", "z 1 w", f"{ATTENTION}.conv", "w z"),
                    Tensor(f"{THEIRS}.conv.bias", "z", f"{ATTENTION}.b_conv", "z"),
                    Tensor(f"{THEIRS}.out_proj.weight", "d z", f"{ATTENTION}.w_output", "z d"),
                    Tensor(f"{THEIRS}.out_proj.bias", "d", f"{ATTENTION}.b_output", "d"),
                ),
            ),
            *parts.feed_forward(f"{LAYER}.feed_forward", f"{OURS}.feed_forward", NAMES),
            *parts.router(f"{LAYER}.feed_forward.gate"),
            EXPERT_BIAS,
            *parts.experts(f"{LAYER}.feed_forward.experts", NAMES),
        ),
        (FINAL_NORM, EXPERT_BIAS),
    ),
    mlx=(
        FINAL_NORM,
        EXPERT_BIAS,
        *beside(f"{ATTENTION}.conv", "w z", [Tensor(f"{THEIRS}.conv.weight", "z w 1", f"{ATTENTION}.conv", "w z")]),
        *parts.feed_forward(f"{LAYER}.feed_forward", f"{OURS}.feed_forward"),
        *parts.switch(f"{LAYER}.feed_forward.switch_mlp"),
    ),
    kept=("*.pos_emb.inv_freq", "*.rotary_emb.inv_freq"),
    harmless=("hidden_act", "max_position_embeddings"),  # transformers uses SiLU with any activation here
)
