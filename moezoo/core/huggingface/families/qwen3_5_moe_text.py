"""Qwen3.5-MoE, text model. Source: Qwen Team 2026; transformers, `qwen3_5_moe_text`, `qwen3_5_moe`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families.qwen3_next import (
    ATTENTION,
    BIAS,
    DELTA,
    MLX_TENSORS,
    SHARED_TENSORS,
    hybrid,
    mlx_config,
)
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.tensors import Fused, Part, Tensor, beside
from moezoo.core.spec import ModelSpec


def spec(fields: Fields) -> ModelSpec:
    fields.expect("norm_topk_prob", True)
    fields.expect("mlp_only_layers", [])
    fields.expect("decoder_sparse_step", 1)
    return hybrid(fields, True, [False] * fields.count("num_hidden_layers"), num_experts=256, top_k=8)


FAMILY = Family(
    model_types=("qwen3_5_moe_text", "qwen3_5_moe"),
    architecture="Qwen3_5MoeForCausalLM",
    spec=spec,
    tensors=parts.exported(
        (
            *SHARED_TENSORS,
            *beside(
                *BIAS,
                (
                    Fused(
                        f"{DELTA}.in_proj_qkv.weight",
                        "x d",
                        (
                            Part(f"{ATTENTION}.w_query", "m h", "d m h"),
                            Part(f"{ATTENTION}.w_key", "m h", "d m h"),
                            Part(f"{ATTENTION}.w_value", "n z", "d n z"),
                        ),
                    ),
                    Tensor(f"{DELTA}.in_proj_z.weight", "(n z) d", f"{ATTENTION}.w_gate", "d n z"),
                ),
            ),
            Tensor(f"{DELTA}.in_proj_b.weight", "n d", f"{ATTENTION}.w_beta", "d n"),
            Tensor(f"{DELTA}.in_proj_a.weight", "n d", f"{ATTENTION}.w_decay", "d n"),
        ),
        parts.fused_experts(),
    ),
    mlx=MLX_TENSORS,
    mlx_lm=MlxLM(config=mlx_config, wrapper="qwen3_5_moe"),
    kept=("mtp.*", "model.visual.*", "visual.*", "vision_tower.*", "*.rotary_emb.inv_freq"),
    harmless=("mamba_ssm_dtype", "max_position_embeddings", "mtp_*"),
)
