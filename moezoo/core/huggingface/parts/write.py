"""The way back: fields of a config.json for a model that was designed here."""

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
    """What most families spell alike."""
    return {
        "architectures": [architecture],
        "rms_norm_eps": spec.norm.epsilon,
        "tie_word_embeddings": isinstance(spec.head, TiedHeadSpec),
    }


def attention_config(spec: GroupedQueryAttentionSpec) -> dict[str, Any]:
    """Heads, widths and rotation."""
    return {
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        **rope_config(spec.position),
    }


def rope_config(position: PositionSpec) -> dict[str, Any]:
    """A rotation that is not scaled, spelled as mlx-lm reads it too; another one is not read back, and so refused."""
    base = position.base if isinstance(position, RoPESpec) else 10_000.0
    return {"rope_theta": base, "rope_scaling": None}


def mixture_config(spec: MoESpec, width: str) -> dict[str, Any]:
    """The experts; `width` is the family's name for the width of one."""
    return {
        "num_experts_per_tok": spec.router.top_k,
        "hidden_act": "gelu_pytorch_tanh" if spec.experts.kind == "geglu" else "silu",
        width: spec.experts.hidden_dim,
    }


def balance_config(spec: MoESpec) -> dict[str, Any]:
    """The families' own auxiliary loss."""
    pooled = [loss.coefficient for loss in spec.losses if isinstance(loss, PooledBalanceLossSpec)]
    return {"router_aux_loss_coef": pooled[0] if pooled else 0.0}
