"""Options of OLMoE, DBRX, MiMo-V2 and Gemma 4 beyond those in the fixtures."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moezoo.core.backend import check_length
from moezoo.core.errors import DataError, SpecError
from moezoo.core.huggingface.checkpoint import open_checkpoint
from moezoo.core.huggingface.family import family_of
from moezoo.core.huggingface.fields import Fields
from moezoo.core.spec import DynamicScalingSpec, LongRoPEScalingSpec, ModelSpec
from tests.support.fixtures import read_fixture, write_described

OLMOE = {
    "model_type": "olmoe",
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA = {
    "model_type": "gemma4_text",
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 12,
    "hidden_size_per_layer_input": 0,
}


def spec_of(config: dict[str, Any], max_length: int | None = None) -> ModelSpec:
    fields = Fields(json.loads(json.dumps(config)), "config.json", max_length)
    return family_of(fields).spec_of(fields)


def described(case: str, **changes: Any) -> dict[str, Any]:
    return read_fixture(case).description["hub_config"] | changes


def test_olmoe_defaults_are_multi_head_and_no_clip() -> None:
    attention = spec_of(OLMOE).layers[0].attention
    assert (attention.num_kv_heads, attention.head_dim, attention.clip) == (2, 8, None)
    assert attention.qk_norm_over == "projection"
    moe = spec_of(OLMOE | {"norm_topk_prob": True, "clip_qkv": 3, "router_aux_loss_coef": 0}).layers[0]
    assert (moe.moe.router.renormalize, moe.moe.losses, moe.attention.clip) == ("sum", (), 3)


def test_dynamic_rope_is_unscaled_up_to_the_original_length() -> None:
    for name in ("rope_type", "type"):
        spec = spec_of(OLMOE | {"rope_theta": 500.0, "rope_scaling": {name: "dynamic", "factor": 4.0}})
        scaling = spec.layers[0].attention.position.scaling
        assert scaling == DynamicScalingSpec(factor=4, original_length=64, length=64)
        assert spec.max_length == 64


def test_longer_sequences_are_refused_unless_max_length_is_set() -> None:
    config = OLMOE | {"rope_theta": 500.0, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    longer = spec_of(config, 100)
    assert longer.layers[0].attention.position.scaling == DynamicScalingSpec(factor=4, original_length=64, length=100)
    check_length(longer, 100, "x")
    with pytest.raises(
        DataError,
        match=r"at most 64 tokens .* Use fewer tokens, or load the model with a larger max_length\.$",
    ):
        check_length(spec_of(config), 65, "a text of 65")


def test_phimoe_has_an_attention_factor_for_long_sequences() -> None:
    config = described("phimoe")
    original = config["rope_scaling"]["original_max_position_embeddings"]
    short, long = (spec_of(config, length).layers[0].attention.position.scaling for length in (None, original + 1))
    assert short.attention_factor == config["rope_scaling"]["short_mscale"]
    assert long.attention_factor == config["rope_scaling"]["long_mscale"]


def test_longrope_attention_factor_is_that_of_the_maximum_length() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [1, 2, 3, 4]}
    scaling = spec_of(OLMOE | {"original_max_position_embeddings": 16, "rope_scaling": rope}).layers[0].attention
    assert isinstance(scaling.position.scaling, LongRoPEScalingSpec)
    assert scaling.position.scaling.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))
    assert scaling.position.scaling.length == 16


def test_dbrx_reads_rope_theta_from_attn_config_and_refuses_another_outside() -> None:
    config = described("dbrx")
    del config["rope_theta"]
    assert spec_of(config).layers[0].attention.position.base == 5e5
    with pytest.raises(SpecError, match=r"^rope_theta is 500000.0; expected 10000, as outside attn_config \("):
        spec_of(config | {"rope_theta": 1e4})


@pytest.mark.parametrize(("order", "expected"), [(None, ("none", 1.0)), (2.0, ("p_norm", 2.0))])
def test_dbrx_renormalizes_by_a_norm_of_any_order(order: float | None, expected: tuple[str, float]) -> None:
    config = described("dbrx")
    config["ffn_config"] = config["ffn_config"] | {"moe_normalize_expert_weights": order}
    router = spec_of(config).layers[0].moe.router
    assert (router.renormalize, router.renormalize_order) == expected


def test_mimo_has_two_formats_of_layer_patterns_which_must_agree() -> None:
    config = described("mimo_v2_flash")
    without = {key: value for key, value in config.items() if key not in ("layer_types", "mlp_layer_types")}
    assert spec_of(without) == spec_of(config)
    with pytest.raises(SpecError, match=r"hybrid_layer_pattern is \[0, 1, 1\]; expected \[0, 1, 0\]"):
        spec_of(config | {"hybrid_layer_pattern": [0, 1, 1]})
    sliding = spec_of(without | {"swa_num_key_value_heads": 4, "sliding_window_size": 3}).layers[1].attention
    assert (sliding.num_kv_heads, sliding.window, sliding.sinks) == (4, 4, True)
    assert spec_of(without | {"attention_value_scale": None}).layers[0].attention.value_multiplier == 1


def test_gemma_full_attention_layers_have_other_heads() -> None:
    spec = spec_of(GEMMA | {"attention_k_eq_v": True, "num_global_key_value_heads": 1})
    kinds = [layer.attention for layer in spec.all_layers]
    assert [kind.window for kind in kinds] == [512] * 5 + [None, None]  # every sixth, and the last
    assert {(kind.head_dim, kind.num_kv_heads, kind.values_from_keys) for kind in kinds if kind.window} == {
        (8, 2, False)
    }
    assert {(kind.head_dim, kind.num_kv_heads, kind.values_from_keys) for kind in kinds[5:]} == {(12, 1, True)}
    assert (kinds[5].position.base, kinds[5].position.fraction_of, kinds[0].position.base) == (1e6, "pairs", 1e4)
    saved = {key: value for key, value in GEMMA.items() if key != "global_head_dim"}
    saved |= {"per_layer_config": {"5": {"head_dim": 12}, "6": {"head_dim": 12}}}
    assert spec_of(saved) == spec_of(GEMMA)


def test_gemma_last_layers_share_keys_of_the_previous_layer_of_their_type() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"] + ["full_attention"] * 3
    spec = spec_of(GEMMA | {"layer_types": types, "num_kv_shared_layers": 3, "use_double_wide_mlp": True})
    assert [layer.attention.keys_of_layer for layer in spec.all_layers] == [None] * 4 + [1] * 3
    assert [layer.feed_forward.hidden_dim for layer in spec.all_layers] == [8] * 4 + [16] * 3
    with pytest.raises(SpecError, match=r"num_kv_shared_layers is 6; expected fewer"):
        spec_of(GEMMA | {"layer_types": types, "num_kv_shared_layers": 6})


def test_gemma_keys_of_layers_may_have_leading_zeros() -> None:
    types = ["sliding_attention", "full_attention"] * 6

    def described(keys: list[str]) -> ModelSpec:
        layers = {"num_hidden_layers": 12, "layer_types": types, "global_head_dim": 16}
        return spec_of(GEMMA | layers | {"per_layer_config": {key: {"head_dim": 16} for key in keys}})

    padded = described(["01", "03", "05", "07", "09", "11"])  # as transformers writes them
    assert padded == described(["1", "3", "5", "7", "9", "11"])
    assert [layer.attention.head_dim for layer in padded.all_layers][:2] == [8, 16]
    with pytest.raises(SpecError, match="fields that are unknown"):
        described(["99"])


def test_key_tensors_of_layers_with_shared_keys_are_kept(tmp_path: Path) -> None:
    description = read_fixture("gemma4_text_keys_of_layers").description
    unused = ["model.layers.5.self_attn.k_proj.weight", "model.layers.5.self_attn.k_norm.weight"]
    tensors = description["tensors"] + [[unused[0], "F32", [24, 32], "matrix"], [unused[1], "F32", [12], "norm"]]
    folder = write_described(description | {"tensors": tensors}, tmp_path)
    assert sorted(open_checkpoint(folder).layout.kept_names()) == sorted(unused)


def test_gemma_router_uses_the_epsilon_of_the_norms() -> None:
    moe = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 3}
    spec = spec_of(GEMMA | moe | {"rms_norm_eps": 1e-4})
    assert spec.layers[0].moe.router.input_epsilon == spec.norm.epsilon == 1e-4


def test_gemma_inside_its_wrapper_is_the_same() -> None:
    wrapper = {"model_type": "gemma4", "text_config": GEMMA | {"use_bidirectional_attention": "vision"}}
    wrapper |= {"vision_config": {}, "audio_config": None, "boa_token_id": 7, "eoa_token_index": 8, "dtype": "bfloat16"}
    assert spec_of(wrapper) == spec_of(GEMMA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bidirectional_attention": "all"}, 'use_bidirectional_attention is "all"; expected false or "vision"'),
        ({"hidden_activation": "mish"}, 'hidden_activation is "mish"; expected one of silu'),
        ({"per_layer_config": {"5": {"sliding_window": 3}}}, "unknown for this family: sliding_window 3"),
        ({"per_layer_config": {"9": {"head_dim": 3}}}, 'unknown for this family: 9 {"head_dim": 3}'),
        (
            {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}},
            "expected a partial_rotary_factor only with rope_type",
        ),
        (
            {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 9},
            "vocab_size_per_layer_input is 9; expected 11, as vocab_size",
        ),
    ],
)
def test_unsupported_option_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as seen:
        spec_of(GEMMA | changes)
    assert message in str(seen.value)
