"""Options of Granite, LFM2, Qwen3-Next, Qwen3.5, Hunyuan and Trinity beyond those in the fixtures."""

import json
from typing import Any

import pytest

from moezoo.core.errors import SpecError
from moezoo.core.huggingface.family import family_of
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.mlx_config import with_mlx_spellings
from moezoo.core.spec import (
    GatedDeltaAttentionSpec,
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    Mamba2Spec,
    ModelSpec,
    ShortConvolutionSpec,
)
from tests.support.fixtures import read_fixture


def spec_of(case: str, **changes: Any) -> ModelSpec:
    """Return the spec of a fixture's config with changed fields; `...` removes a field."""
    config = read_fixture(case).description["hub_config"] | changes
    config = {name: value for name, value in config.items() if value is not ...}
    fields = Fields(json.loads(json.dumps(config)), "config.json")
    return family_of(fields).spec_of(fields)


def test_lfm2_convolutions_follow_layer_types() -> None:
    spec = spec_of("lfm2_moe", conv_L_cache=5, conv_bias=True)
    mixers = [layer.attention for layer in spec.all_layers]
    assert mixers[0] == mixers[2] == ShortConvolutionSpec(conv_width=5, bias=True)
    assert isinstance(mixers[1], GroupedQueryAttentionSpec)
    assert [layer.moe is None for layer in spec.all_layers] == [True, False, False, False]


def test_lfm2_has_two_fields_for_a_tied_head() -> None:
    assert spec_of("lfm2_moe", tie_word_embeddings=...).head.kind == "tied"
    assert spec_of("lfm2_moe", tie_word_embeddings=..., tie_embedding=False).head.kind == "untied"
    with pytest.raises(SpecError, match="tie_word_embeddings is true; expected false"):
        spec_of("lfm2_moe", tie_word_embeddings=True, tie_embedding=False)


def test_qwen3_next_full_attention_follows_interval_or_layer_types() -> None:
    for changes, kinds in (
        ({"full_attention_interval": 2, "num_hidden_layers": 5}, "dfdfd"),
        ({"full_attention_interval": ..., "num_hidden_layers": 5}, "dddfd"),
        (
            {"layer_types": ["full_attention", "full_attention", "linear_attention"], "full_attention_interval": ...},
            "ffd",
        ),
    ):
        spec = spec_of("qwen3_5_moe_text", **({"layer_types": ...} | changes))
        found = ["d" if isinstance(each.attention, GatedDeltaAttentionSpec) else "f" for each in spec.all_layers]
        assert "".join(found) == kinds


def test_qwen3_next_default_partial_rotary_factor_is_a_quarter() -> None:
    full = {"layer_types": ["full_attention"] * 3, "full_attention_interval": ...}
    spec = spec_of("qwen3_next", **full, partial_rotary_factor=..., rope_parameters=...)
    assert spec.layers[0].attention.position.fraction == 0.25


def test_hunyuan_has_numbers_per_layer() -> None:
    spec = spec_of(
        "hunyuan_v1_moe",
        moe_topk=[1, 3],
        moe_intermediate_size=[20, 24],
        num_shared_expert=[2, 1],
        intermediate_size=16,
    )
    found = [(m.router.top_k, m.experts.hidden_dim, m.shared_feed_forward.hidden_dim) for m in _moes(spec)]
    assert found == [(1, 20, 32), (3, 24, 16)]
    assert spec_of("hunyuan_v1_moe", use_mixed_mlp_moe=False).layers[0].moe.shared is None
    with pytest.raises(SpecError, match=r"moe_topk is \[1\]; expected a list of 2"):
        spec_of("hunyuan_v1_moe", moe_topk=[1])
    with pytest.raises(SpecError, match=r"moe_topk is \[1, 0\]; expected integers of at least 1"):
        spec_of("hunyuan_v1_moe", moe_topk=[1, 0])


def _moes(spec: ModelSpec) -> list[Any]:
    return [layer.moe for layer in spec.all_layers]


def test_hunyuan_dynamic_rope_with_and_without_alpha() -> None:
    rope = {"type": "dynamic", "alpha": 50.0, "factor": 2.0}
    position = spec_of("hunyuan_v1_moe", rope_scaling=rope, head_dim=12).layers[0].attention.position
    assert position.base == pytest.approx(1e4 * 50 ** (12 / 10))
    assert position.scaling is None
    position = spec_of("hunyuan_v1_moe", rope_scaling=rope | {"alpha": None}).layers[0].attention.position
    assert (position.base, position.scaling.kind) == (1e4, "dynamic")


