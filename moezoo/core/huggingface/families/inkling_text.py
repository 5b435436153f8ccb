"""Inkling, alone or inside its multimodal wrapper. Source: Thinking Machines 2026; transformers, `inkling`."""

from typing import Any

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
    NoPositionSpec,
    RelativePositionSpec,
    ResidualConvolutionSpec,
    RouterSpec,
    SelectionBiasSpec,
    SharedExpertsSpec,
    TemperatureTuningSpec,
    UntiedHeadSpec,
)

SLIDING, FULL = "hybrid_sliding", "hybrid"
_ALWAYS = {
    "norm_after_topk": True,
    "o_bias": False,
    "q_bias": False,
    "use_embed_norm": True,
    "use_gate_bias": True,
    "use_global_scale": True,
    "use_sconv": True,
}


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers", 66)
    # Fields of the release, and of `_ALWAYS`: transformers has no other.
    fields.expect("gate_activation", "sigmoid")
    fields.expect("final_logit_softcapping")
    for name, value in _ALWAYS.items():
        fields.expect(name, value)
    local = fields.integers("local_layer_ids", [index for index in range(number) if (index + 1) % 6])
    default = [SLIDING if index in local else FULL for index in range(number)]
    types = parts.layer_types(fields, number, default, (FULL, SLIDING), older={"local_layer_ids": None})
    first = fields.integer("dense_mlp_idx", 0)
    dense = parts.dense_by_type(
        fields, number, [index < first for index in range(number)], older={"dense_mlp_idx": None}
    )
    width = fields.count("intermediate_size", 24576)
    moe_width = fields.count("moe_intermediate_size", 3072)
    if "dense_intermediate_size" in fields:  # then the other two names are those of the experts
        width, moe_width = fields.count("dense_intermediate_size"), width
    convolution = ResidualConvolutionSpec(width=fields.count(fields.either("conv_kernel_size", "sconv_kernel_size"), 4))
    feed_forward, moe = parts.swiglu(fields, width), _moe(fields, moe_width)
    kinds = list(zip(types, dense, strict=True))
    built = {}  # each kind once
    for kind, is_dense in dict.fromkeys(kinds):
        attention = _attention(fields, convolution, sliding=kind == SLIDING)
        if is_dense:
            layer = LayerSpec(attention=attention, feed_forward=feed_forward, feed_forward_scale=True)
        else:
            layer = LayerSpec(attention=attention, moe=moe)
        built[kind, is_dense] = layer.model_copy(update={"output_convolution": convolution})
    layers = [built[each] for each in kinds]
    model = parts.model(fields, layers, norm=parts.rms_norm(fields))
    multiplier = fields.number(fields.either("logits_mup_width_multiplier", "embedding_multiplier"), 24.0)
    vocab = fields.count("vocab_size", 201024)
    unpadded = fields.count_or_null("unpadded_vocab_size") or vocab
    return model.model_copy(
        update={
            "embedding_norm": True,
            "head": UntiedHeadSpec(unused=max(0, vocab - unpadded)),
            "multipliers": MultipliersSpec(logits=1 / multiplier),
        }
    )


def _attention(fields: Fields, convolution: ResidualConvolutionSpec, *, sliding: bool) -> GroupedQueryAttentionSpec:
    """Return the attention of sliding or of full layers, which differ in heads, extent and temperature."""
    prefix = "swa_" if sliding else ""
    window = fields.count(fields.either("sliding_window_size", "sliding_window"), 512)
    extent, floor = fields.count("rel_extent", 1024), fields.count_or_null("log_scaling_n_floor")
    alpha, width = fields.number("log_scaling_alpha", 0.1), fields.count(f"{prefix}head_dim", 128)
    tuning = None if floor is None else TemperatureTuningSpec(form="log", floor_length=floor, scale=alpha)
    return GroupedQueryAttentionSpec(
        num_heads=fields.count(f"{prefix}num_attention_heads", 64),
        num_kv_heads=fields.count(f"{prefix}num_key_value_heads", 16 if sliding else 8),
        head_dim=width,
        position=NoPositionSpec(),
        qk_norm=parts.rms_norm(fields),
        scale=1 / width,
        window=window if sliding else None,
        relative=RelativePositionSpec(dim=fields.count("d_rel", 16), extent=window if sliding else extent),
        kv_convolution=convolution,
        temperature_tuning=None if sliding else tuning,
    )


