"""Options of families whose kinds of layers have their own positions, or none: the parsed spec, and what is refused."""

from typing import Any

import pytest

from moezoo.core.errors import SpecError
from moezoo.core.spec import LayerNormSpec, ModelSpec, NoPositionSpec
from tests.huggingface.test_family_options import attentions, first_moe, read, spec_of, windows
from tests.support.fixtures import read_fixture


def rotated(spec: ModelSpec) -> list[bool]:
    return [not isinstance(attention.position, NoPositionSpec) for attention in attentions(spec)]


@pytest.mark.parametrize(
    ("case", "number", "sliding", "dense"),
    [
        ("flint", 11, [2, 3, 4, 6, 7, 8], [0, 1]),  # 9 is a fourth one, 10 the last
        ("kolibri1", 6, [0, 1, 2, 3, 5], []),
        ("cohere2_moe", 5, [0, 1, 2, 4], []),
    ],
)
def test_layers_by_default(case: str, number: int, sliding: list[int], dense: list[int]) -> None:
    absent = ("layer_types", "mlp_layer_types", "mlp_only_layers")
    spec = spec_of(case, num_hidden_layers=number, **dict.fromkeys(absent, ...))
    assert [index for index, window in enumerate(windows(spec)) if window == 8] == sliding
    assert rotated(spec) == [index in sliding for index in range(number)]
    assert [index for index, layer in enumerate(spec.all_layers) if layer.moe is None] == dense


def test_flint_has_no_dense_layer_if_the_list_of_them_is_empty() -> None:
    assert len(spec_of("flint", mlp_only_layers=[]).moes) == 4
    assert [index for index, _ in spec_of("flint", mlp_only_layers=[], decoder_sparse_step=2).moes] == [1, 3]


def test_kolibri_without_a_window_rotates_every_layer() -> None:
    full = ["full_attention"] * 3
    assert rotated(spec_of("kolibri1", layer_types=full)) == [False] * 3
    assert rotated(spec_of("kolibri1", layer_types=full, sliding_window=None)) == [True] * 3


def test_layers_of_cohere_as_on_the_hub() -> None:
    absent: dict[str, Any] = {"layer_types": ..., "mlp_layer_types": ..., "num_hidden_layers": 7}
    spec = spec_of("cohere2_moe", **absent, first_k_dense_replace=2)
    assert [layer.moe is None for layer in spec.all_layers] == [True] * 2 + [False] * 5
    assert windows(spec) == [None, None, 8, 8, 8, None, 8]  # the pattern of four begins after the dense layers
    assert rotated(spec) == [True, True, True, True, True, False, True]
    spec = spec_of("cohere2_moe", **absent, first_k_dense_replace=2, prefix_dense_sliding_window_pattern=2)
    assert windows(spec)[:2] == [8, None]
    assert rotated(spec)[:2] == [True, False]


def test_options_of_cohere() -> None:
    assert spec_of("cohere2_moe").norm == LayerNormSpec(bias=False)
    assert first_moe(spec_of("cohere2_moe", num_shared_experts=0)).shared is None
    assert attentions(spec_of("cohere2_moe", num_key_value_heads=None))[0].num_kv_heads == 4
    dense = spec_of("cohere2_moe", prefix_dense_intermediate_size=None).all_layers[0].feed_forward
    assert dense is not None
    assert dense.hidden_dim == 20
    for divided, renormalize in ((True, "sum"), (False, "none")):
        spec = spec_of("cohere2_moe", expert_selection_fn="sigmoid", norm_topk_prob=divided)
        assert first_moe(spec).router.renormalize == renormalize


def test_layers_of_dots3_note_by_default() -> None:
    absent = ("layer_types", "per_layer_config", "mlp_layer_types", "rope_parameters", "qk_rope_head_dim", "head_dim")
    spec = spec_of("dots3_note_text", **dict.fromkeys(absent, ...), num_hidden_layers=7, index_head_dim=64)
    assert windows(spec) == [None, None, 8, 8, 8, None, 8]
    assert [attention.indexer is None for attention in attentions(spec)] == [window == 8 for window in windows(spec)]
    assert [layer.moe is None for layer in spec.all_layers] == [True] + [False] * 6
    sliding, full = attentions(spec)[2], attentions(spec)[0]
    assert (sliding.num_heads, sliding.head_dim, sliding.rope_head_dim, sliding.latent_dim) == (64, 192, 64, 1024)
    assert (full.num_heads, full.rope_head_dim) == (4, 64)
    assert (sliding.position.base, full.position.base) == (5e4, 8e7)


