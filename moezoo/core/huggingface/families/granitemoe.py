"""Granite 3 MoE, with a shared expert or without. Source: IBM 2024; transformers, `granitemoe`, `granitemoeshared`."""

from collections.abc import Sequence
from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Fused, Part, Tensor
from moezoo.core.spec import (
    AttentionSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    MultipliersSpec,
    RouterSpec,
    SharedExpertsSpec,
)


def spec(fields: Fields) -> ModelSpec:
    attention = parts.attention(fields, parts.rope(fields), **attention_options(fields))
    return granite(fields, [attention] * fields.count("num_hidden_layers"))


def attention_options(fields: Fields) -> dict[str, Any]:
    """Return the options of attention that all Granite models have."""
    bias = fields.flag("attention_bias", False)
    return {"qkv_bias": bias, "output_bias": bias, "scale": fields.number("attention_multiplier", 1.0)}


def granite(fields: Fields, mixers: Sequence[AttentionSpec], shared: int = 0) -> ModelSpec:
    """Return the model with these mixers (attention, or what takes its place), each followed by the same MoE layer.

    `shared`: default width of the shared expert; 0: none.
    """
    shared = fields.integer("shared_intermediate_size", shared)
    top_k = fields.count("num_experts_per_tok", 2)
    moe = MoESpec(
        num_experts=fields.count(fields.either("num_local_experts", "num_experts"), 8),
        router=RouterSpec(top_k=top_k, score="none", weight="softmax_of_chosen", renormalize="none"),
        experts=parts.swiglu(fields, fields.count("intermediate_size")),
        shared=SharedExpertsSpec(hidden_dim=shared) if shared else None,
        losses=parts.pooled_balance(fields),
    )
    return scaled(fields, [parts.layer(mixer, moe) for mixer in mixers])


def scaled(fields: Fields, layers: Sequence[LayerSpec]) -> ModelSpec:
    """Return the model with these layers and the multipliers of all Granite models."""
    divisor = fields.number("logits_scaling", 1.0)
    if divisor <= 0:
        raise fields.refuse("logits_scaling", "a number above 0, because logits are divided by it")
    multipliers = MultipliersSpec(
        embedding=fields.number("embedding_multiplier", 1.0),
        residual=fields.number("residual_multiplier", 1.0),
        logits=1 / divisor,
    )
    return parts.model(fields, layers, norm=parts.rms_norm(fields)).model_copy(update={"multipliers": multipliers})


def config(spec: ModelSpec) -> dict[str, Any]:
    """Return the model type: transformers has another class for models with a shared expert."""
    shared = any(moe.shared is not None for _, moe in spec.moes)
    return {"model_type": "granitemoeshared", "architectures": ["GraniteMoeSharedForCausalLM"]} if shared else {}


MIXTURE, EXPERTS, SHARED = f"{LAYER}.block_sparse_moe", f"{OURS}.moe.experts", f"{OURS}.moe.shared"

FAMILY = Family(
    model_types=("granitemoe", "granitemoeshared"),
    architecture="GraniteMoeForCausalLM",
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.router(f"{MIXTURE}.router.layer"),
        parts.gate_and_up(f"{MIXTURE}.input_linear.weight", "e x d", EXPERTS),
        Tensor(f"{MIXTURE}.output_linear.weight", "e d f", f"{EXPERTS}.w_down", "e f d"),
        *parts.router(f"{MIXTURE}.router"),  # the name in transformers 5
        *parts.experts(f"{MIXTURE}.experts"),
        Fused(
            f"{LAYER}.shared_mlp.input_linear.weight",
            "x d",
            (Part(f"{SHARED}.w_gate", "f", "d f"), Part(f"{SHARED}.w_up", "f", "d f")),
        ),
        Tensor(f"{LAYER}.shared_mlp.output_linear.weight", "d f", f"{SHARED}.w_down", "f d"),
    ),
    mlx=parts.switch(f"{LAYER}.block_sparse_moe.switch_mlp"),
    mlx_lm=MlxLM(eight_bits=("*.self_attn.o_proj", "*.down_proj", "lm_head"), without=("granitemoeshared",)),
    kept=("*.rotary_emb.inv_freq",),
    harmless=("max_position_embeddings",),
    config=config,
)
