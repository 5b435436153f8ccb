"""Options of families with grouped-query attention: the parsed spec of each, and those that are refused by name.

Configs are those of fixtures with changed fields. The fixtures themselves are compared with transformers elsewhere.
"""

import json
from typing import Any

import pytest

from moezoo.core.errors import SpecError
from moezoo.core.huggingface.family import family_of
from moezoo.core.huggingface.fields import Fields
from moezoo.core.spec import (
    ClampedSwiGLUSpec,
    GatedFeedForwardSpec,
    GroupedTopKChoiceSpec,
    JitterSpec,
    Llama3ScalingSpec,
    ModelSpec,
    MoESpec,
    NoPositionSpec,
    PooledBalanceLossSpec,
    RMSNormSpec,
    RoPESpec,
    SharedExpertsSpec,
    TemperatureTuningSpec,
    TiedHeadSpec,
    TopKChoiceSpec,
    YaRNScalingSpec,
)
from tests.support.fixtures import read_fixture

LLAMA3 = {"rope_type": "llama3", "factor": 16.0, "original_max_position_embeddings": 8192}


def spec_of(case: str, **changes: Any) -> ModelSpec:
    """Return the spec of a fixture's config with changed fields; `...` removes a field."""
    return read(read_fixture(case).description["config"] | changes)


def read(config: dict[str, Any]) -> ModelSpec:
    values = {name: value for name, value in config.items() if value is not ...}
    fields = Fields(json.loads(json.dumps(values)), "config.json")
    return family_of(fields).spec_of(fields)


def attentions(spec: ModelSpec) -> list[Any]:
    return [layer.attention for layer in spec.all_layers]


def first_moe(spec: ModelSpec) -> MoESpec:
    return spec.moes[0][1]


