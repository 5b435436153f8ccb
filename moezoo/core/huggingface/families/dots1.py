"""dots.llm1. Source: rednote 2025, arXiv 2506.05767; transformers, `dots1`."""

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.spec import ModelSpec


def spec(fields: Fields) -> ModelSpec:
    num_layers = fields.count("num_hidden_layers")
    norm = parts.rms_norm(fields)
    bias = fields.flag("attention_bias", False)
    position = parts.rope(fields)
    window = fields.count_or_null("sliding_window", 4096)
    last = num_layers if window is None else fields.integer("max_window_layers", 62)
    slides = ["full_attention" if index < last else "sliding_attention" for index in range(num_layers)]
    moe = parts.grouped_sigmoid(fields, num_shared=("n_shared_experts", 0), renormalize=False)
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    first = fields.integer("first_k_dense_replace", 0)
    fields.expect("moe_layer_freq", 1)
    layers = [
        parts.layer(
            parts.attention(fields, position, window=window, qk_norm=norm, qkv_bias=bias, output_bias=bias),
            dense if index < first else moe,
        )
        for index, window in enumerate(
            parts.windows(fields, num_layers, slides, window=4096, older={"max_window_layers": 62})
        )
    ]
    return parts.model(fields, layers, norm=norm)


FAMILY = Family(
    model_types=("dots1",),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.qk_norm(),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        *parts.router(),
        *parts.experts(),
        *parts.feed_forward(f"{LAYER}.mlp.shared_experts", f"{OURS}.moe.shared"),
    ),
    mlx=parts.switch(f"{LAYER}.mlp.experts"),
    mlx_lm=MlxLM(floats=("*.mlp.gate",)),
    kept=("*.rotary_emb.inv_freq",),
    # transformers has no biases of feed-forwards.
    harmless=("max_position_embeddings", "max_window_layers", "mlp_bias", "use_sliding_window"),
)
