"""Step-3.5-Flash, and Step-3.7-Flash's text model in its multimodal wrapper. Source: StepFun 2026, the released models;
transformers, `step3p7`; mlx-lm, `step3p5`."""

from collections.abc import Sequence
from typing import Any

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.family import Family, MlxLM
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.parts import LAYER, OURS
from moezoo.core.huggingface.tensors import Tensor
from moezoo.core.spec import (
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    Llama3ScalingSpec,
    ModelSpec,
    MoESpec,
    RMSNormSpec,
    RoPESpec,
    RouterSpec,
    SelectionBiasSpec,
    SharedExpertsSpec,
)

FULL, SLIDING = "full_attention", "sliding_attention"


def spec(fields: Fields) -> ModelSpec:
    number = fields.count("num_hidden_layers")
    norm = RMSNormSpec(epsilon=fields.number("rms_norm_eps", 1e-5), scale="zero_centred")
    routed, shared = (_limits(fields, name, number) for name in ("swiglu_limits", "swiglu_limits_shared"))
    dense = _dense(fields, number)
    fields.expect("hidden_act", "silu")
    # What the released config.json states, and transformers does not read.
    for name, value in (
        *(("att_impl_type", "GQA"), ("moe_router_activation", "sigmoid"), ("need_fp32_gate", True), ("sink", False)),
        *(("norm_expert_weight", True), ("use_head_wise_attn_gate", True), ("use_moe", True), ("use_qk_norm", True)),
        *(("use_moe_router_bias", True), ("use_rope_layers", []), ("yarn_only_types", [FULL]), ("zero_centered", True)),
    ):
        fields.expect(name, value)
    layers = [
        parts.layer(attention, _feed_forward(fields, shared[index]) if dense[index] else _moe(fields, *limits))
        for index, (attention, *limits) in enumerate(
            zip(_attentions(fields, number, norm), routed, shared, strict=True)
        )
    ]
    return parts.model(fields, layers, norm=norm)


def _per_layer(
    fields: Fields, name: str, number: int, default: Sequence[Any] | None = None, known: Sequence[Any] = ()
) -> list[Any]:
    """Return a list of one item per layer, without those of the multi-token prediction layers, if they are there."""
    value, more = fields.get(name), fields.integer("num_nextn_predict_layers", 0)
    if isinstance(value, list) and more and len(value) == number + more:
        return fields.items(name, number + more, known=known)[:number]
    return fields.items(name, number, default, known)


def _limits(fields: Fields, name: str, number: int) -> list[float | None]:
    """Return the bound of each layer; 0 and null are none."""
    found = _per_layer(fields, name, number, [0.0] * number)
    if any(item is not None and (type(item) not in (int, float) or not 0 <= item < 1e300) for item in found):
        raise fields.refuse(name, "a number of at least 0 or null per layer")
    return [float(item) if item else None for item in found]


def _dense(fields: Fields, number: int) -> list[bool]:
    """Return dense layers, from `mlp_layer_types` or the numbers of the MoE layers; by default the first three."""
    named, sparse = fields.get("moe_layers_enum"), set(range(3, number))
    if isinstance(named, str):
        words = [word.strip() for word in named.split(",") if word.strip()]
        if not all(word.isdecimal() and len(word) < 7 for word in words):
            raise fields.refuse("moe_layers_enum", "numbers of layers, with commas between them")
        sparse = {int(word) for word in words}
    elif named is not None:
        sparse = set(fields.integers("moe_layers_enum"))
    by_default = ["sparse" if index in sparse else "dense" for index in range(number)]
    types = _per_layer(fields, "mlp_layer_types", number, by_default, ("dense", "sparse"))
    if named is not None and types != by_default:
        raise fields.refuse("mlp_layer_types", "the layers that follow from moe_layers_enum")
    return [kind == "dense" for kind in types]


def _attentions(fields: Fields, number: int, norm: RMSNormSpec) -> list[GroupedQueryAttentionSpec]:
    kinds = _per_layer(fields, "layer_types", number, [FULL] * number, (FULL, SLIDING))
    kv_heads = fields.count(fields.either("num_key_value_heads", "num_attention_groups"), 8)
    width = fields.count("head_dim", 128)
    heads = {FULL: fields.count("num_attention_heads", 64)}
    heads[SLIDING] = _sliding_heads(fields, heads[FULL], kv_heads, width)
    own = {str(index): {"num_attention_heads": heads[SLIDING]} for index in range(number) if kinds[index] == SLIDING}
    fields.expect("per_layer_config", own)
    window = fields.count("sliding_window", 512)
    scaled_for = fields.number("query_pre_attn_scalar", float(width))
    if scaled_for <= 0:
        raise fields.refuse("query_pre_attn_scalar", "a number above 0")
    bias = fields.flag("attention_bias", False)
    found = {
        kind: GroupedQueryAttentionSpec(
            num_heads=heads[kind],
            num_kv_heads=kv_heads,
            head_dim=width,
            position=_rope(fields, kind, kinds, number),
            qk_norm=norm,
            qkv_bias=bias,
            output_bias=bias,
            gate="headwise",
            window=window if kind == SLIDING else None,
            scale=None if scaled_for == width else scaled_for**-0.5,
        )
        for kind in dict.fromkeys(kinds)
    }
    return [found[kind] for kind in kinds]


