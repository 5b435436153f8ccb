"""K-EXAONE. Source: LG AI Research 2026, the released model; transformers, `exaone_moe`."""

from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import ModelSpec, NoPositionSpec


def spec(fields: Fields) -> ModelSpec:
    num_layers = fields.count("num_hidden_layers")
    norm = parts.rms_norm(fields, 1e-5)
    rope = parts.rope(fields)
    moe = parts.grouped_sigmoid(
        fields, num_experts=("num_experts", "num_local_experts"), num_shared=("num_shared_experts", 1), scale=2.5
    )
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    # Layers with full attention have no RoPE, unless no layer has a sliding window.
    everywhere = fields.count_or_null("sliding_window", 4096) is None
    layers = [
        parts.layer(
            parts.attention(
                fields,
                rope if everywhere or window is not None else NoPositionSpec(),
                kv_heads=32,
                window=window,
                qk_norm=norm,
            ),
            dense if is_dense else moe,
        )
        for window, is_dense in zip(_windows(fields, num_layers), _dense_layers(fields, num_layers), strict=True)
    ]
    return parts.model(fields, layers, norm=norm)


def _windows(fields: Fields, num_layers: int) -> list[int | None]:
    pattern = fields.get("sliding_window_pattern")
    if pattern and isinstance(pattern, str) and "layer_types" in fields:
        # "LLLG" in the released files: local and global attention, repeated. Transformers reads only layer_types then.
        slides = [pattern[index % len(pattern)] == "L" for index in range(num_layers)]
    else:
        step = fields.count("sliding_window_pattern", 4)
        slides = [(index + 1) % step > 0 for index in range(num_layers)]
    default = ["sliding_attention" if local else "full_attention" for local in slides]
    return parts.windows(fields, num_layers, default, window=4096, older={"sliding_window_pattern": None})


def _dense_layers(fields: Fields, num_layers: int) -> list[bool]:
    """Return a flag per layer, true if it is dense, from `mlp_layer_types` or `first_k_dense_replace`.

    `is_moe_layer` of released files must agree.
    """
    older = fields.either("first_k_dense_replace", "first_last_k_dense_replace")
    first = fields.integer(older, 1)
    dense = parts.dense_by_type(fields, num_layers, [index < first for index in range(num_layers)], older={older: None})
    fields.expect("is_moe_layer", [not is_dense for is_dense in dense])
    return dense


def _mlx_config(spec: ModelSpec) -> dict[str, Any]:
    return {
        "is_moe_layer": [layer.moe is not None for layer in spec.all_layers],
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


FAMILY = Family(
    model_types=("exaone_moe",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.qk_norm(),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        # Name in the released files; in transformers 5 the bias has the name in parts.router.
        Tensor(f"{LAYER}.mlp.e_score_correction_bias", "e", f"{OURS}.moe.router.selection_bias", "e"),
        *parts.router(),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
    ),
    mlx=(*parts.router(), *parts.switch()),
    mlx_lm=MlxLM(floats=("*.mlp.gate",), config=_mlx_config),
    kept=("*.rotary_emb.inv_freq", "mtp.*"),
    harmless=("max_position_embeddings", "num_nextn_predict_layers"),
)
