"""gpt-oss, unquantized and MXFP4. Source: OpenAI 2025, arXiv 2508.10925; transformers, `gpt_oss`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Fused, Part, Tensor
from moezoo.core.spec import ClampedSwiGLUSpec, ModelSpec, MoESpec, RoPESpec, RouterSpec, YaRNScalingSpec


def spec(fields: Fields) -> ModelSpec:
    num_layers = fields.count("num_hidden_layers")
    bias = fields.flag("attention_bias", True)
    alternating = ["full_attention" if index % 2 else "sliding_attention" for index in range(num_layers)]
    moe = MoESpec(
        num_experts=fields.count(fields.either("num_local_experts", "num_experts"), 128),
        router=RouterSpec(
            top_k=fields.count(fields.either("num_experts_per_tok", "experts_per_token"), 4),
            bias=True,
            score="none",
            weight="softmax_of_chosen",
            renormalize="none",
        ),
        experts=ClampedSwiGLUSpec(
            hidden_dim=fields.count("intermediate_size"),
            alpha=fields.number("swiglu_alpha", 1.702),
            limit=fields.number("swiglu_limit", 7.0),
        ),
        losses=parts.pooled_balance(fields),
    )
    layers = [
        parts.layer(
            parts.attention(
                fields,
                _rope(fields),
                kv_heads=8,
                head_dim=64,
                window=window,
                sinks=True,
                qkv_bias=bias,
                output_bias=bias,
            ),
            moe,
        )
        for window in parts.windows(fields, num_layers, alternating, window=128)
    ]
    return parts.model(fields, layers, norm=parts.rms_norm(fields, 1e-5))


def _rope(fields: Fields) -> RoPESpec:
    base = 150_000.0
    if "rope_parameters" in fields or "rope_scaling" in fields:
        return parts.rope(fields, base=base)
    # Trap: without these fields transformers uses the released model's YaRN scaling, not unscaled RoPE.
    scaling = YaRNScalingSpec(factor=32.0, original_length=4096, truncate=False)
    return parts.rope(fields, base=base).model_copy(update={"scaling": scaling})


_EXPERTS = f"{LAYER}.mlp.experts"
_OURS = f"{OURS}.moe.experts"


def _interleaved(theirs: str, axes: str, ours_axes: str, which: str = "w") -> Fused:
    """Return the rule for gate and up interleaved per feature."""
    return Fused(
        theirs, axes, (Part(f"{_OURS}.{which}_gate", "", ours_axes), Part(f"{_OURS}.{which}_up", "", ours_axes))
    )


FAMILY = Family(
    model_types=("gpt_oss",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        Tensor(f"{LAYER}.self_attn.sinks", "n", f"{OURS}.attention.sink", "n"),
        *parts.router(f"{LAYER}.mlp.router"),
        Tensor(f"{LAYER}.mlp.router.bias", "e", f"{OURS}.moe.router.b_router", "e"),
        _interleaved(f"{_EXPERTS}.gate_up_proj", "e d (f x)", "e d f"),
        _interleaved(f"{_EXPERTS}.gate_up_proj_bias", "e (f x)", "e f", "b"),
        Tensor(f"{_EXPERTS}.down_proj", "e f d", f"{_OURS}.w_down", "e f d"),
        Tensor(f"{_EXPERTS}.down_proj_bias", "e d", f"{_OURS}.b_down", "e d"),
        # MXFP4: each matrix row in blocks of 32 along the contracted axis.
        _interleaved(f"{_EXPERTS}.gate_up_proj_blocks", "e (f x) d", "e d f"),
        Tensor(f"{_EXPERTS}.down_proj_blocks", "e d f", f"{_OURS}.w_down", "e f d"),
    ),
    mlx=parts.switch(f"{LAYER}.mlp.experts"),
    kept=("*.rotary_emb.inv_freq",),
    harmless=("hidden_act", "initial_context_length", "max_position_embeddings"),  # the activation has its own fields
)