def windows(spec: ModelSpec) -> list[int | None]:
    return [attention.window for attention in attentions(spec)]


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("mixtral", {"hidden_act": "tanh"}, 'hidden_act is "tanh"; expected one of silu'),
        ("mixtral", {"sliding_window": 0}, "sliding_window is 0; expected an integer of at least 1, or null"),
        ("mixtral", {"num_experts": 8}, "num_experts is 8; expected 7"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0; expected an integer of at least 1"),
        ("mixtral", {"num_experts_per_tok": 9}, "router.top_k is 9, but num_experts is 7"),
        (
            "mixtral",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling is .* the same as in rope_parameters",
        ),
        ("mixtral", {"rope_parameters": {"rope_type": "foo"}}, 'rope_type is "foo"; expected one of default'),
        ("mixtral", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; expected 1.0"),
        (
            "mixtral",
            {"router_jitter_noise": 1.5},
            "router_jitter_noise is 1.5; expected a number of at least 0 and below 1",
        ),
        ("qwen3_moe", {"mlp_only_layers": [0.5]}, "mlp_only_layers is .* a list of integers"),
        ("gpt_oss", {"experts_per_token": 2}, "experts_per_token is 2; expected 3"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window is null; expected a number, because layer_types"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 2}, "layer_types is .* full_attention, sliding_attention"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 3}, "layer_types is .* one of full_attention"),
        ("qwen2_moe", {"layer_types": ["full_attention"]}, "layer_types is .* a list of 3"),
        ("glm4_moe", {"scoring_func": "softmax"}, 'scoring_func is "softmax"; expected "sigmoid"'),
        ("glm4_moe", {"topk_method": "greedy"}, 'topk_method is "greedy"; expected "noaux_tc"'),
        ("glm4_moe", {"n_group": 3}, "router.choice.num_groups is 3, which does not divide the number of experts 8"),
        ("minimax_m2", {"scoring_func": "softmax"}, 'scoring_func is "softmax"; expected "sigmoid"'),
        ("minimax_m2", {"use_routing_bias": False}, "use_routing_bias is false; expected true"),
        ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm is false; expected true"),
        ("minimax_m2", {"qk_norm_type": "per_head"}, 'qk_norm_type is "per_head"; expected "per_layer"'),
        ("minimax_m2", {"shared_intermediate_size": 8}, "shared_intermediate_size is 8; expected 0"),
        ("minimax_m2", {"attn_type_list": [1, 0]}, r"attn_type_list is \[1, 0\]; expected \[1, 1\]"),
        ("minimax_m2", {"sliding_window": 8}, "sliding_window is 8; expected none"),
        ("minimax_m2", {"layernorm_mlp_beta": 3.0}, "layernorm_mlp_beta is 3.0; expected 1.0"),
        ("ernie4_5_moe", {"moe_gate": "top2_fused"}, 'moe_gate is "top2_fused"; expected "topk"'),
        ("ernie4_5_moe", {"moe_gate_act": "sigmoid"}, 'moe_gate_act is "sigmoid"; expected "softmax"'),
        ("ernie4_5_moe", {"moe_use_aux_free": False}, "moe_use_aux_free is false; expected true"),
        ("ernie4_5_moe", {"compression_ratio": 2.0}, "compression_ratio is 2.0; expected 1.0"),
        ("ernie4_5_moe", {"moe_num_experts": [7, 7]}, r"moe_num_experts is \[7, 7\]; expected an integer"),
        ("llama4_text", {"attention_chunk_size": None}, "attention_chunk_size is null; expected a number, because"),
        ("llama4_text", {"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\]; expected a list of 4"),
        ("llama4_text", {"layer_types": ["sliding_attention"] * 4}, "layer_types is .* full_attention, chunked_att"),
        ("dots1", {"scoring_func": "softmax"}, 'scoring_func is "softmax"; expected "sigmoid" or "noaux_tc"'),
        ("dots1", {"moe_layer_freq": 2}, "moe_layer_freq is 2; expected 1"),
        ("exaone_moe", {"is_moe_layer": [True] * 4}, r"is_moe_layer is .* expected \[false, true, true, true\]"),
        ("exaone_moe", {"first_last_k_dense_replace": 2}, "first_last_k_dense_replace is 2; expected 1"),
        (
            "exaone_moe",
            {"layer_types": ..., "sliding_window": 8},
            'sliding_window_pattern is "LLLG"; expected an integer',
        ),
        ("exaone_moe", {"sliding_window": None}, "sliding_window is null; expected a number, because layer_types"),
        (
            "exaone_moe",
            {"mlp_layer_types": ["dense", "moe", "sparse", "sparse"]},
            "mlp_layer_types is .* dense, sparse",
        ),
        ("solar_open", {"use_qk_norm": True}, "use_qk_norm is true; expected false, because transformers has no such"),
        ("solar_open", {"first_k_dense_replace": 1}, "first_k_dense_replace is 1; expected 0"),
        ("mellum", {"rope_theta": 1e4}, "rope_theta is 10000.0; expected none"),
        ("mellum", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters is .* an object with sliding_attention"),
        (
            "mellum",
            {"rope_parameters": {"sliding_attention": {}, "full_attention": {"rope_type": "yarn", "truncate": False}}},
            "truncate is false; expected true",
        ),
        ("flex_olmo", {"clip_qkv": 8.0}, "unknown for this family: clip_qkv 8.0"),
    ],
)
def test_refused(case: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(case, **changes)


@pytest.mark.parametrize(
    "case", ["dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "gpt_oss", "llama4_text", "mellum"]
)
def test_an_unknown_field_is_refused_in_every_family(case: str) -> None:
    with pytest.raises(SpecError, match='unknown for this family: surprise "on"'):
        spec_of(case, surprise="on")
    assert spec_of(case, surprise=None) == spec_of(case)


def test_generation_fields_are_harmless_only_with_default_values() -> None:
    assert spec_of("mixtral", top_k=50, num_beams=1, is_decoder=False, tokenizer_class="X") == spec_of("mixtral")
    with pytest.raises(SpecError, match="unknown for this family: is_decoder true, top_k 8"):
        spec_of("mixtral", top_k=8, is_decoder=True)


# --- options of several families -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "absent", "null"),
    [
        ("mixtral", (8, 8), (4, 8)),  # (key/value heads, head width); num_attention_heads 8, hidden_size 64
        ("qwen3_moe", (4, 8), (8, 8)),
        ("gpt_oss", (8, 64), (8, 8)),
        ("minimax_m2", (8, 128), (8, 8)),
        ("llama4_text", (8, 128), (8, 8)),
        ("dots1", (8, 8), (8, 8)),
        ("flex_olmo", (8, 8), (8, 8)),
        ("mellum", (4, 128), (8, 8)),
        ("exaone_moe", (32, 8), (8, 8)),
    ],
)
def test_absent_head_counts_are_the_familys_default_and_null_is_derived(case, absent, null) -> None:
    wide = {
        "num_attention_heads": 32 if case == "exaone_moe" else 8,
        "hidden_size": 256 if case == "exaone_moe" else 64,
    }
    wide |= {"rotary_dim": ..., "rope_parameters": ...} if case == "minimax_m2" else {}
    first = attentions(spec_of(case, **wide, num_key_value_heads=..., head_dim=...))[0]
    assert (first.num_kv_heads, first.head_dim) == absent
    if case == "minimax_m2":
        return  # its partial rotary factor depends on head_dim, which must be a number
    other = attentions(spec_of(case, **wide, num_key_value_heads=None, head_dim=None))[0]
    assert (other.num_kv_heads, other.head_dim) == (wide["num_attention_heads"], 8)


@pytest.mark.parametrize("case", ["dots1", "exaone_moe", "solar_open", "glm4_moe"])
def test_one_group_is_plain_top_k(case: str) -> None:
    router = first_moe(spec_of(case, n_group=1, topk_group=1)).router
    assert router.choice == TopKChoiceSpec()
    grouped = first_moe(spec_of(case, n_group=4, topk_group=2)).router
    assert grouped.choice == GroupedTopKChoiceSpec(num_groups=4, keep=2, group_value="top2")


@pytest.mark.parametrize("case", ["dots1", "exaone_moe", "solar_open", "glm4_moe", "deepseek_v3"])
def test_sigmoid_routing_is_renormalized_or_not_and_scaled(case: str) -> None:
    renormalized = first_moe(spec_of(case, norm_topk_prob=True, routed_scaling_factor=1.25)).router
    assert (renormalized.renormalize, renormalized.renormalize_epsilon, renormalized.scale) == ("sum", 1e-20, 1.25)
    plain = first_moe(spec_of(case, norm_topk_prob=False)).router
    assert (plain.renormalize, plain.renormalize_epsilon) == ("none", 0.0)
    absent = first_moe(spec_of(case, norm_topk_prob=..., routed_scaling_factor=...)).router
    assert absent.renormalize == ("none" if case == "dots1" else "sum")
    assert absent.scale == (2.5 if case in ("exaone_moe", "deepseek_v3") else 1.0)
    assert renormalized.selection_bias is not None


@pytest.mark.parametrize("case", ["qwen2_moe", "qwen3_moe", "mellum", "flex_olmo"])
def test_softmax_routing_is_renormalized_or_not(case: str) -> None:
    assert first_moe(spec_of(case, norm_topk_prob=True)).router.renormalize == "sum"
    assert first_moe(spec_of(case, norm_topk_prob=False)).router.renormalize == "none"
    assert first_moe(spec_of(case, norm_topk_prob=...)).router.renormalize == ("sum" if case == "mellum" else "none")


@pytest.mark.parametrize(
    ("case", "default"),
    [
        ("mixtral", 0.001),
        ("qwen2_moe", 0.001),
        ("gpt_oss", 0.001),
        ("minimax_m2", 0.001),
        ("ernie4_5_moe", 0.001),
        ("mellum", 0.001),
        ("flex_olmo", 0.01),
    ],
)
def test_the_familys_auxiliary_loss(case: str, default: float) -> None:
    assert first_moe(spec_of(case, router_aux_loss_coef=0.9)).losses == (PooledBalanceLossSpec(coefficient=0.9),)
    assert first_moe(spec_of(case, router_aux_loss_coef=...)).losses == (PooledBalanceLossSpec(coefficient=default),)
    assert first_moe(spec_of(case, router_aux_loss_coef=0)).losses == ()


@pytest.mark.parametrize(("case", "name"), [("mixtral", "router_jitter_noise"), ("minimax_m2", "router_jitter_noise")])
def test_jitter_noise_applies_to_the_input_of_the_whole_moe_layer(case: str, name: str) -> None:
    assert first_moe(spec_of(case, **{name: 0.1})).router.jitter == JitterSpec(of="mixture", amount=0.1)
    assert first_moe(spec_of(case)).router.jitter is None


@pytest.mark.parametrize(
    ("case", "qkv", "output"),
    [
        *[(case, True, True) for case in ("gpt_oss", "llama4_text", "dots1", "mellum", "flex_olmo", "qwen3_moe")],
        ("glm4_moe", True, False),
        ("solar_open", True, False),
    ],
)
def test_attention_bias(case: str, qkv: bool, output: bool) -> None:
    for attention in attentions(spec_of(case, attention_bias=True)):
        assert (attention.qkv_bias, attention.output_bias) == (qkv, output)
    for attention in attentions(spec_of(case, attention_bias=False)):
        assert (attention.qkv_bias, attention.output_bias) == (False, False)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("deepseek_v4", {"attention_bias": True, "n_shared_experts": 2}),
        ("deepseek_v32", {"mlp_bias": True}),
        ("dots1", {"mlp_bias": True}),
        ("dots3_note_text", {"mlp_bias": True}),
        ("glm_moe_dsa", {"mlp_bias": True}),
        ("gpt_oss", {"hidden_act": "gelu"}),
        ("lfm2_moe", {"hidden_act": "gelu"}),
        ("minimax_m2", {"attention_bias": True}),
        ("nemotron_h", {"attention_bias": True, "n_shared_experts": 2, "residual_in_fp32": True}),
    ],
)
def test_a_field_that_transformers_ignores_and_tensors_decide_has_no_effect(case: str, changes: dict[str, Any]) -> None:
    assert spec_of(case, **changes) == spec_of(case)


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "qwen2_moe", "glm4_moe", "llama4_text", "dots1", "flex_olmo"])
def test_a_tied_head(case: str) -> None:
    assert spec_of(case, tie_word_embeddings=True).head == TiedHeadSpec()
    assert spec_of(case, tie_word_embeddings=...).head.kind == "untied"


