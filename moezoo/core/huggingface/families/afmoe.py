"""Trinity. Source: Arcee AI 2025; transformers, `afmoe`."""

import math
from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import (
    ModelSpec,
    MoESpec,
    MultipliersSpec,
    NoPositionSpec,
    RouterSpec,
    SelectionBiasSpec,
    SharedExpertsSpec,
)


def spec(fields: Fields) -> ModelSpec:
    num_layers, num_dense = fields.count("num_hidden_layers"), fields.integer("num_dense_layers", 1)
    norm, bias = parts.rms_norm(fields, 1e-5), fields.flag("attention_bias", False)
    options: dict[str, Any] = {"qk_norm": norm, "qkv_bias": bias, "output_bias": bias, "gate": "elementwise"}
    window = fields.count("sliding_window", 1024)
    mixers = {
        "full_attention": parts.attention(fields, NoPositionSpec(), head_dim=128, **options),
        "sliding_attention": parts.attention(fields, parts.rope(fields), head_dim=128, window=window, **options),
    }
    every = "global_attn_every_n_layers"
    step = fields.count(every, 4)
    kinds = ["sliding_attention" if (index + 1) % step else "full_attention" for index in range(num_layers)]
    moe, dense = _moe(fields), parts.swiglu(fields, fields.count("intermediate_size"))
    layers = [
        parts.layer(mixers[kind], dense if index < num_dense else moe).model_copy(update={"norm_placement": "sandwich"})
        for index, kind in enumerate(parts.layer_types(fields, num_layers, kinds, older={every: 4}))
    ]
    mup = fields.flag("mup_enabled", False)
    multipliers = MultipliersSpec(embedding=math.sqrt(fields.count("hidden_size")) if mup else 1.0)
    return parts.model(fields, layers, norm=norm).model_copy(update={"multipliers": multipliers})


def _moe(fields: Fields) -> MoESpec:
    width, shared = fields.count("moe_intermediate_size"), fields.integer("num_shared_experts", 2)
    # Trap: released configs have these fields, but transformers ignores them and uses these values.
    ignored = "transformers ignores it"
    fields.expect("score_func", "sigmoid", because=ignored)
    fields.expect("route_norm", True, because=ignored)
    for name in ("n_group", "topk_group", "num_expert_groups", "num_limited_groups"):
        fields.expect(name, 1, because=ignored)
    return MoESpec(
        num_experts=fields.count(fields.either("num_experts", "num_local_experts"), 64),
        router=RouterSpec(
            top_k=fields.count("num_experts_per_tok", 6),
            score="sigmoid",
            selection_bias=SelectionBiasSpec(),
            renormalize_epsilon=1e-20,
            scale=fields.number("route_scale", 1.0),
        ),
        experts=parts.swiglu(fields, width),
        shared=SharedExpertsSpec(num_experts=shared, hidden_dim=width) if shared else None,
    )


EXPERT_BIAS = Tensor(f"{LAYER}.mlp.expert_bias", "e", f"{OURS}.moe.router.selection_bias", "e")

FAMILY = Family(
    model_types=("afmoe",),
    spec=spec,
    tensors=parts.exported(
        (
            *parts.MODEL,
            Tensor(f"{LAYER}.input_layernorm.weight", "d", f"{OURS}.attention_norm.scale", "d"),
            Tensor(f"{LAYER}.post_attention_layernorm.weight", "d", f"{OURS}.attention_output_norm.scale", "d"),
            Tensor(f"{LAYER}.pre_mlp_layernorm.weight", "d", f"{OURS}.feed_forward_norm.scale", "d"),
            Tensor(f"{LAYER}.post_mlp_layernorm.weight", "d", f"{OURS}.feed_forward_output_norm.scale", "d"),
            *parts.grouped_query(),
            *parts.qk_norm(),
            Tensor(f"{LAYER}.self_attn.gate_proj.weight", "(n h) d", f"{OURS}.attention.w_gate", "d n h"),
            *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
            *parts.router(f"{LAYER}.mlp.router.gate"),
            EXPERT_BIAS,
            *parts.experts(),
            *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
        ),
        (EXPERT_BIAS,),
    ),
    mlx=(EXPERT_BIAS, *parts.switch(f"{LAYER}.mlp.experts")),
    kept=("*.rotary_emb.inv_freq",),
    harmless=("load_balance_coeff", "max_position_embeddings", "use_grouped_mm"),
)
