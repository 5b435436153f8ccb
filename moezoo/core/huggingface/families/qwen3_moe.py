"""Qwen3-MoE, and the same text model inside Qwen3-Omni: its thinker, or the whole with talker and code2wav.
Source: Qwen Team 2025, arXiv 2505.09388 and 2509.17765; transformers, `qwen3_moe`, `qwen3_omni_moe`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.spec import ModelSpec, MoESpec, RoPESpec, RouterSpec

OMNI = ("qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "qwen3_omni_moe")


def spec(fields: Fields) -> ModelSpec:
    if fields.model_type in OMNI:
        fields.expect("use_qk_norm", True)
        fields.expect("shared_expert_intermediate_size", 0)
        return qwen3(fields, multimodal_rope(fields, 1e6), renormalize=fields.flag("norm_topk_prob", True))
    # Trap: transformers ignores sliding_window unless use_sliding_window is true; then it applies to every layer.
    window = fields.count_or_null("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None
    return qwen3(fields, parts.rope(fields), renormalize=fields.flag("norm_topk_prob", False), window=window)


def multimodal_rope(fields: Fields, base: float) -> RoPESpec:
    """Return the RoPE of the text model in a wrapper. For text, the three positions of multimodal RoPE are equal."""
    fields.expect("use_sliding_window", False)
    fields.expect("qkv_bias", False)
    return parts.rope(fields, base=base, harmless=("mrope_section", "mrope_interleaved", "interleaved"))


def qwen3(
    fields: Fields,
    position: RoPESpec,
    *,
    renormalize: bool,
    window: int | None = None,
    kv_heads: int = 4,
    num_experts: int = 128,
    top_k: int = 8,
) -> ModelSpec:
    """Return the model; `kv_heads`, `num_experts` and `top_k` are defaults of absent fields."""
    bias = fields.flag("attention_bias", False)
    norm = parts.rms_norm(fields)
    attention = parts.attention(
        fields, position, kv_heads=kv_heads, qk_norm=norm, qkv_bias=bias, output_bias=bias, window=window
    )
    moe = MoESpec(
        num_experts=fields.count(fields.either("num_experts", "num_local_experts"), num_experts),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", top_k), renormalize="sum" if renormalize else "none"
        ),
        experts=parts.swiglu(fields, fields.count("moe_intermediate_size")),
        losses=parts.pooled_balance(fields),
    )
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    layers = [
        parts.layer(attention, dense if is_dense else moe)
        for is_dense in parts.dense_layers(fields, fields.count("num_hidden_layers"))
    ]
    return parts.model(fields, layers, norm=norm)


# All but the experts.
SHARED = (
    *parts.MODEL,
    *parts.PRE_NORMS,
    *parts.grouped_query(),
    *parts.qk_norm(),
    *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
    *parts.router(),
)

FAMILY = Family(
    model_types=("qwen3_moe", *OMNI),
    spec=spec,
    tensors=(*SHARED, *parts.experts()),
    mlx=parts.switch(),
    mlx_lm=MlxLM(without=OMNI),
    kept=("*.rotary_emb.inv_freq", "*visual.*", "*audio_tower.*", "talker.*", "code2wav.*"),
    harmless=("max_position_embeddings", "max_window_layers", "sliding_window"),
)
