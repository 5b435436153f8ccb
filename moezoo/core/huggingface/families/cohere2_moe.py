"""Command A+, North Mini Code. Source: Cohere 2026, the released models; transformers, `cohere2_moe`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import (
    LayerNormSpec,
    ModelSpec,
    MoESpec,
    MultipliersSpec,
    NoPositionSpec,
    NormSpec,
    RouterSpec,
    SharedExpertsSpec,
)


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers")
    # In released files: the only forms that transformers has.
    for name in ("use_gated_activation", "use_parallel_block"):
        fields.expect(name, True)
    for name in ("layer_norm_bias", "use_parallel_embedding", "use_qk_norm"):
        fields.expect(name, False)
    fields.expect("position_embedding_type", "rope_gptj")
    fields.expect("rotary_pct", 1.0)
    rope, bias = parts.rope(fields, layout="interleaved"), fields.flag("attention_bias", False)
    first_dense = fields.integer("first_k_dense_replace", 0)
    dense = parts.dense_by_type(fields, number, [index < first_dense for index in range(number)])
    step = fields.count("prefix_dense_sliding_window_pattern", 1)
    windows = _windows(fields, number, first_dense, step)
    moe = _moe(fields)
    feed_forward = parts.swiglu(
        fields, fields.count_or_null("prefix_dense_intermediate_size") or fields.count("intermediate_size")
    )
    # Layers with full attention have no RoPE, unless they are dense ones without a pattern of their own.
    layers = [
        parts.layer(
            parts.attention(
                fields,
                rope if window is not None or (is_dense and step == 1) else NoPositionSpec(),
                head_dim=128,
                window=window,
                qkv_bias=bias,
                output_bias=bias,
            ),
            feed_forward if is_dense else moe,
        ).model_copy(update={"norm_placement": "parallel"})
        for window, is_dense in zip(windows, dense, strict=True)
    ]
    multipliers = MultipliersSpec(logits=fields.number("logit_scale", 0.0625))
    model = parts.model(fields, layers, norm=_norm(fields), tied=True)
    return model.model_copy(update={"multipliers": multipliers})


def _windows(fields: Fields, number: int, first_dense: int, dense_step: int) -> list[int | None]:
    """Return the windows; by default every fourth layer after the first dense ones has none, counted from there."""
    name = "sliding_window_pattern"
    step = fields.count(name, 4)
    slides = [(index + 1) % dense_step > 0 for index in range(first_dense)]
    slides += [(index + 1) % step > 0 for index in range(number - first_dense)]
    default = ["sliding_attention" if each else "full_attention" for each in slides]
    return parts.windows(fields, number, default, window=4096, older={name: 4})


def _norm(fields: Fields) -> NormSpec:
    epsilon = fields.number("layer_norm_eps", 1e-5)
    return (
        parts.rms_norm(fields) if fields.get("rms_norm_eps") is not None else LayerNormSpec(epsilon=epsilon, bias=False)
    )


def _moe(fields: Fields) -> MoESpec:
    width, shared = fields.count("intermediate_size"), fields.integer("num_shared_experts", 0)
    weight = fields.choice(
        "expert_selection_fn", {"softmax": "softmax_of_chosen", "sigmoid": "sigmoid_of_chosen"}, "softmax"
    )
    divided = fields.flag("norm_topk_prob", True) and weight == "sigmoid_of_chosen"
    kind = fields.choice("shared_expert_combination_strategy", {"average": "average", "sum": "sum"}, "average")
    return MoESpec(
        num_experts=fields.count(fields.either("num_experts", "num_local_experts"), 8),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 2),
            score="none",
            weight=weight,
            renormalize="sum" if divided else "none",
        ),
        experts=parts.swiglu(fields, width),
        shared=SharedExpertsSpec(kind=kind, num_experts=shared, hidden_dim=width) if shared else None,
    )


FAMILY = Family(
    model_types=("cohere2_moe",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        Tensor(f"{LAYER}.input_layernorm.weight", "d", f"{OURS}.attention_norm.scale", "d"),
        *parts.grouped_query(),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        *parts.router(),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
    ),
    kept=("*vision_tower.*", "*multi_modal_projector.*"),
    harmless=("cache_implementation", "max_position_embeddings"),
)
