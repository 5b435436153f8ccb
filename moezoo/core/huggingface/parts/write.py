"""Export to config.json: fields for a model designed in moezoo, and the older spellings that mlx-lm reads."""

from collections.abc import Mapping
from typing import Any

from moezoo.core.spec import (
    GroupedQueryAttentionSpec,
    ModelSpec,
    MoESpec,
    PooledBalanceLossSpec,
    PositionSpec,
    RoPESpec,
    TiedHeadSpec,
)


def common_config(spec: ModelSpec, architecture: str) -> dict[str, Any]:
    """Return the fields shared by most families."""
    return {
        "architectures": [architecture],
        "rms_norm_eps": spec.norm.epsilon,
        "tie_word_embeddings": isinstance(spec.head, TiedHeadSpec),
    }


def attention_config(spec: GroupedQueryAttentionSpec) -> dict[str, Any]:
    """Return the fields of attention: numbers of heads, head width and RoPE."""
    return {
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        **rope_config(spec.position),
    }


def rope_config(position: PositionSpec) -> dict[str, Any]:
    """Return the fields of unscaled RoPE in a format that mlx-lm reads too.

    Scaled RoPE would not be parsed back as the same spec, so the caller rejects it.
    """
    base = position.base if isinstance(position, RoPESpec) else 10_000.0
    return {"rope_theta": base, "rope_scaling": None}


def mixture_config(spec: MoESpec, width: str) -> dict[str, Any]:
    """Return the fields of a MoE layer; `width` is the family's field name for the expert width."""
    return {
        "num_experts_per_tok": spec.router.top_k,
        "hidden_act": "gelu_pytorch_tanh" if spec.experts.kind == "geglu" else "silu",
        width: spec.experts.hidden_dim,
    }


def balance_config(spec: MoESpec) -> dict[str, Any]:
    """Return the coefficient of the auxiliary loss of transformers."""
    pooled = [loss.coefficient for loss in spec.losses if isinstance(loss, PooledBalanceLossSpec)]
    return {"router_aux_loss_coef": pooled[0] if pooled else 0.0}


def older_spellings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of transformers 4, which mlx-lm reads, for those that a config has in version 5's spelling only."""
    found: dict[str, Any] = {}
    inner = raw.get("rope_parameters")
    if isinstance(inner, Mapping) and not any(isinstance(value, Mapping) for value in inner.values()):
        kind = inner.get("rope_type", inner.get("type", "default"))
        found["rope_theta"] = inner.get("rope_theta")
        if "partial_rotary_factor" in inner:
            found["partial_rotary_factor"] = inner["partial_rotary_factor"]
        moved = {key: value for key, value in inner.items() if key not in found} | {"type": kind, "rope_type": kind}
        found["rope_scaling"] = None if kind == "default" else moved
    for new, old in (("num_local_experts", "num_experts"), ("dtype", "torch_dtype")):
        if new in raw:
            found[old] = raw[new]
    return {key: value for key, value in found.items() if key not in raw}