def _sliding_heads(fields: Fields, heads: int, kv_heads: int, width: int) -> int:
    """Return the number of query heads of sliding layers, from either of its spellings."""
    other = fields.inside("attention_other_setting")
    if other is not None:
        heads = other.count("num_attention_heads", heads)
        for name, value in (("num_attention_groups", kv_heads), ("head_dim", width), ("true_head_dim", width)):
            other.expect(name, value)  # transformers has one for all layers
        other.expect("attention_type", SLIDING)
        other.finish()
        fields.expect("num_sliding_attention_heads", heads)
    return fields.count("num_sliding_attention_heads", heads)


def _rope(fields: Fields, kind: str, kinds: Sequence[str], number: int) -> RoPESpec:
    """Return the RoPE of a kind of layers, from `rope_parameters` or the released lists, which must agree."""
    nested = "rope_parameters" in fields
    if nested and not isinstance(fields.get("rope_theta"), list):
        return parts.rope(fields, fraction=1.0, layer_type=kind)

    def of_kind(name: str, default: float) -> float:
        numbers = zip(_numbers(fields, name, number, default), kinds, strict=True)
        found = {value for value, each in numbers if each == kind}
        if len(found) > 1:
            raise fields.refuse(name, f"one number for all layers of {kind}")
        return found.pop()

    def read(parameters: Any) -> RoPESpec:
        longest = fields.get("max_position_embeddings")
        inner = Fields({"rope_parameters": parameters, "max_position_embeddings": longest}, fields.where)
        return parts.rope(inner, fraction=1.0, layer_type=kind)

    fields.expect("partial_rotary_factor", 1.0)  # the lists say it
    listed = {"rope_theta": of_kind("rope_theta", 1e4), "partial_rotary_factor": of_kind("partial_rotary_factors", 1.0)}
    scaling = fields.get("rope_scaling")
    if isinstance(scaling, dict):
        listed |= scaling if kind == FULL else {}
    found = read(listed)
    if nested and read(fields.get("rope_parameters")) != found:
        raise fields.refuse("rope_parameters", "the same as in rope_theta, partial_rotary_factors and rope_scaling")
    return found


def _numbers(fields: Fields, name: str, number: int, default: float) -> list[float]:
    if not isinstance(fields.get(name), list):
        return [fields.number(name, default)] * number
    found = _per_layer(fields, name, number)
    if any(type(item) not in (int, float) or not 0 < item < 1e300 for item in found):
        raise fields.refuse(name, "a number above 0 per layer")
    return [float(item) for item in found]


def _feed_forward(fields: Fields, limit: float | None) -> GatedFeedForwardSpec:
    """Return the feed-forward of dense layers, which have the shared experts' bounds."""
    return GatedFeedForwardSpec(
        hidden_dim=fields.count("intermediate_size", 11264), limit=limit, bias=fields.flag("mlp_bias", False)
    )


def _moe(fields: Fields, routed: float | None, shared: float | None) -> MoESpec:
    other = routed != shared
    return MoESpec(
        num_experts=fields.count(fields.either("n_routed_experts", "moe_num_experts", "num_local_experts"), 288),
        router=RouterSpec(
            top_k=fields.count(fields.either("num_experts_per_tok", "moe_top_k"), 8),
            score="sigmoid",
            selection_bias=SelectionBiasSpec(),
            scale=fields.number("moe_router_scaling_factor", 1.0),
        ),
        experts=GatedFeedForwardSpec(hidden_dim=fields.count("moe_intermediate_size", 1280), limit=routed),
        shared=SharedExpertsSpec(
            hidden_dim=fields.count(fields.either("share_expert_dim", "share_expert_dims"), 1280),
            bias=fields.flag("mlp_bias", False) or None,
            activation="swiglu" if other else None,
            limit=shared if other else None,
        ),
    )


def _own(spec: ModelSpec) -> list[GroupedQueryAttentionSpec]:
    return [each.attention for each in spec.all_layers if isinstance(each.attention, GroupedQueryAttentionSpec)]


def _config(spec: ModelSpec) -> dict[str, Any]:
    """Return the lists of bounds, of the routed experts and of everything else."""
    bounds: list[tuple[float, float]] = []
    for layer in spec.all_layers:
        routed = 0.0 if layer.moe is None else getattr(layer.moe.experts, "limit", None)
        block = layer.feed_forward if layer.moe is None or layer.moe.shared is None else layer.moe.shared_feed_forward
        bounds.append((routed or 0.0, getattr(block, "limit", None) or 0.0))
    return {
        "swiglu_limits": [routed for routed, _ in bounds],
        "swiglu_limits_shared": [shared for _, shared in bounds],
    }