def _moe(fields: Fields, width: int) -> MoESpec:
    fields.expect("shared_expert_sink", True)  # transformers has nothing else
    return MoESpec(
        num_experts=fields.count(fields.either("n_routed_experts", "num_local_experts"), 256),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 6),
            score="sigmoid",
            selection_bias=SelectionBiasSpec(),
            scale=fields.number("route_scale", 8.0),
            learned_scale=True,
        ),
        experts=parts.swiglu(fields, width),
        shared=SharedExpertsSpec(kind="sink", num_experts=fields.count("n_shared_experts", 2), hidden_dim=width),
    )


def config(spec: ModelSpec) -> dict[str, Any]:
    """Return the number of ids that have logits, of which only the difference from the vocabulary is in the spec."""
    return {"unpadded_vocab_size": spec.num_logits}


def convolution(theirs: str, ours: str, axes: str) -> Fused:
    """Return the rule for the filters of a short convolution; `axes` are those of its features."""
    ours_axes = f"w {axes}"
    return Tensor(f"{theirs}.conv1d.weight", f"({axes}) 1 w", f"{ours}.conv", ours_axes)


ATTENTION, MOE = f"{OURS}.attention", f"{OURS}.moe"
SHARED = ((f"{MOE}.router.w_shared", "d s"),)


def tensors() -> tuple[Fused, ...]:
    """Return the rules with transformers' names in memory."""
    mlp, shared = f"{LAYER}.mlp", f"{LAYER}.mlp.shared_experts"
    return (
        *parts.MODEL,
        Tensor("model.embed_tokens.embed_norm.weight", "d", "embedding_norm.scale", "d"),
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.qk_norm(),
        Tensor(f"{LAYER}.self_attn.r_proj.weight", "(n r) d", f"{ATTENTION}.relative.w_feature", "d n r"),
        Tensor(f"{LAYER}.self_attn.rel_logits_proj.proj", "r t", f"{ATTENTION}.relative.profile", "r t"),
        convolution(f"{LAYER}.self_attn.k_sconv", f"{ATTENTION}.key_convolution", "m h"),
        convolution(f"{LAYER}.self_attn.v_sconv", f"{ATTENTION}.value_convolution", "m h"),
        convolution(f"{LAYER}.attn_sconv", f"{OURS}.attention_convolution", "d"),
        convolution(f"{LAYER}.mlp_sconv", f"{OURS}.feed_forward_convolution", "d"),
        Fused(
            f"{mlp}.gate.weight", "x d", (Part(f"{MOE}.router.w_router", "e", "d e"), Part(SHARED[0][0], "s", "d s"))
        ),
        Tensor(f"{mlp}.gate.e_score_correction_bias", "e", f"{MOE}.router.selection_bias", "e"),
        Tensor(f"{mlp}.gate.global_scale", "o", f"{MOE}.router.scale", "o"),
        parts.gate_and_up(f"{mlp}.experts.gate_up_proj", "e x d", f"{MOE}.experts"),
        Tensor(f"{mlp}.experts.down_proj", "e d f", f"{MOE}.experts.w_down", "e f d"),
        Tensor(f"{shared}.gate_proj", "s f d", f"{MOE}.shared.w_gate", "d (s f)", sizes=SHARED),
        Tensor(f"{shared}.up_proj", "s f d", f"{MOE}.shared.w_up", "d (s f)", sizes=SHARED),
        Tensor(f"{shared}.down_proj", "s d f", f"{MOE}.shared.w_down", "(s f) d", sizes=SHARED),
        *parts.feed_forward(mlp, f"{OURS}.feed_forward"),
        Tensor(f"{mlp}.global_scale", "o", f"{OURS}.feed_forward_scale", "o"),
    )


LLM = "model.llm.layers.{layer}"


