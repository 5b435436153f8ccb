import math

import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference.positions import embedding_positions, frequencies, rotate, score_multiplier
from moezoo.core.spec import (
    DynamicScalingSpec,
    GroupedQueryAttentionSpec,
    LearnedPositionsSpec,
    LinearScalingSpec,
    Llama3ScalingSpec,
    LongRoPEScalingSpec,
    NoPositionSpec,
    RoPESpec,
    SinusoidalPositionsSpec,
    YaRNScalingSpec,
)
from tests.support.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, FLOAT64, assert_close
from tests.support.twins import (
    B,
    D,
    H,
    N,
    T,
    Twin,
    assert_function_matches,
    assert_layer_matches,
    assert_reference_gradient,
    normal,
)

X_BTNH = normal(0, B, T, N, H)
ROPE = RoPESpec()
YARN = YaRNScalingSpec(factor=40, original_length=4096, mscale=1.0, mscale_all_dim=0.5)
LONG = LongRoPEScalingSpec(
    short_factors=(1.0, 1.1, 1.2, 1.3), long_factors=(1.0, 2.0, 5.0, 20.0), original_length=4096, length=131_072
)
SPECS = {
    "half split": ROPE,
    "small base": RoPESpec(base=100.0),
    "interleaved": RoPESpec(layout="interleaved"),
    "partial": RoPESpec(fraction=2 / 3),
    "partial, interleaved": RoPESpec(fraction=2 / 3, layout="interleaved"),
    "pairs": RoPESpec(base=100.0, fraction=0.4, fraction_of="pairs"),
    "pairs, interleaved": RoPESpec(base=100.0, fraction=2 / 3, fraction_of="pairs", layout="interleaved"),
    "linear": RoPESpec(scaling=LinearScalingSpec(factor=4)),
    "llama3": RoPESpec(scaling=Llama3ScalingSpec(factor=8, original_length=64)),
    "yarn": RoPESpec(base=100.0, scaling=YaRNScalingSpec(factor=8, original_length=256)),
    "longrope": RoPESpec(
        scaling=LongRoPEScalingSpec(
            short_factors=(1.0, 1.0, 1.0), long_factors=(1.0, 2.0, 5.0), original_length=16, length=64
        )
    ),
}
DYNAMIC = DynamicScalingSpec(factor=4, original_length=4096, length=16_384)
SPECS["dynamic"] = RoPESpec(base=100.0, scaling=DYNAMIC)
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def rotated(twin, spec, x_BTNH, position_T):
    return twin.numpy(twin.module("positions").rotate(spec, twin.array(x_BTNH), twin.array(position_T)))


def assert_rotation_matches(twin: Twin, spec: RoPESpec, first: int, **options) -> None:
    position_T = np.arange(first, first + T)
    rotate_on_device, positions = twin.module("positions").rotate, twin.array(position_T)
    assert_function_matches(
        twin,
        lambda x: rotate_on_device(spec, x, positions),
        lambda x: rotate(spec, x, position_T),
        X_BTNH,
        **options,
    )


# --- rotation --------------------------------------------------------------------------------------------------------


@each_spec
def test_value_and_gradient_match_the_reference(twin, spec):
    assert_rotation_matches(twin, spec, first=7)


@each_spec
def test_bfloat16_is_near_float32(twin, spec):
    assert_rotation_matches(
        twin, spec, first=0, dtype="bfloat16", tolerance=BFLOAT16, gradient_tolerance=BFLOAT16_GRADIENT
    )


def test_angles_are_float32_even_for_bfloat16_inputs(twin):
    """Position 1001 is not a bfloat16 number: angles in bfloat16 would be off by whole radians."""
    position_T = np.arange(1001, 1001 + T)
    x = twin.array(X_BTNH, "bfloat16")
    out = twin.module("positions").rotate(ROPE, x, twin.array(position_T))
    assert_close(twin.numpy(out), rotate(ROPE, twin.numpy(x), position_T), BFLOAT16)


@each_spec
def test_products_depend_on_relative_positions_only(twin, spec):
    query, key = normal(1, 1, 1, 1, H), normal(2, 1, 1, 1, H)

    def product(query_position, key_position):
        turned_query = rotated(twin, spec, query, [query_position])
        turned_key = rotated(twin, spec, key, [key_position])
        return np.sum(turned_query * turned_key)

    assert_close(product(13, 9), product(4, 0), FLOAT32)
    assert abs(product(13, 9) - product(13, 10)) > 1e-2


def test_position_zero_is_unchanged(twin):
    np.testing.assert_array_equal(rotated(twin, ROPE, X_BTNH, np.zeros(T, int)), X_BTNH)


