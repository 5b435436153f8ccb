"""Options of families whose layers with full attention have no RoPE: the parsed spec of each, and what is refused."""

from typing import Any

import pytest

from moezoo.core.errors import SpecError
from moezoo.core.spec import LayerNormSpec, ModelSpec, NoPositionSpec
from tests.huggingface.test_family_options import attentions, first_moe, spec_of, windows


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
    assert first_moe(spec_of("cohere2_moe_sigmoid", norm_topk_prob=False)).router.renormalize == "none"


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("kolibri1", {"sliding_window": None}, "sliding_window is null; expected a number, because layer_types"),
        ("kolibri1", {"intermediate_size": 3}, "unknown for this family: intermediate_size 3"),
        ("cohere2_moe", {"expert_selection_fn": "sparsemax"}, "expected one of softmax, sigmoid"),
        ("cohere2_moe", {"shared_expert_combination_strategy": "max"}, "expected one of average, sum"),
        ("cohere2_moe", {"sliding_window_pattern": 2}, "layer_types .* follows from sliding_window_pattern 2"),
    ],
)
def test_refused(case: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(case, **changes)