def test_trinity_uses_rope_only_in_sliding_layers() -> None:
    spec = spec_of("afmoe", layer_types=..., global_attn_every_n_layers=2, num_hidden_layers=4, sliding_window=5)
    found = [(layer.attention.window, layer.attention.position.kind) for layer in spec.all_layers]
    assert found == [(5, "rope"), (None, "none")] * 2
    assert spec.multipliers.embedding == pytest.approx(32**0.5)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("granitemoe", {"logits_scaling": 0}, "logits_scaling is 0; expected a number above 0"),
        ("granitemoe", {"hidden_act": "tanh"}, 'hidden_act is "tanh"; expected one of silu'),
        ("granitemoe", {"num_local_experts": 2}, "router.top_k is 3, but num_experts is 2"),
        (
            "granitemoe_swa",
            {"layer_rope_theta": [0, 0.5, 1e4]},
            "layer_rope_theta is .* expected numbers above 1, or 0",
        ),
        ("granitemoe_swa", {"layer_rope_theta": [0, 1e4]}, "layer_rope_theta is .* expected a list of 3 items"),
        ("hy_v3", {"route_norm": False}, "route_norm is false; expected true"),
        ("hy_v3", {"first_k_dense_replace": 2}, "first_k_dense_replace is 2; expected 1"),
        ("lfm2_moe", {"layer_types": ["conv", "conv", "mamba", "conv"]}, "layer_types is .*one of conv, full"),
        ("lfm2_moe", {"conv_L_cache": 1}, "conv_width: .*greater than or equal to 2, got 1"),
        ("lfm2_moe", {"use_pos_enc": False}, "use_pos_enc is false; expected true"),
        ("qwen3_next", {"hidden_act": "gelu_pytorch_tanh"}, 'expected "silu" or "swish", because causal conv'),
        ("bailing_hybrid", {"q_lora_rank": 8}, "q_lora_rank is 8; expected none, because transformers proj"),
        ("qwen3_5_moe_text", {"attn_output_gate": False}, "attn_output_gate is false; expected true"),
        ("qwen3_5_moe_text", {"norm_topk_prob": False}, "norm_topk_prob is false; expected true"),
        ("hunyuan_v1_moe", {"use_cla": True}, "use_cla is true; expected false"),
        ("hunyuan_v1_moe", {"norm_type": "layer"}, 'norm_type is "layer"; expected "rms" or "hf_rms"'),
        ("hunyuan_v1_moe", {"rope_scaling": {"type": "foo", "alpha": 5.0}}, 'type is "foo"; expected one of default'),
        ("afmoe", {"score_func": "softmax"}, 'score_func is "softmax"; expected "sigmoid"'),
        ("afmoe", {"route_norm": False}, "route_norm is false; expected true"),
        ("afmoe", {"n_group": 2}, "n_group is 2; expected 1"),
    ],
)
def test_unsupported_option_is_refused_by_name(case: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(case, **changes)


def test_granite_hybrids_without_experts_have_their_shared_feed_forward_alone() -> None:
    spec = spec_of(
        "granitemoehybrid",
        num_local_experts=0,
        layer_types=...,
        layers_block_type=["mamba", "attention", "mamba"],
    )
    assert {layer.feed_forward for layer in spec.all_layers} == {GatedFeedForwardSpec(hidden_dim=28)}
    assert [isinstance(layer.attention, Mamba2Spec) for layer in spec.all_layers] == [True, False, True]


def test_the_width_of_granites_state_space_heads_follows_from_the_model() -> None:
    assert spec_of("granitemoehybrid", mamba_d_head="auto") == spec_of("granitemoehybrid")
    with pytest.raises(SpecError, match=r"mamba_d_head is 9; expected \"auto\" or 8"):
        spec_of("granitemoehybrid", mamba_d_head=9)
    with pytest.raises(SpecError, match="mamba_n_heads is 7; expected a divisor of mamba_expand"):
        spec_of("granitemoehybrid", mamba_n_heads=7)


def test_limits_of_steps_are_two_numbers() -> None:
    for limits, expected in (
        ([0.1, {"__float__": "Infinity"}], (0.1, None)),
        (None, (0.0, None)),
        ([0, 2], (0.0, 2.0)),
    ):
        mixer = spec_of("granitemoehybrid", time_step_limit=limits).layers[0].attention
        assert isinstance(mixer, Mamba2Spec)
        assert (mixer.min_step, mixer.max_step) == expected
    for limits in ("none", [1], [-1, 2], [0, "inf"]):
        with pytest.raises(SpecError, match=r"time_step_limit is .*; expected two numbers"):
            spec_of("granitemoehybrid", time_step_limit=limits)


def test_nemotron_layers_follow_a_list_or_a_pattern() -> None:
    listed, pattern = spec_of("nemotron_h"), {"layers_block_type": ..., "hybrid_override_pattern": "MEM*-E"}
    assert spec_of("nemotron_h", **pattern) == listed
    assert spec_of("nemotron_h", hybrid_override_pattern="MEM*-E") == listed
    assert len(spec_of("nemotron_h", layers_block_type=...).all_layers) == 4
    with pytest.raises(SpecError, match=r"hybrid_override_pattern is .*; expected the layers of layers_block_type"):
        spec_of("nemotron_h", hybrid_override_pattern="ME")
    with pytest.raises(SpecError, match=r"hybrid_override_pattern is .*; expected each layer to be one of"):
        spec_of("nemotron_h", **pattern | {"hybrid_override_pattern": "MX"})


def test_jambas_layers_follow_periods_and_offsets() -> None:
    spec = spec_of("jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=4, expert_layer_offset=2)
    assert [layer.attention.kind == "mamba" for layer in spec.all_layers] == [True, False, True, False]
    assert [layer.moe is not None for layer in spec.all_layers] == [False, False, True, False]
    assert not spec_of("jamba", num_experts=1, num_experts_per_tok=1).moes
    assert spec_of("jamba", mamba_dt_rank="auto").layers[0].attention.step_rank == 2
    with pytest.raises(SpecError, match="attn_layer_offset is 3; expected an integer below attn_layer_period = 3"):
        spec_of("jamba", attn_layer_offset=3)


def test_lightning_attention_forgets_more_slowly_in_deeper_layers() -> None:
    spec = spec_of("minimax", layer_types=...)
    assert [layer.attention.kind for layer in spec.all_layers] == ["grouped_query", "lightning"] * 2
    scales = [layer.attention.decay_scale for layer in spec.all_layers[1::2]]
    assert scales == pytest.approx([2 / 3 + 1e-5, 1e-5], abs=1e-5)
    assert {layer.norm_placement for layer in spec.layers} == {"stream"}
    released = {"attn_type_list": [1, 0, 0, 1], "postnorm": True, "shared_intermediate_size": 0}
    assert spec_of("minimax", **released) == spec_of("minimax")
    assert spec_of("minimax", rotary_dim=6).layers[0].attention.position.fraction == 0.5
    with pytest.raises(SpecError, match='hidden_act is "relu2"; expected "silu"'):
        spec_of("minimax", hidden_act="relu2")


def test_a_layer_of_jetmoe_is_two_of_one_router_each() -> None:
    spec = spec_of("jetmoe")
    assert spec.moe_layers == (0, 1, 2, 3)
    heads, experts = spec.all_layers[:2]
    assert (heads.attention.num_heads, heads.routed.num_experts, experts.moe.num_experts) == (15, 5, 5)
    assert [loss.times for _, moe in spec.moes for loss in moe.losses] == [2, 1, 2, 1]
    assert (spec.norm.epsilon, spec.last_norm.epsilon) == (1e-6, 1e-5)
    assert spec_of("jetmoe", rms_norm_eps=1e-6).final_norm is None
    assert not spec_of("jetmoe", aux_loss_coef=0.0).moes[0][1].losses
    with pytest.raises(SpecError, match="num_attention_heads is 3; expected 6"):
        spec_of("jetmoe", num_attention_heads=3)


def test_doge_has_experts_of_one_feature_or_none() -> None:
    moe, dense = spec_of("doge").moes[0][1], spec_of("doge", is_moe=False)
    assert (moe.router.product_keys, moe.experts.kind, moe.experts.hidden_dim) == (True, "silu", 1)
    assert (moe.shared.activation, moe.losses[0].coefficient) == ("swiglu", pytest.approx(0.02 / 6))
    assert not dense.moes
    assert not spec_of("doge", is_moe=...).moes
    assert dense.all_layers[0].feed_forward == moe.shared_feed_forward
    assert dense.all_layers[0].attention == spec_of("doge").all_layers[0].attention
    relu = spec_of("doge", hidden_act="relu2", hidden_dropout=0.1)
    assert (relu.moes[0][1].experts.kind, relu.moes[0][1].shared.activation) == ("relu_squared", "relu_squared_glu")
    assert relu.dropout == 0.1
    with pytest.raises(SpecError, match='hidden_act is "gelu"; expected silu, relu, relu2, or GELU by tanh'):
        spec_of("doge", hidden_act="gelu")
    with pytest.raises(SpecError, match=r"impossible model: .*product_keys is true, but 17 experts are not all pairs"):
        spec_of("doge", num_experts=17)


def test_jamba_for_mlx_lm_says_where_its_experts_are() -> None:
    raw = read_fixture("jamba").description["hub_config"]
    names = ("expert_layer_offset", "expert_layer_period", "mamba_expand")
    fields = Fields({name: value for name, value in raw.items() if name not in names}, "config.json")
    family = family_of(fields)
    spec = family.spec_of(Fields(raw, "config.json"))
    written = with_mlx_spellings(family, fields, spec)
    assert family.spec_of(Fields(written, "config.json")) == spec