@pytest.mark.parametrize(
    ("case", "base"),
    [
        ("mixtral", 1e6),
        ("gpt_oss", 150_000.0),
        ("qwen2_moe", 1e4),
        ("glm4_moe", 1e4),
        ("minimax_m2", 5e6),
        ("ernie4_5_moe", 5e5),
        ("llama4_text", 5e5),
        ("dots1", 1e4),
        ("exaone_moe", 1e4),
        ("solar_open", 1e6),
        ("flex_olmo", 5e5),
    ],
)
def test_default_rope_of_each_family(case: str, base: float) -> None:
    assert attentions(spec_of(case, rope_parameters=...))[0].position.base == base
    old = spec_of(case, rope_parameters=..., rope_theta=7e5, rope_scaling={"type": "linear", "factor": 2.0})
    position = attentions(old)[0].position
    assert (position.base, position.scaling.kind) == (7e5, "linear")


@pytest.mark.parametrize(("case", "default"), [("glm4_moe", 0.5), ("solar_open", 1.0), ("minimax_m2", 0.5)])
def test_partial_rotary_factor(case: str, default: float) -> None:
    default_spec = spec_of(case, rope_parameters=...)
    assert attentions(default_spec)[0].position.fraction == default
    outside = spec_of(case, rope_parameters=..., partial_rotary_factor=1 / 3, rotary_dim=...)
    inside = spec_of(case, rope_parameters={"partial_rotary_factor": 1 / 3}, partial_rotary_factor=..., rotary_dim=...)
    assert attentions(outside)[0].position.fraction == attentions(inside)[0].position.fraction == 1 / 3


