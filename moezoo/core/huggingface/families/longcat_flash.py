"""LongCat-Flash: each of its layers becomes two of ours, the first with a shortcut.

Source: Meituan 2025, arXiv 2509.01322; transformers, `longcat_flash`.
"""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER
from moezoo.core.huggingface.tensors import Fused, Tensor
from moezoo.core.spec import LayerSpec, ModelSpec, MoESpec, RouterSpec, SelectionBiasSpec, ZeroComputationSpec

_EVEN, _ODD = "layers.{even}", "layers.{odd}"


def spec(fields: Fields) -> ModelSpec:
    width, queries = fields.count("hidden_size"), fields.count("q_lora_rank", 1536)
    head = fields.count("qk_nope_head_dim") + fields.count("qk_rope_head_dim")
    fields.expect("qk_head_dim", head)
    fields.expect("head_dim", fields.count("qk_rope_head_dim"))
    for name in ("mla_scale_q_lora", "mla_scale_kv_lora", "rope_interleave"):
        fields.expect(name, True)
    fields.expect("attention_method", "MLA")
    attention = parts.latent_attention(
        fields,
        parts.rope(fields, base=1e7, layout="interleaved"),
        scale=(width / queries) ** 0.5 / head**0.5,  # includes the constant on queries, sqrt(D / q_lora_rank)
        latent_multiplier=(width / fields.count("kv_lora_rank")) ** 0.5,
    )
    dense = parts.swiglu(fields, fields.count(fields.either("ffn_hidden_size", "intermediate_size")))
    number = fields.count("num_layers")
    fields.expect("num_hidden_layers", 2 * number, number)  # the first is what an export has
    first = LayerSpec(attention=attention, feed_forward=dense, moe=_moe(fields), shortcut=True)
    second = LayerSpec(attention=attention, feed_forward=dense)
    return parts.model(fields, (first, second) * number, norm=parts.rms_norm(fields, 1e-5))


def _moe(fields: Fields) -> MoESpec:
    fields.expect("norm_topk_prob", False, because="transformers ignores it and mlx-lm does not")
    fields.expect("zero_expert_type", "identity")
    copies = fields.integer("zero_expert_num", 256)
    return MoESpec(
        num_experts=fields.count(fields.either("n_routed_experts", "num_local_experts")),
        router=RouterSpec(
            top_k=fields.count(fields.either("moe_topk", "num_experts_per_tok")),
            # Trap: transformers has this bias, does not add it and does not train it; mlx-lm adds it.
            bias=fields.flag("router_bias", False),
            selection_bias=SelectionBiasSpec(),
            renormalize="none",
            scale=fields.number("routed_scaling_factor", 6.0),
        ),
        experts=parts.swiglu(fields, fields.count(fields.either("expert_ffn_hidden_size", "moe_intermediate_size"))),
        zero_computation=ZeroComputationSpec(num_copy=copies, ffn_share=1.0) if copies else None,
    )


def _halves() -> tuple[Fused, ...]:
    found: list[Fused] = []
    for which, ours in enumerate((_EVEN, _ODD)):
        for theirs, norm in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "feed_forward_norm")):
            found.append(Tensor(f"{LAYER}.{theirs}.{which}.weight", "d", f"{ours}.{norm}.scale", "d"))
        found += parts.latent(f"{LAYER}.self_attn.{which}", f"{ours}.attention")
        found += parts.feed_forward(f"{LAYER}.mlps.{which}", f"{ours}.feed_forward")
    return tuple(found)


FAMILY = Family(
    model_types=("longcat_flash",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *_halves(),
        Tensor(f"{LAYER}.mlp.router.classifier.weight", "e d", f"{_EVEN}.moe.router.w_router", "d e"),
        Tensor(f"{LAYER}.mlp.router.classifier.bias", "e", f"{_EVEN}.moe.router.b_router", "e"),
        Tensor(f"{LAYER}.mlp.router.e_score_correction_bias", "e", f"{_EVEN}.moe.router.selection_bias", "e"),
        *parts.experts(ours=f"{_EVEN}.moe.experts"),
    ),
    mlx=(
        *parts.switch(ours=f"{_EVEN}.moe.experts"),
        *parts.absorbed(f"{LAYER}.self_attn.0", f"{_EVEN}.attention"),
        *parts.absorbed(f"{LAYER}.self_attn.1", f"{_ODD}.attention"),
    ),
    kept=(
        "*.rotary_emb.inv_freq",
        # transformers 5.23 also saves gate and up, but no down, of the copy experts.
        "*.mlp.experts.*.gate_proj.weight",
        "*.mlp.experts.*.up_proj.weight",
        "model.mtp.*",
    ),
    harmless=("max_position_embeddings",),
)
