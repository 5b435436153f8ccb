"""MiMo-V2-Flash. Source: Xiaomi 2026; transformers, `mimo_v2_flash`."""

from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import GroupedQueryAttentionSpec, ModelSpec, RoPESpec, SharedExpertsSpec


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers")
    norm = parts.rms_norm(fields, fields.number("layernorm_epsilon", 1e-5))
    fields.expect("layernorm_epsilon", norm.epsilon)
    full, sliding = _attention(fields, ""), _attention(fields, "swa_")
    moe = parts.grouped_sigmoid(fields, num_shared=("n_shared_experts", 0))
    dense = parts.swiglu(fields, fields.count("intermediate_size"))
    layers = [
        parts.layer(sliding if slides else full, dense if is_dense else moe)
        for slides, is_dense in zip(_sliding(fields, number), _dense(fields, number), strict=True)
    ]
    return parts.model(fields, layers, norm=norm)


def _attention(fields: Fields, prefix: str) -> GroupedQueryAttentionSpec:
    """Return full attention, or sliding-window attention (`swa_`), which has sinks and twice the key/value heads."""
    slides = prefix != ""
    heads = fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads")
    scale = "attention_value_scale"
    size = fields.get("sliding_window_size")  # excludes the current token, unlike sliding_window
    window = fields.count("sliding_window", 129) if size is None else fields.integer("sliding_window_size") + 1
    return GroupedQueryAttentionSpec(
        num_heads=fields.count("swa_num_attention_heads", heads) if slides else heads,
        num_kv_heads=fields.count("swa_num_key_value_heads", 2 * kv_heads) if slides else kv_heads,
        head_dim=fields.count(f"{prefix}head_dim", fields.count("head_dim", 192)),
        value_head_dim=fields.count(f"{prefix}v_head_dim", fields.count("v_head_dim", 128)),
        value_multiplier=1.0 if fields.null(scale) else fields.number(scale, 0.707),
        position=parts.rope(
            fields,
            base=1e4 if slides else 5e6,
            fraction=0.334,
            layer_type="sliding_attention" if slides else "full_attention",
            theta=f"{prefix}rope_theta",
        ),
        window=window if slides else None,
        sinks=fields.flag("add_swa_attention_sink_bias" if slides else "add_full_attention_sink_bias", slides),
        qkv_bias=fields.flag("attention_bias", False),
    )


def _sliding(fields: Fields, number: int) -> list[bool]:
    """Return a flag per layer, true if it has a sliding window.

    It comes from `layer_types` or the hub's `hybrid_layer_pattern` (they must agree); by default all layers except the
    first and every sixth.
    """
    by_default = [index > 0 and (index + 1) % 6 > 0 for index in range(number)]
    pattern = fields.items("hybrid_layer_pattern", number, by_default)
    types = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    types = parts.layer_types(fields, number, types)
    slides = [kind == "sliding_attention" for kind in types]
    fields.expect("hybrid_layer_pattern", [int(each) for each in slides])
    return slides


def _dense(fields: Fields, number: int) -> list[bool]:
    """Return dense layers from `mlp_layer_types` or the hub's `moe_layer_freq` (they must agree), or only the first."""
    frequencies = fields.items("moe_layer_freq", number, [0] + [1] * (number - 1))
    dense = parts.dense_by_type(fields, number, [not each for each in frequencies])
    fields.expect("moe_layer_freq", [int(not each) for each in dense])
    return dense


def _rope(attention: GroupedQueryAttentionSpec) -> RoPESpec:
    assert isinstance(attention.position, RoPESpec)
    return attention.position


def _mlx_config(spec: ModelSpec) -> dict[str, Any]:
    found = [layer.attention for layer in spec.all_layers]
    own = [each for each in found if isinstance(each, GroupedQueryAttentionSpec)]
    full = next((each for each in own if each.window is None), own[0])
    sliding = next((each for each in own if each.window is not None), own[0])
    shared = [moe.shared.num_experts for _, moe in spec.moes if isinstance(moe.shared, SharedExpertsSpec)]
    return {
        "add_full_attention_sink_bias": full.sinks,
        "add_swa_attention_sink_bias": sliding.sinks,
        "hybrid_layer_pattern": [int(each.window is not None) for each in own],
        "layernorm_epsilon": spec.norm.epsilon,
        "moe_layer_freq": [int(layer.moe is not None) for layer in spec.all_layers],
        "n_shared_experts": shared[0] if shared else None,
        "partial_rotary_factor": _rope(full).fraction,
        "rope_theta": _rope(full).base,
        "scoring_func": "sigmoid",
        "sliding_window_size": None if sliding.window is None else sliding.window - 1,
        "swa_head_dim": sliding.head_dim,
        "swa_num_attention_heads": sliding.num_heads,
        "swa_num_key_value_heads": sliding.num_kv_heads,
        "swa_rope_theta": _rope(sliding).base,
        "swa_v_head_dim": sliding.value_dim,
        "topk_method": "noaux_tc",
    }


FAMILY = Family(
    model_types=("mimo_v2_flash",),
    architecture="MiMoV2FlashForCausalLM",
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        Tensor(f"{LAYER}.self_attn.attention_sink_bias", "n", f"{OURS}.attention.sink", "n"),
        Tensor(f"{LAYER}.self_attn.sinks", "n", f"{OURS}.attention.sink", "n"),  # as transformers has it in memory
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        *parts.router(),
        *parts.experts(),
    ),
    mlx=parts.switch(),
    mlx_lm=MlxLM(floats=("*.mlp.gate",), config=_mlx_config, replaces=("n_shared_experts",)),  # 0 of them: null
    kept=("*.rotary_emb.inv_freq", "model.mtp.*"),
    later_layers_kept=True,
    harmless=("attention_chunk_size", "hybrid_block_size", "max_position_embeddings", "sliding_window"),
)