def test_features_beyond_the_fraction_are_unchanged(twin):
    out = rotated(twin, SPECS["partial"], X_BTNH, np.arange(T))
    np.testing.assert_array_equal(out[..., 4:], X_BTNH[..., 4:])
    assert_close(out[..., :4], rotate(ROPE, X_BTNH[..., :4], np.arange(T)), FLOAT32)


def test_feature_i_is_paired_with_feature_i_plus_half(twin):
    x = np.zeros((1, 1, 1, H))
    x[..., 1] = 1.0
    angle = 3 * 100.0 ** (-2 / H)
    expected = np.zeros((1, 1, 1, H))
    expected[..., 1], expected[..., 1 + H // 2] = np.cos(angle), np.sin(angle)
    assert_close(rotated(twin, RoPESpec(base=100.0), x, [3]), expected, FLOAT32)
    assert_close(rotate(RoPESpec(base=100.0), x, np.array([3])), expected, FLOAT64)


def test_interleaved_is_half_split_with_permuted_features():
    even_then_odd = np.r_[0:H:2, 1:H:2]
    interleaved = rotate(RoPESpec(layout="interleaved"), X_BTNH, np.arange(T))
    np.testing.assert_array_equal(
        interleaved[..., even_then_odd], rotate(ROPE, X_BTNH[..., even_then_odd], np.arange(T))
    )


@each_spec
def test_reference_gradient_agrees_with_finite_differences(spec):
    assert_reference_gradient(lambda x: rotate(spec, x, np.arange(T)), X_BTNH)


# --- scaling: expected numbers from transformers 5.23, modeling_rope_utils.py, run in float64 ------------------------


@pytest.mark.parametrize(
    ("scaling", "base", "expected", "attention_factor"),
    [
        (LinearScalingSpec(factor=4), 1e4, [0.25, 0.025, 0.0025, 0.00025], 1.0),
        (
            Llama3ScalingSpec(factor=8, original_length=8192),
            5e5,
            [1.0, 0.193922745, 0.0376060309, 0.00729266474, 0.000524846161, 3.4281022e-5, 6.64786987e-6, 1.28917317e-6],
            1.0,
        ),
        (
            Llama3ScalingSpec(factor=16, original_length=8192, high_frequency_factor=1),
            5e5,
            [1, 0.193922745, 0.0376060309, 0.00729266474, 0.00141421356, 1.7140511e-05, 3.32393494e-06, 6.44586586e-07],
            1.0,
        ),
        (
            YaRNScalingSpec(factor=32, original_length=4096, beta_fast=1, mscale=1, mscale_all_dim=1),
            5e4,
            [1, 0.258600136, 0.0668740305, 0.0172936334, 0.00447213595, 3.61404677e-05, 9.34592988e-06, 2.41685874e-06],
            1.0,
        ),
        (
            YaRNScalingSpec(factor=32, original_length=4096, truncate=False),
            150_000.0,
            [1.0, 0.225418, 0.0508132748, 0.00679495949, 0.000456483919, 1.81883367e-05, 4.09997848e-06, 9.2420895e-07],
            1.3465735902799727,
        ),
        (
            YARN,
            1e4,
            [1.0, 0.316227766, 0.1, 0.0239147248, 0.005125, 0.000849862121, 2.5e-05, 7.90569415e-06],
            1.1557219901962608,
        ),
        (LONG, 1e4, [1.0, 0.05, 0.002, 5e-05], 1.1902380714238083),
        (LONG.model_copy(update={"length": 4096}), 1e4, [1.0, 0.0909090909, 0.00833333333, 0.000769230769], 1.0),
        (LONG.model_copy(update={"attention_factor": 1.5}), 1e4, [1.0, 0.05, 0.002, 5e-05], 1.5),
        (DYNAMIC, 1e4, [1, 0.04252903703, 0.001808718991, 7.692307692e-05], 1.0),
        (DYNAMIC.model_copy(update={"length": 100}), 1e4, [1.0, 0.1, 0.01, 0.001], 1.0),
        (LinearScalingSpec(factor=1), 1e4, [1.0, 0.1, 0.01, 0.001], 1.0),
    ],
    ids=[
        *("linear", "llama3", "llama3 without a ramp", "yarn of one turn", "yarn", "yarn truncated, mscale"),
        *("longrope", "short", "given factor"),
        *("dynamic", "dynamic of a short text", "factor of one"),
    ],
)  # fmt: skip
def test_frequencies_are_those_of_released_models(scaling, base, expected, attention_factor):
    actual, actual_factor = frequencies(RoPESpec(base=base, scaling=scaling), 2 * len(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-8)
    assert actual_factor == pytest.approx(attention_factor, rel=1e-12)
    half, _ = frequencies(RoPESpec(base=base, scaling=scaling, fraction=0.5), 4 * len(expected))
    np.testing.assert_array_equal(half, actual)  # scaling depends on the rotated features alone


def test_a_fraction_of_the_pairs_has_the_frequencies_of_full_rotation():
    """Gemma 4's proportional rotation; numbers as above."""
    quarter = RoPESpec(base=1e6, fraction=0.25, fraction_of="pairs")
    expected = [1, 0.316227766, 0.1, *[0] * 9]
    np.testing.assert_allclose(frequencies(quarter, 24)[0], expected, rtol=1e-8)
    slower = quarter.model_copy(update={"scaling": LinearScalingSpec(factor=8)})
    np.testing.assert_allclose(frequencies(slower, 24)[0], np.array(expected) / 8, rtol=1e-8)


def test_pairs_with_frequency_zero_are_unchanged(twin):
    out = rotated(twin, RoPESpec(fraction=0.4, fraction_of="pairs"), X_BTNH, np.arange(T))
    assert_close(out[..., [1, 2, 4, 5]], X_BTNH[..., [1, 2, 4, 5]], FLOAT32)
    assert np.max(np.abs(out[..., [0, 3]] - X_BTNH[..., [0, 3]])) > 0.1


def test_only_yarn_scales_the_scores_of_latent_attention():
    assert score_multiplier(RoPESpec(scaling=YARN)) == pytest.approx((0.05 * math.log(40) + 1) ** 2)
    for spec in (NoPositionSpec(), ROPE, SPECS["yarn"], SPECS["llama3"]):
        assert score_multiplier(spec) == 1


# --- added to the embedding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embed_dim", [D, D - 1], ids=["even", "odd"])
@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_embedding_positions_match_the_reference(twin, kind, embed_dim):
    learned = kind == "learned"
    spec = LearnedPositionsSpec(max_length=11) if learned else SinusoidalPositionsSpec(base=100.0)
    values = {"weight": normal(0, 11, embed_dim)} if learned else {}
    position_T = np.arange(6, 6 + T)
    on_device = twin.array(position_T)
    assert_layer_matches(
        twin,
        twin.module("positions").EmbeddingPosition(spec, embed_dim, twin.weights(values)),
        lambda layer, scale: scale * layer(on_device),
        lambda values, scale: scale * embedding_positions(spec, embed_dim, values, position_T),
        values,
        normal(1, T, 1),
    )


def test_sines_and_cosines_alternate_with_falling_frequencies():
    out = embedding_positions(SinusoidalPositionsSpec(), 6, {}, np.array([3]))
    angles = [3.0, 3 / 10_000 ** (1 / 3), 3 / 10_000 ** (2 / 3)]
    assert_close(out, [[wave(angle) for angle in angles for wave in (math.sin, math.cos)]], FLOAT64)


# --- refused ---------------------------------------------------------------------------------------------------------

ATTENTION = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 5}


@pytest.mark.parametrize(
    ("head_dim", "position", "message"),
    [
        (5, {}, r"head_dim is 5, but RoPE rotates pairs.*Use an even number, or position"),
        (8, {"fraction": 0.4}, r"head_dim is 8 and 3 of its features are rotated \(fraction 0.4\)"),
        (5, {"fraction": 0.5, "fraction_of": "pairs"}, r"head_dim is 5, but RoPE rotates pairs"),
        (
            8,
            {"fraction": 0.1, "fraction_of": "pairs"},
            r"head_dim is 8 and 0 of its features are rotated \(fraction 0.1\)",
        ),
        (8, {"fraction_of": "pairs"}, r"fraction_of is pairs, but fraction is 1, which rotates all pairs.*Remove it"),
        (2, {"scaling": DYNAMIC.model_dump()}, r"is dynamic, which scales all pairs except the first"),
        (8, {"scaling": LONG.model_dump() | {"long_factors": [1.0]}}, r"has 4 short and 1 long factors, but 4 pairs"),
        (
            8,
            {"scaling": {"kind": "llama3", "factor": 8, "original_length": 64, "high_frequency_factor": 0.5}},
            r"high_frequency_factor is 0.5, below low_frequency_factor = 1.0",
        ),
        (
            8,
            {"scaling": {"kind": "yarn", "factor": 8, "original_length": 64, "beta_fast": 0.5}},
            r"beta_fast is 0.5, below beta_slow = 1.0",
        ),
    ],
)
def test_an_invalid_rotation_is_refused(head_dim, position, message):
    attention = ATTENTION | {"head_dim": head_dim, "position": {"kind": "rope"} | position}
    with pytest.raises(SpecError, match=message):
        validate(GroupedQueryAttentionSpec, attention, "config")