def test_activations_of_transformers_with_several_names() -> None:
    kinds = {"gelu": "exact_geglu", "gelu_python": "exact_geglu", "relu": "reglu"}
    for name, kind in (kinds | dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate"), "geglu")).items():
        assert first_moe(spec_of("mixtral", hidden_act=name)).experts.kind == kind
    assert first_moe(spec_of("mixtral", hidden_act="relu2")).experts == GatedFeedForwardSpec(
        kind="relu_squared_glu", hidden_dim=20
    )


# --- family by family ------------------------------------------------------------------------------------------------


def test_gpt_oss_defaults() -> None:
    spec = spec_of("gpt_oss", rope_parameters=..., layer_types=..., sliding_window=..., num_hidden_layers=3)
    assert windows(spec) == [128, None, 128]
    expected = RoPESpec(base=150_000.0, scaling=YaRNScalingSpec(factor=32, original_length=4096, truncate=False))
    assert all(attention.position == expected and attention.sinks for attention in attentions(spec))


def test_gpt_oss_clamp() -> None:
    spec = spec_of("gpt_oss", swiglu_alpha=1.5, swiglu_limit=5.0)
    assert first_moe(spec).experts == ClampedSwiGLUSpec(hidden_dim=20, alpha=1.5, limit=5.0)


def test_qwen2_windows_are_in_every_second_layer_below_max_window_layers() -> None:
    slides = {"use_sliding_window": True, "layer_types": ..., "num_hidden_layers": 5, "max_window_layers": 3}
    assert windows(spec_of("qwen2_moe", **slides, sliding_window=8)) == [8, None, 8, None, None]
    assert windows(spec_of("qwen2_moe", **slides, sliding_window=...)) == [4096, None, 4096, None, None]
    assert windows(spec_of("qwen2_moe", **slides | {"use_sliding_window": False}, sliding_window=8)) == [None] * 5


def test_qwen2_dense_layers_and_shared_expert() -> None:
    spec = spec_of("qwen2_moe", mlp_only_layers=[3], decoder_sparse_step=2, num_hidden_layers=4, layer_types=...)
    assert spec.moe_layers == (1,)
    assert first_moe(spec).shared == SharedExpertsSpec(kind="sigmoid_gated", hidden_dim=28)
    assert not attentions(spec_of("qwen2_moe", qkv_bias=False))[0].qkv_bias


def test_qwen3_window_is_one_for_all_layers() -> None:
    assert set(windows(spec_of("qwen3_moe", use_sliding_window=True, sliding_window=8))) == {8}
    assert set(windows(spec_of("qwen3_moe", use_sliding_window=True, sliding_window=None))) == {None}
    assert set(windows(spec_of("qwen3_moe", use_sliding_window=False, sliding_window=8))) == {None}


def test_glm4_qk_norm_is_optional() -> None:
    assert attentions(spec_of("glm4_moe", use_qk_norm=...))[0].qk_norm is None
    assert attentions(spec_of("glm4_moe"))[0].qk_norm == RMSNormSpec(epsilon=1e-5)
    assert spec_of("glm4_moe", first_k_dense_replace=2).moe_layers == (2,)
    assert spec_of("glm4_moe", num_nextn_predict_layers=0) == spec_of("glm4_moe")


def test_a_released_config_of_minimax() -> None:
    released = {
        "attn_type_list": [1, 1],
        "layernorm_full_attention_beta": 1.0,
        "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_beta": 1.0,
        "mlp_intermediate_size": 8192,
        "mtp_transformer_layers": 1,
        "num_mtp_modules": 3,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
        "swa_rope_theta": -1.0,
        "use_mtp": True,
    }
    assert spec_of("minimax_m2", **released) == spec_of("minimax_m2")


def test_ernie_dense_layers() -> None:
    def sparse(**changes: Any) -> tuple[int, ...]:
        return spec_of("ernie4_5_moe", num_hidden_layers=6, **changes).moe_layers

    assert sparse(moe_layer_end_index=-1) == sparse(moe_layer_end_index=...) == (1, 2, 3, 4, 5)
    assert sparse(moe_layer_end_index=4, moe_layer_interval=2) == (1, 3)
    assert sparse(moe_layer_end_index=4, moe_layer_start_index=0) == (0, 1, 2, 3, 4)


def test_ernie_floor_shared_experts_and_head() -> None:
    router = first_moe(spec_of("ernie4_5_moe", moe_norm_min=0.5)).router
    assert (router.score, router.renormalize_epsilon, router.renormalize_floor) == ("softmax", 0.5, True)
    assert not first_moe(spec_of("ernie4_5_moe", moe_norm_min=0)).router.renormalize_floor
    assert first_moe(spec_of("ernie4_5_moe", moe_num_shared_experts=0)).shared is None
    assert spec_of("ernie4_5_moe", tie_word_embeddings=...).head == TiedHeadSpec()


def test_ernie_biases_are_everywhere_except_in_routed_experts() -> None:
    spec = spec_of("ernie4_5_moe", use_bias=True)
    dense = next(layer.feed_forward for layer in spec.all_layers if layer.feed_forward is not None)
    moe, attention = first_moe(spec), attentions(spec)[0]
    assert dense.bias
    assert moe.shared_feed_forward.bias
    assert not moe.experts.bias
    assert (attention.qkv_bias, attention.output_bias) == (True, True)
    assert spec.head == TiedHeadSpec(bias=True)


def test_llama4_layers_by_interval_or_list() -> None:
    absent = {"no_rope_layers": ..., "layer_types": ..., "moe_layers": ..., "num_hidden_layers": 6}
    spec = spec_of("llama4_text", **absent, no_rope_layer_interval=3, interleave_moe_layer_step=3)
    assert [isinstance(attention.position, NoPositionSpec) for attention in attentions(spec)] == [
        False,
        False,
        True,
    ] * 2
    assert [attention.chunk for attention in attentions(spec)] == [10, 10, None] * 2
    assert spec.moe_layers == (2, 5)
    empty = spec_of("llama4_text", **absent | {"no_rope_layers": [], "moe_layers": []}, interleave_moe_layer_step=...)
    assert [isinstance(attention.position, NoPositionSpec) for attention in attentions(empty)].count(True) == 1
    assert empty.moe_layers == ()
    mixed = spec_of("llama4_text", layer_types=["full_attention"] * 2 + ["chunked_attention"] * 2)
    assert [attention.chunk for attention in attentions(mixed)] == [None, None, 10, 10]


def test_llama4_norm_and_temperature() -> None:
    rotated, plain = attentions(spec_of("llama4_text"))[0], attentions(spec_of("llama4_text"))[3]
    assert (rotated.qk_norm, rotated.qk_norm_after_rotation) == (RMSNormSpec(epsilon=1e-5, scale="none"), True)
    assert (plain.qk_norm, plain.temperature_tuning) == (None, TemperatureTuningSpec(floor_length=8, scale=0.1))
    assert rotated.temperature_tuning is None
    assert spec_of("llama4_text", attn_temperature_tuning=4) == spec_of("llama4_text")
    without = attentions(spec_of("llama4_text", use_qk_norm=False, attn_temperature_tuning=False))
    assert {(attention.qk_norm, attention.temperature_tuning) for attention in without} == {(None, None)}


def test_llama4_scout_rope_scaling_has_no_ramp() -> None:
    spec = spec_of("llama4_text", rope_parameters=LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 1.0})
    scaling = Llama3ScalingSpec(factor=16, original_length=8192, high_frequency_factor=1)
    assert attentions(spec)[0].position == RoPESpec(base=5e5, layout="interleaved", scaling=scaling)


