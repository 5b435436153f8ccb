"""Mistral Small 4. Source: Mistral AI 2026; transformers, `mistral4`."""

import math
from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families.deepseek_v3 import FAMILY as DEEPSEEK
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.spec import (
    ChoiceSpec,
    GroupedTopKChoiceSpec,
    LatentAttentionSpec,
    ModelSpec,
    MoESpec,
    RoPESpec,
    RouterSpec,
    SharedExpertsSpec,
    TemperatureTuningSpec,
    TopKChoiceSpec,
)


def spec(fields: Fields) -> ModelSpec:
    attention = parts.latent_attention(fields, _position(fields), queries=1024, temperature_tuning=_temperature(fields))
    moe = _moe(fields)
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    first = fields.integer("first_k_dense_replace", 0)
    fields.expect("moe_layer_freq", 1)
    layers = [
        parts.layer(attention, dense if index < first else moe) for index in range(fields.count("num_hidden_layers"))
    ]
    return parts.model(fields, layers, norm=parts.rms_norm(fields))


def _position(fields: Fields) -> RoPESpec:
    """Return RoPE. Trap: `partial_rotary_factor` is relative to the whole head, but only its rope part gets RoPE."""
    if "rope_parameters" not in fields and "rope_scaling" not in fields:
        raise fields.refuse("rope_parameters", "a JSON object")  # transformers would scale it by 128
    rotated = fields.count("qk_rope_head_dim")
    share = rotated / (fields.count("qk_nope_head_dim") + rotated)
    position = parts.rope(fields, fraction=share, layout=parts.layout(fields), harmless=("llama_4_scaling_beta",))
    if not math.isclose(position.fraction, share):
        raise fields.refuse("rope_parameters", f"partial_rotary_factor {share}")
    return position.model_copy(update={"fraction": 1.0})


def _temperature(fields: Fields) -> TemperatureTuningSpec | None:
    found: list[TemperatureTuningSpec | None] = []
    for name in ("rope_parameters", "rope_scaling"):
        inner = fields.inside(name)
        if inner is not None:
            scale = inner.number("llama_4_scaling_beta", 0.0)
            length = inner.count("original_max_position_embeddings") if scale else 0
            found.append(TemperatureTuningSpec(floor_length=length, scale=scale, first=0) if scale else None)
    if any(tuning != found[0] for tuning in found):
        raise fields.refuse("rope_scaling", "the same as in rope_parameters")
    return found[0] if found else None


def _moe(fields: Fields) -> MoESpec:
    groups = fields.count("n_group", 1)
    keep, renormalize = fields.count("topk_group", 1), fields.flag("norm_topk_prob", True)
    choice: ChoiceSpec = TopKChoiceSpec()
    if groups > 1:
        choice = GroupedTopKChoiceSpec(num_groups=groups, keep=keep, group_value="top2")
    width, shared = fields.count("moe_intermediate_size"), fields.integer("n_shared_experts", 1)
    return MoESpec(
        num_experts=fields.count(fields.either("n_routed_experts", "num_local_experts")),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 4),
            choice=choice,
            renormalize="sum" if renormalize else "none",
            renormalize_epsilon=1e-20 if renormalize else 0.0,
            scale=fields.number("routed_scaling_factor", 1.0),
        ),
        experts=parts.swiglu(fields, width),
        shared=SharedExpertsSpec(num_experts=shared, hidden_dim=width) if shared else None,
    )


def _mlx_config(spec: ModelSpec) -> dict[str, Any]:
    """Return the share of rotated features. Trap: transformers adds it to `rope_parameters`, and then `rope_scaling`,
    which is written for mlx-lm, takes their place without it.
    """
    attention = spec.layers[0].attention
    assert isinstance(attention, LatentAttentionSpec)
    return {"partial_rotary_factor": attention.rope_head_dim / (attention.head_dim + attention.rope_head_dim)}


FAMILY = Family(
    model_types=("mistral4",),
    spec=spec,
    tensors=parts.exported(DEEPSEEK.tensors, parts.fused_experts()),
    mlx=DEEPSEEK.mlx,
    mlx_lm=MlxLM(config=_mlx_config),
    kept=("*.rotary_emb.inv_freq", "*vision_tower.*", "*multi_modal_projector.*"),
    harmless=DEEPSEEK.harmless,
)
