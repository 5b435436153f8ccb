"""MiniMax-M2. Source: MiniMax 2025, the released model; transformers, `minimax_m2`."""

from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import GroupedQueryAttentionSpec, ModelSpec, MoESpec, RoPESpec, RouterSpec, SelectionBiasSpec


def spec(fields: Fields) -> ModelSpec:
    norm = parts.rms_norm(fields)
    head_dim = fields.count("head_dim", 128)
    fraction = fields.integer("rotary_dim", head_dim) / head_dim  # field of the released files
    position = parts.rope(fields, base=5e6, fraction=fraction)
    rotated = position.rotated_dim(head_dim)
    if "rotary_dim" in fields and int(head_dim * fraction) != rotated:
        raise fields.refuse("rotary_dim", f"{rotated}, which follows from partial_rotary_factor")
    attention = parts.attention(
        fields,
        position,
        kv_heads=8,
        head_dim=128,
        qk_norm=norm,
        qk_norm_over="projection",
    )
    moe = MoESpec(
        num_experts=fields.count(fields.either("num_local_experts", "num_experts"), 256),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 8),
            score="sigmoid",
            selection_bias=SelectionBiasSpec(),
            jitter=parts.jitter(fields),
        ),
        experts=parts.swiglu(fields, fields.count("intermediate_size")),
        losses=parts.pooled_balance(fields),
    )
    num_layers = fields.count("num_hidden_layers")
    _expect_released(fields, num_layers)
    return parts.model(fields, [parts.layer(attention, moe)] * num_layers, norm=norm)


def _expect_released(fields: Fields, num_layers: int) -> None:
    """Check options of the files on the hub that only an older MiniMax family implements."""
    fields.expect("scoring_func", "sigmoid")
    fields.expect("use_routing_bias", True)
    fields.expect("use_qk_norm", True)
    fields.expect("qk_norm_type", "per_layer")
    fields.expect("shared_intermediate_size", 0)
    fields.expect("attn_type_list", [1] * num_layers)
    fields.expect("sliding_window")
    for name in ("full_attention", "linear_attention", "mlp"):
        fields.expect(f"layernorm_{name}_alpha", 1.0)
        fields.expect(f"layernorm_{name}_beta", 1.0)


def _mlx_config(spec: ModelSpec) -> dict[str, Any]:
    attention = spec.layers[0].attention
    assert isinstance(attention, GroupedQueryAttentionSpec)
    assert isinstance(attention.position, RoPESpec)
    return {"rotary_dim": attention.position.rotated_dim(attention.head_dim)}


_THEIRS = f"{LAYER}.block_sparse_moe"
_BIAS = f"{OURS}.moe.router.selection_bias"

FAMILY = Family(
    model_types=("minimax_m2",),
    architecture="MiniMaxM2ForCausalLM",
    spec=spec,
    tensors=parts.exported(
        (
            *parts.MODEL,
            *parts.PRE_NORMS,
            *parts.grouped_query(),
            *parts.qk_norm(over="projection"),
            *parts.router(f"{_THEIRS}.gate"),
            Tensor(f"{_THEIRS}.e_score_correction_bias", "e", _BIAS, "e"),
            *parts.experts(f"{_THEIRS}.experts", ("w1", "w3", "w2")),
            *parts.router(),  # the name in transformers 5
            Tensor(f"{LAYER}.mlp.e_score_correction_bias", "e", _BIAS, "e"),
            *parts.experts(),
        ),
        (Tensor(f"{_THEIRS}.e_score_correction_bias", "e", _BIAS, "e"),),
    ),
    mlx=(
        Tensor(f"{_THEIRS}.e_score_correction_bias", "e", _BIAS, "e"),
        *parts.switch(f"{LAYER}.block_sparse_moe.switch_mlp"),
    ),
    mlx_lm=MlxLM(config=_mlx_config),
    kept=("*.rotary_emb.inv_freq",),
    harmless=(
        "attention_bias",  # transformers has none
        "max_model_len",
        "max_position_embeddings",
        "mlp_intermediate_size",
        "mtp_transformer_layers",
        "num_mtp_modules",
        "shared_moe_mode",
        "swa_rope_theta",
        "use_mtp",
    ),
)