def test_llama4_in_its_multimodal_wrapper() -> None:
    text = read_fixture("llama4_text").description["config"]
    generation = {
        "length_penalty": 1.0,
        "top_p": 1.0,
        "_attn_implementation_autoset": True,
        "for_llm_compressor": False,
    }
    outer = {"model_type": "llama4", "boi_token_index": 1, "image_token_index": 2, "vision_config": {"hidden_size": 8}}
    assert read(outer | {"text_config": text | generation}) == spec_of("llama4_text")
    tied = outer | {"text_config": text, "tie_word_embeddings": True}
    assert read(tied).head == TiedHeadSpec()
    with pytest.raises(SpecError, match="unknown for this family: surprise 1"):
        read(outer | {"text_config": text, "surprise": 1})


def test_dots1_windows_and_shared_experts() -> None:
    assert windows(spec_of("dots1", layer_types=..., max_window_layers=2)) == [None, None, 8]
    assert windows(spec_of("dots1", layer_types=..., sliding_window=None)) == [None] * 3
    assert windows(spec_of("dots1", layer_types=..., sliding_window=..., max_window_layers=...)) == [None] * 3
    assert first_moe(spec_of("dots1", n_shared_experts=None)).shared is None
    assert spec_of("dots1", first_k_dense_replace=...).moe_layers == (0, 1, 2)