def _mlx_config(spec: ModelSpec) -> dict[str, Any]:
    """Return the released spellings, which mlx-lm reads."""
    own, sparse = _own(spec), [index for index, layer in enumerate(spec.all_layers) if layer.moe is not None]
    full = next((each for each in own if each.window is None), own[0])
    sliding = next((each for each in own if each.window is not None), own[0])
    moe = next((moe for _, moe in spec.moes), None)
    rotations = [each.position for each in own if isinstance(each.position, RoPESpec)]
    scaling = full.position.scaling if isinstance(full.position, RoPESpec) else None
    if moe is None:
        return {}
    return {
        **_config(spec),
        "attention_other_setting": {
            "attention_type": SLIDING,
            "num_attention_heads": sliding.num_heads,
            "num_attention_groups": sliding.num_kv_heads,
            "head_dim": sliding.head_dim,
        },
        "moe_layers_enum": ",".join(map(str, sparse)),
        "moe_num_experts": moe.num_experts,
        "moe_router_scaling_factor": moe.router.scale,
        "moe_top_k": moe.router.top_k,
        "num_attention_groups": full.num_kv_heads,
        "partial_rotary_factors": [each.fraction for each in rotations],
        "rope_scaling": _llama3(scaling) if isinstance(scaling, Llama3ScalingSpec) else None,
        "rope_theta": [each.base for each in rotations],
        "yarn_only_types": [FULL],
    }


def _llama3(scaling: Llama3ScalingSpec) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
    }


def _refuses(spec: ModelSpec) -> str | None:
    """Return what mlx-lm does not have: biases, a scale of scores, a tied head, other scalings of RoPE than llama3."""
    if not spec.moes:
        return "it has no model without experts"
    rotations = {each.window is None: each.position for each in _own(spec) if isinstance(each.position, RoPESpec)}
    scaled = {full: position.scaling for full, position in rotations.items() if position.scaling is not None}
    if any(each.qkv_bias or each.output_bias or each.scale is not None for each in _own(spec)):
        return "it has neither biases nor a scale of scores"
    if any(layer.feed_forward is not None and layer.feed_forward.bias for layer in spec.all_layers) or any(
        moe.shared is not None and moe.shared_feed_forward.bias for _, moe in spec.moes
    ):
        return "its feed-forwards have no biases"
    if spec.head.kind == "tied":
        return "its head is not tied"
    if scaled.keys() - {True} or not all(isinstance(scaling, Llama3ScalingSpec) for scaling in scaled.values()):
        return "it scales the rotation of full attention alone, as llama3"
    return None


BLOCK, EXPERTS, SHARED = f"{LAYER}.moe", f"{OURS}.moe.experts", f"{OURS}.moe.shared"
ROUTER = f"{OURS}.moe.router"

FAMILY = Family(
    model_types=("step3p5", "step3p7"),
    spec=spec,
    tensors=(
        *parts.MODEL,
        *parts.PRE_NORMS,
        *parts.grouped_query(),
        *parts.qk_norm(),
        Tensor(f"{LAYER}.self_attn.g_proj.weight", "n d", f"{OURS}.attention.w_gate", "d n"),
        *parts.feed_forward(f"{LAYER}.mlp", f"{OURS}.feed_forward"),
        Tensor(f"{BLOCK}.gate.weight", "e d", f"{ROUTER}.w_router", "d e"),
        Tensor(f"{BLOCK}.router_bias", "e", f"{ROUTER}.selection_bias", "e"),
        Tensor(f"{BLOCK}.gate_proj.weight", "e f d", f"{EXPERTS}.w_gate", "e d f"),
        Tensor(f"{BLOCK}.up_proj.weight", "e f d", f"{EXPERTS}.w_up", "e d f"),
        Tensor(f"{BLOCK}.down_proj.weight", "e d f", f"{EXPERTS}.w_down", "e f d"),
        *parts.feed_forward(f"{LAYER}.share_expert", SHARED),
    ),
    mlx=(
        Tensor(f"{LAYER}.mlp.gate.gate.weight", "e d", f"{ROUTER}.w_router", "d e"),
        Tensor(f"{LAYER}.mlp.gate.router_bias", "e", f"{ROUTER}.selection_bias", "e"),
        *parts.switch(),
        *parts.feed_forward(f"{LAYER}.mlp.share_expert", SHARED),
    ),
    mlx_lm=MlxLM(config=_mlx_config, replaces=("rope_theta",), refuses=_refuses, lacks=("step3p7",)),
    kept=("vision_model.*", "vit_large_projector.*"),
    later_layers_kept=True,
    harmless=("max_position_embeddings", "max_seq_len", "moe_every_n_layer", "moe_layer_offset"),
    config=_config,
)