def released() -> tuple[Fused, ...]:
    """Return the rules with the names of released files, those that Inkling 2 has too."""
    experts = f"{LLM}.mlp.experts"
    return (
        Tensor("model.llm.embed.weight", "v d", "embedding.weight", "v d"),
        Tensor("model.llm.embed_norm.weight", "d", "embedding_norm.scale", "d"),
        Tensor("model.llm.norm.weight", "d", "final_norm.scale", "d"),
        Tensor("model.llm.unembed.weight", "v d", "head.w_head", "d v"),
        Tensor(f"{LLM}.attn_norm.weight", "d", f"{OURS}.attention_norm.scale", "d"),
        Tensor(f"{LLM}.mlp_norm.weight", "d", f"{OURS}.feed_forward_norm.scale", "d"),
        Tensor(f"{LLM}.attn.wq_du.weight", "(n h) d", f"{ATTENTION}.w_query", "d n h"),
        Tensor(f"{LLM}.attn.wk_dv.weight", "(m h) d", f"{ATTENTION}.w_key", "d m h"),
        Tensor(f"{LLM}.attn.wv_dv.weight", "(m h) d", f"{ATTENTION}.w_value", "d m h"),
        Tensor(f"{LLM}.attn.wr_du.weight", "(n r) d", f"{ATTENTION}.relative.w_feature", "d n r"),
        Tensor(f"{LLM}.attn.wo_ud.weight", "d (n h)", f"{ATTENTION}.w_output", "n h d"),
        Tensor(f"{LLM}.attn.rel_logits_proj.proj", "r t", f"{ATTENTION}.relative.profile", "r t"),
        Tensor(f"{LLM}.attn.k_sconv.weight", "(m h) 1 w", f"{ATTENTION}.key_convolution.conv", "w m h"),
        Tensor(f"{LLM}.attn.v_sconv.weight", "(m h) 1 w", f"{ATTENTION}.value_convolution.conv", "w m h"),
        Tensor(f"{LLM}.attn_sconv.weight", "d 1 w", f"{OURS}.attention_convolution.conv", "w d"),
        Tensor(f"{LLM}.mlp_sconv.weight", "d 1 w", f"{OURS}.feed_forward_convolution.conv", "w d"),
        Tensor(f"{LLM}.mlp.gate.bias", "e", f"{MOE}.router.selection_bias", "e"),
        interleaved(f"{experts}.w13_weight", "e (f x) d", f"{MOE}.experts", "e d f"),
        Tensor(f"{experts}.w2_weight", "e d f", f"{MOE}.experts.w_down", "e f d"),
    )


def interleaved(theirs: str, axes: str, ours: str, our_axes: str, sizes: tuple[tuple[str, str], ...] = ()) -> Fused:
    """Return the rule for a tensor whose rows are those of gate and up in turns."""
    return Fused(theirs, axes, (Part(f"{ours}.w_gate", "", our_axes), Part(f"{ours}.w_up", "", our_axes)), sizes)


def wrapped() -> tuple[Fused, ...]:
    """Return the rules of released files, which are of the multimodal model."""
    mlp, shared = f"{LLM}.mlp", f"{LLM}.mlp.shared_experts"
    parts_of_gate = (Part(f"{MOE}.router.w_router", "e", "d e"), Part(SHARED[0][0], "s", "d s"))
    return (
        *released(),
        Tensor(f"{LLM}.attn.q_norm.weight", "h", f"{ATTENTION}.query_norm.scale", "h"),
        Tensor(f"{LLM}.attn.k_norm.weight", "h", f"{ATTENTION}.key_norm.scale", "h"),
        Fused(f"{mlp}.gate.weight", "x d", parts_of_gate),
        Tensor(f"{mlp}.gate.global_scale", "o", f"{MOE}.router.scale", "o"),
        interleaved(f"{shared}.shared_w13_weight", "s (f x) d", f"{MOE}.shared", "d (s f)", SHARED),
        Tensor(f"{shared}.shared_w2_weight", "s d f", f"{MOE}.shared.w_down", "(s f) d", sizes=SHARED),
        interleaved(f"{mlp}.w13_dn.weight", "(f x) d", f"{OURS}.feed_forward", "d f"),
        Tensor(f"{mlp}.w2_md.weight", "d f", f"{OURS}.feed_forward.w_down", "f d"),
        Tensor(f"{mlp}.global_scale", "o", f"{OURS}.feed_forward_scale", "o"),
    )


FAMILY = Family(
    model_types=("inkling_text", "inkling_mm_model"),
    architecture="InklingForCausalLM",
    spec=spec,
    tensors=(*tensors(), *wrapped()),
    kept=("*.mtp.*", "*vision_tower.*", "*audio_tower.*", "model.visual.*", "model.audio.*"),
    config=config,
    harmless=(
        "audio_config",
        "chain_hidden_post_norm",
        "max_position_embeddings",
        "model_max_length",
        "number_of_conv_states",
        "rms_norm_eps_moe_gate",
        "tie_word_embeddings",
        "vision_config",
    ),
)