def test_exaone_uses_rope_in_layers_with_a_window_or_in_all() -> None:
    def rotated(**changes: Any) -> list[bool]:
        return [isinstance(attention.position, RoPESpec) for attention in attentions(spec_of("exaone_moe", **changes))]

    assert rotated() == [True, True, True, False]
    full = {"layer_types": ["full_attention"] * 4, "sliding_window_pattern": ...}
    assert rotated(**full) == [False] * 4
    assert rotated(**full, sliding_window=None) == [True] * 4
    assert windows(spec_of("exaone_moe", layer_types=..., sliding_window_pattern=2)) == [8, None, 8, None]
    assert windows(spec_of("exaone_moe", layer_types=..., sliding_window_pattern=...)) == [8, 8, 8, None]


def test_exaone_dense_layers() -> None:
    assert spec_of("exaone_moe", mlp_layer_types=..., first_k_dense_replace=2).moe_layers == (2, 3)
    released = {"mlp_layer_types": ..., "first_k_dense_replace": ..., "first_last_k_dense_replace": 1}
    assert spec_of("exaone_moe", **released, is_moe_layer=[False, True, True, True]) == spec_of("exaone_moe")


def test_mellum_rope_by_layer_type() -> None:
    default_spec = attentions(spec_of("mellum", rope_parameters=...))
    assert [attention.position.base for attention in default_spec] == [1e4, 5e5, 1e4]
    assert windows(spec_of("mellum", layer_types=..., rope_parameters=...)) == [None] * 3
    assert windows(spec_of("mellum", sliding_window=...)) == [1024, None, 1024]
    assert spec_of("mellum", mlp_layer_types=...).moe_layers == (0, 1, 2)
    assert spec_of("mellum", num_nextn_predict_layers=1, mtp_layer_types=["sliding_attention"]) == spec_of("mellum")


def test_flex_olmo_has_post_norms() -> None:
    spec = spec_of("flex_olmo")
    assert {layer.norm_placement for layer in spec.all_layers} == {"post"}
    assert {attention.qk_norm_over for attention in attentions(spec)} == {"projection"}


def test_kimi_k2_rope() -> None:
    scaling = {"type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = {"rope_scaling": scaling | {"original_max_position_embeddings": 4096}, "rope_theta": 5e4}
    spec = spec_of("deepseek_v3", model_type="kimi_k2", rope_parameters=..., **config)
    assert attentions(spec)[0].position.scaling == YaRNScalingSpec(
        factor=32, original_length=4096, beta_fast=1, mscale=1, mscale_all_dim=1
    )


def test_a_balance_loss_that_transformers_does_not_have_is_noted() -> None:
    config = read_fixture("deepseek_v3").description["config"] | {"aux_loss_alpha": 0.001, "seq_aux": True}
    fields = Fields(config, "config.json")
    assert family_of(fields).spec_of(fields) == spec_of("deepseek_v3")
    assert fields.notes == ["aux_loss_alpha 0.001 is not supported: moezoo trains without it"]
