"""Inkling 2, alone or inside its multimodal wrapper. Source: Thinking Machines 2026; transformers, `inkling2`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.families import inkling_text
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import OURS
from moezoo.core.huggingface.tensors import Fused, Part, Tensor, beside
from moezoo.core.spec import (
    BlockAttentionResidualSpec,
    GroupedQueryAttentionSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    NoPositionSpec,
    RelativePositionSpec,
    ResidualConvolutionSpec,
    RMSNormSpec,
    RouterSpec,
    SelectionBiasSpec,
    SoftcappedSwiGLUSpec,
    TemperatureTuningSpec,
    UntiedHeadSpec,
)

SLIDING, FULL = inkling_text.SLIDING, inkling_text.FULL


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers", 48)
    default = [FULL if (index + 1) % 6 == 0 else SLIDING for index in range(number)]
    types = parts.layer_types(fields, number, default, (FULL, SLIDING))
    width = fields.count(fields.either("conv_kernel_size", "sconv_kernel_size"), 4)
    moe = _moe(fields)
    layers = [
        LayerSpec(
            attention=_attention(fields, width, sliding=kind == SLIDING),
            moe=moe,
            output_convolution=ResidualConvolutionSpec(width=width, unit_variance=True),
            separate_inputs=kind == FULL,
        )
        for kind in types
    ]
    vocab = fields.count("vocab_size", 201024)
    model = parts.model(fields, layers, norm=parts.rms_norm(fields))
    return model.model_copy(
        update={
            "embedding_norm": True,
            "head": UntiedHeadSpec(unused=max(0, vocab - fields.count("unpadded_vocab_size", 200058))),
            "residual": BlockAttentionResidualSpec(layers_per_block=fields.count("n_layers_per_attn_res_block", 6)),
            "softcap": fields.number("final_logit_softcapping", 30.0),
        }
    )


def _attention(fields: Fields, width: int, *, sliding: bool) -> GroupedQueryAttentionSpec:
    """Return the attention of sliding or of full layers; these have dynamic convolutions and a temperature."""
    prefix = "swa_" if sliding else ""
    window = fields.count(fields.either("sliding_window_size", "sliding_window"), 1024)
    extent = fields.count("rel_extent", 1024)
    tuning = TemperatureTuningSpec(
        form="log",
        floor_length=fields.count("log_scaling_n_floor", 128000),
        scale=fields.number("log_scaling_alpha", 0.1),
    )
    return GroupedQueryAttentionSpec(
        num_heads=fields.count(f"{prefix}num_attention_heads", 48),
        num_kv_heads=fields.count(f"{prefix}num_key_value_heads", 8),
        head_dim=fields.count(f"{prefix}head_dim", 128),
        position=NoPositionSpec(),
        window=window if sliding else None,
        projected_sinks=True,
        gate="elementwise",
        relative=RelativePositionSpec(
            dim=fields.count("d_rel", 16),
            extent=window if sliding else extent,
            l2_clip=fields.number("rel_l2_clip_threshold", 8.0),
        ),
        qk_l2_clip=fields.number("qk_l2_clip_threshold", 22.627416997969522),
        kv_convolution=ResidualConvolutionSpec(width=width, dynamic=not sliding, unit_variance=True),
        value_norm=RMSNormSpec(epsilon=fields.number("rms_norm_eps", 1e-6), scale="none"),
        temperature_tuning=None if sliding else tuning,
    )


def _moe(fields: Fields) -> MoESpec:
    scores = {"sigmoid": "sigmoid", "sqrtsoftplus": "sqrt_softplus"}
    return MoESpec(
        num_experts=fields.count(fields.either("n_routed_experts", "num_local_experts"), 384),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 8),
            score=fields.choice("scoring_func", scores, "sigmoid"),
            selection_bias=SelectionBiasSpec(),
            renormalize_epsilon=1e-20,
            scale=fields.number(fields.either("route_scale", "routed_scaling_factor"), 8.0),
        ),
        experts=SoftcappedSwiGLUSpec(
            hidden_dim=fields.count(fields.either("moe_intermediate_size", "intermediate_size"), 2304),
            gate_softcap=fields.number("mlp_gate_softcap", 4.0),
            up_softcap=fields.number("mlp_up_softcap", 25.0),
        ),
    )


THEIRS, ATTENTION = inkling_text.LLM, f"{OURS}.attention"
FILTERS, SEPARATE = f"{ATTENTION}.key_convolution.w_filter", f"{OURS}.attention_key_norm.scale"


def tensors() -> tuple[Fused, ...]:
    """Return the rules, with the names that transformers writes: those of released files."""
    queries, after = "model.llm.attn_res.attn_queries.{layer}", "layers.{next}"
    readers = (
        f"{after}.attention_residual.query",
        f"{after}.attention_key_residual.query",
        f"{after}.attention_value_residual.query",
    )
    embedding, *others = inkling_text.released()
    return (
        embedding,
        *beside(readers[1], "d", [Fused(queries, "x d", tuple(Part(name, "", "d") for name in readers))]),
        Fused(queries, "d", (Part(readers[0], "", "d"),), unless=readers[1]),
        Tensor("model.llm.attn_res.mlp_queries.{layer}", "d", f"{OURS}.feed_forward_residual.query", "d"),
        Tensor("model.llm.attn_res.output_query", "d", "final_residual.query", "d"),
        *beside(
            SEPARATE,
            "d",
            (
                Tensor(f"{THEIRS}.q_input_norm.weight", "d", f"{OURS}.attention_norm.scale", "d"),
                Tensor(f"{THEIRS}.k_input_norm.weight", "d", SEPARATE, "d"),
                Tensor(f"{THEIRS}.v_input_norm.weight", "d", f"{OURS}.attention_value_norm.scale", "d"),
            ),
        ),
        *beside(
            FILTERS,
            "d m w",
            (
                Tensor(f"{THEIRS}.attn.k_sconv.static_w", "w (m h)", f"{ATTENTION}.key_convolution.conv", "w m h"),
                Tensor(f"{THEIRS}.attn.v_sconv.static_w", "w (m h)", f"{ATTENTION}.value_convolution.conv", "w m h"),
                Tensor(f"{THEIRS}.attn.k_sconv.weight_proj", "(m w) d", FILTERS, "d m w"),
                Tensor(
                    f"{THEIRS}.attn.v_sconv.weight_proj", "(m w) d", f"{ATTENTION}.value_convolution.w_filter", "d m w"
                ),
            ),
        ),
        *others,
        Tensor(f"{THEIRS}.attn.gate_attn.weight", "(n h) d", f"{ATTENTION}.w_gate", "d n h"),
        Tensor(f"{THEIRS}.attn.attn_sink_proj.weight", "n d", f"{ATTENTION}.w_sink", "d n"),
        Tensor(f"{THEIRS}.attn.q_l2_clip.scale", "n h", f"{ATTENTION}.query_scale", "n h"),
        Tensor(f"{THEIRS}.attn.rel_l2_clip.scale", "n r", f"{ATTENTION}.relative.scale", "n r"),
        Tensor(f"{THEIRS}.mlp.gate.weight", "e d", f"{OURS}.moe.router.w_router", "d e"),
    )


FAMILY = Family(
    model_types=("inkling2_text", "inkling2"),
    architecture="Inkling2ForCausalLM",
    spec=spec,
    tensors=tensors(),
    kept=("*.mtp.*", "*vision_tower.*", "model.visual.*"),
    config=inkling_text.config,
    undeclared={"quant_method": "mxfp8", "weight_block_size": [1, 32]},
    harmless=(
        "hidden_act",
        "image_token_id",
        "max_position_embeddings",
        "model_max_length",
        "number_of_conv_states",
        "tie_word_embeddings",
        "vision_config",
    ),
)
