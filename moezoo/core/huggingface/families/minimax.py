"""MiniMax-01: lightning attention and attention. Source: MiniMax 2025, arXiv 2501.08313; transformers, `minimax`."""

from collections.abc import Sequence

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Fused, Part, Tensor
from moezoo.core.spec import (
    BlockFactorsSpec,
    LightningAttentionSpec,
    ModelSpec,
    MoESpec,
    NoPositionSpec,
    RMSNormSpec,
    RouterSpec,
)

LINEAR, FULL = "linear_attention", "full_attention"


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers")
    default = [LINEAR if index % 2 else FULL for index in range(number)]
    types = parts.layer_types(fields, number, default, (FULL, LINEAR))
    attention = parts.attention(fields, NoPositionSpec(), kv_heads=8, window=fields.count_or_null("sliding_window"))
    # A field of MiniMax's own code, which transformers ignores.
    fraction = fields.count("rotary_dim") / attention.head_dim if "rotary_dim" in fields else None
    rope = parts.rope(fields, base=1e6, fraction=fraction)
    attention = attention.model_copy(update={"position": rope})
    moe = MoESpec(
        num_experts=fields.count(fields.either("num_local_experts", "num_experts"), 8),
        router=RouterSpec(top_k=fields.count("num_experts_per_tok", 2), jitter=parts.jitter(fields)),
        experts=parts.swiglu(fields, fields.count("intermediate_size", 14336)),
        losses=parts.pooled_balance(fields),
    )
    factors = {kind: _factors(fields, name) for kind, name in ((LINEAR, "linear_attn"), (FULL, "full_attn"))}
    blocks = _factors(fields, "mlp")
    layers = [
        parts.layer(
            attention if kind == FULL else _lightning(attention.num_heads, attention.head_dim, index, number), moe
        ).model_copy(
            update={
                "norm_placement": "stream",
                "attention_factors": factors[kind],
                "feed_forward_factors": blocks,
            }
        )
        for index, kind in enumerate(types)
    ]
    fields.expect("hidden_act", "silu", "swish", because="queries, keys and values of lightning attention have SiLU")
    _expect_released(fields, types)
    return parts.model(fields, layers, norm=parts.rms_norm(fields, 1e-5))


def _lightning(heads: int, width: int, index: int, number: int) -> LightningAttentionSpec:
    # Trap: rms_norm_eps does not apply to this norm, and the last layer's rates are those of layer 0 times 2e-5.
    scale = 1 - index / (number - 1 + 1e-5) + 1e-5
    return LightningAttentionSpec(num_heads=heads, head_dim=width, decay_scale=scale, norm=RMSNormSpec(epsilon=1e-6))


def _factors(fields: Fields, name: str) -> BlockFactorsSpec:
    return BlockFactorsSpec(
        stream=fields.number(f"{name}_alpha_factor", 1.0), block=fields.number(f"{name}_beta_factor", 1.0)
    )


def _expect_released(fields: Fields, types: Sequence[str]) -> None:
    """Check options of the first files on the hub, which only their own code implements."""
    fields.expect("postnorm", True)
    fields.expect("shared_intermediate_size", 0)
    fields.expect("attn_type_list", [int(kind == FULL) for kind in types])


_LIGHTNING, _OWN = f"{LAYER}.self_attn", f"{OURS}.attention"

_LIGHTNING_RULES = (
    Fused(
        f"{_LIGHTNING}.qkv_proj.weight",
        "(n x) d",
        tuple(Part(f"{_OWN}.w_{which}", "h", "d n h") for which in ("query", "key", "value")),
        sizes=((f"{_OWN}.output_norm.scale", "n h"),),
    ),
    Tensor(
        f"{_LIGHTNING}.out_proj.weight",
        "d (n h)",
        f"{_OWN}.w_output",
        "n h d",
        sizes=((f"{_OWN}.output_norm.scale", "n h"),),
    ),
)

FAMILY = Family(
    model_types=("minimax",),
    architecture="MiniMaxForCausalLM",
    spec=spec,
    tensors=parts.exported(
        (
            *parts.MODEL,
            *parts.PRE_NORMS,
            *parts.grouped_query(),
            Tensor(f"{_LIGHTNING}.output_gate.weight", "(n h) d", f"{_OWN}.w_gate", "d n h"),
            Tensor(f"{_LIGHTNING}.norm.weight", "(n h)", f"{_OWN}.output_norm.scale", "n h"),
            *parts.router(f"{LAYER}.block_sparse_moe.gate"),
            *parts.experts(f"{LAYER}.block_sparse_moe.experts", ("w1", "w3", "w2")),
            *parts.router(),  # the name in transformers 5
            *parts.experts(),
        ),
        _LIGHTNING_RULES,
    ),
    kept=("*.slope_rate", "*.query_decay", "*.key_decay", "*.diagonal_decay"),
    harmless=("block_size", "max_position_embeddings", "shared_moe_mode"),
)