def test_dots3_note_as_published_has_its_text_model_at_the_top() -> None:
    config = read_fixture("dots3_note_text").description["hub_config"]
    towers = {"vision_config": {"hidden_size": 24}, "audio_config": {"hidden_size": 16}, "audio_token_id": 3}
    assert read(config | towers | {"model_type": "dots3_note"}) == read(config)
    assert all(attention.indexer is None for attention in attentions(read(config | {"use_dsa": False})))
    assert windows(read(config | {"layer_types": ..., "use_sliding_window": False})) == [None] * 4
    steps = read(config | {"num_hidden_layers": 4, "first_k_dense_replace": 0, "moe_layer_freq": 2})
    assert [index for index, _ in steps.moes] == [0, 2]


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("kolibri1", {"sliding_window": None}, "sliding_window is null; expected a number, because layer_types"),
        ("kolibri1", {"intermediate_size": 3}, "unknown for this family: intermediate_size 3"),
        ("cohere2_moe", {"expert_selection_fn": "sparsemax"}, "expected one of softmax, sigmoid"),
        ("cohere2_moe", {"shared_expert_combination_strategy": "max"}, "expected one of average, sum"),
        ("beam", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters is .* expected an object with "),
        ("dots3_note_text", {"topk_group": 5}, "topk_group is 5; expected at most n_group"),
        ("dots3_note_text", {"num_key_value_heads": 2}, "num_key_value_heads is 2; expected that of each layer to be"),
        ("dots3_note_text", {"swa_kv_lora_rank": 16}, "swa_kv_lora_rank is 16; expected 24"),
        ("dots3_note_text", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters is .* an object with "),
        ("laguna", {"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]; expected \[0\]"),
        ("laguna", {"norm_topk_prob": False}, "norm_topk_prob is false; expected true"),
        ("cohere2_moe", {"use_qk_norm": True}, "use_qk_norm is true; expected false"),
        ("laguna", {"gating": False}, 'gating is false; expected true, "per-head" or "per-element"'),
        ("laguna", {"moe_apply_router_weight_on_input": True}, "weight_on_input is true; expected false"),
        ("laguna", {"num_attention_heads_per_layer": [4, 6]}, "expected a list of 3 items"),
        ("cohere2_moe", {"sliding_window_pattern": 2}, "layer_types .* follows from sliding_window_pattern 2"),
    ],
)
def test_refused(case: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(case, **changes)


def test_layers_of_beam_by_default() -> None:
    absent = dict.fromkeys(("layer_types", "mlp_layer_types", "rope_parameters"), ...)
    spec = spec_of("beam", **absent, num_hidden_layers=8, final_logit_softcapping=None)
    assert windows(spec) == [8, 8, 8, 8, 8, None, 8, None]
    assert rotated(spec) == [window == 8 for window in windows(spec)]
    assert [attention.temperature_tuning is None for attention in attentions(spec)] == rotated(spec)
    assert [index for index, _ in spec.moes] == [3, 4, 5, 6, 7]
    assert spec.softcap is None
    rope = {"rope_type": "default", "rope_theta": 5e5}
    spec = spec_of("beam", rope_parameters={"full_attention": rope, "sliding_attention": None})
    assert rotated(spec) == [False, False, True, True]
    assert [attention.temperature_tuning is None for attention in attentions(spec)] == [False, False, True, True]


def test_options_of_laguna() -> None:
    first, second, _ = attentions(spec_of("laguna", rope_parameters=...))
    assert (first.position.base, first.position.fraction) == (5e5, 0.5)
    assert (second.position.base, second.position.fraction) == (1e4, 1.0)
    assert [attention.num_heads for attention in attentions(spec_of("laguna"))] == [4, 6, 2]
    assert attentions(spec_of("laguna", gating="per-head"))[0].gate == "headwise"
    assert first_moe(spec_of("laguna", moe_router_logit_softcapping=0.0)).router.softcap is None
