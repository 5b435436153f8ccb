"""Granite 3 MoE, with a shared expert or without. Source: IBM 2024; transformers, `granitemoe`, `granitemoeshared`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Fused, Part, Tensor
from moezoo.core.spec import (
    GroupedQueryAttentionSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    MultipliersSpec,
    RouterSpec,
    SharedExpertsSpec,
)


def spec(fields: Fields) -> ModelSpec:
    width, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    bias = fields.flag("attention_bias", False)
    shared = fields.integer("shared_intermediate_size", 0)
    layer = LayerSpec(
        repeat=fields.count("num_hidden_layers"),
        attention=GroupedQueryAttentionSpec(
            num_heads=heads,
            num_kv_heads=fields.count("num_key_value_heads", heads),
            head_dim=fields.count("head_dim", width // heads),
            position=parts.rope(fields),
            qkv_bias=bias,
            output_bias=bias,
            scale=fields.number("attention_multiplier", 1.0),
        ),
        moe=MoESpec(
            num_experts=fields.count(fields.either("num_local_experts", "num_experts"), 8),
            router=RouterSpec(
                top_k=fields.count("num_experts_per_tok", 2),
                score="none",
                weight="softmax_of_chosen",
                renormalize="none",
            ),
            experts=parts.swiglu(fields, fields.count("intermediate_size")),
            shared=SharedExpertsSpec(hidden_dim=shared) if shared else None,
            losses=parts.pooled_balance(fields),
        ),
    )
    divisor = fields.number("logits_scaling", 1.0)
    if divisor <= 0:
        raise fields.refuse("logits_scaling", "a number above 0, by which logits are divided")
    fields.only_in_training("attention_dropout")
    return ModelSpec(
        vocab_size=fields.count("vocab_size"),
        embed_dim=width,
        layers=(layer,),
        norm=parts.rms_norm(fields),
        head=parts.head(fields),
        multipliers=MultipliersSpec(
            embedding=fields.number("embedding_multiplier", 1.0),
            residual=fields.number("residual_multiplier", 1.0),
            logits=1 / divisor,
        ),
    )


MIXTURE, EXPERTS, SHARED = f"{LAYER}.block_sparse_moe", f"{OURS}.moe.experts", f"{OURS}.moe.shared"

FAMILY = Family(
    model_types=("granitemoe", "granitemoeshared"),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.router(f"{MIXTURE}.router.layer"),
        parts.gate_and_up(f"{MIXTURE}.input_linear.weight", "e x d", EXPERTS),
        Tensor(f"{MIXTURE}.output_linear.weight", "e d f", f"{EXPERTS}.w_down", "e f d"),
        *parts.router(f"{MIXTURE}.router"),  # as transformers 5 has it in memory
        *parts.experts(f"{MIXTURE}.experts"),
        Fused(
            f"{LAYER}.shared_mlp.input_linear.weight",
            "x d",
            (Part(f"{SHARED}.w_gate", "f", "d f"), Part(f"{SHARED}.w_up", "f", "d f")),
        ),
        Tensor(f"{LAYER}.shared_mlp.output_linear.weight", "d f", f"{SHARED}.w_down", "f d"),
    ),
    kept=("*.rotary_emb.inv_freq",),
    harmless=("max_position_embeddings",),
)
