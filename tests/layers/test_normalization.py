import numpy as np
import pytest

from moezoo.core.reference.normalization import rms_norm
from moezoo.core.spec import RMSNormSpec
from tests.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, FLOAT64, assert_close
from tests.twins import B, D, T, Twin, assert_layer_matches, assert_reference_gradient, normal

X_BTD, SCALE_D = normal(0, B, T, D), normal(1, D)


def layer_of(twin: Twin, epsilon: float, scale=SCALE_D):
    return twin.module("normalization").RMSNorm(RMSNormSpec(epsilon=epsilon), twin.weights({"scale": scale}))


# 0.5 is large enough to show whether epsilon stands inside the root.
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_value_and_gradients_match_the_reference(twin, epsilon):
    assert_layer_matches(
        twin,
        layer_of(twin, epsilon),
        lambda layer, x: layer(x),
        lambda values, x: rms_norm(x, values["scale"], epsilon),
        {"scale": SCALE_D},
        X_BTD,
    )


def test_bfloat16_is_near_float32(twin):
    assert_layer_matches(
        twin,
        layer_of(twin, 1e-6),
        lambda layer, x: layer(x),
        lambda values, x: rms_norm(x, values["scale"], 1e-6),
        {"scale": SCALE_D},
        X_BTD,
        dtype="bfloat16",
        tolerance=BFLOAT16,
        gradient_tolerance=BFLOAT16_GRADIENT,
    )


def test_bfloat16_input_is_normalized_in_float32(twin):
    """The only rounding is that of the result, so it is within half a step of the exact value."""
    x = twin.array(X_BTD, "bfloat16")
    exact = rms_norm(twin.numpy(x), SCALE_D, 1e-6)
    difference = np.abs(twin.numpy(layer_of(twin, 1e-6)(x)) - exact)
    assert np.all(difference <= np.abs(exact) * 2.0**-8 * 1.001)


def test_length_of_the_input_does_not_matter(twin):
    layer = layer_of(twin, 1e-12)
    assert_close(twin.numpy(layer(twin.array(1000 * X_BTD))), twin.numpy(layer(twin.array(X_BTD))), FLOAT32)


def test_scale_of_one_gives_a_root_mean_square_of_one(twin):
    out = twin.numpy(layer_of(twin, 1e-12, np.ones(D))(twin.array(X_BTD)))
    assert_close(np.sqrt(np.mean(out**2, axis=-1)), np.ones((B, T)), FLOAT32)


def test_reference_is_the_formula_written_out():
    expected = np.empty_like(X_BTD)
    for b in range(B):
        for t in range(T):
            row = X_BTD[b, t]
            expected[b, t] = row * SCALE_D / np.sqrt(sum(value**2 for value in row) / D + 0.5)
    assert_close(rms_norm(X_BTD, SCALE_D, 0.5), expected, FLOAT64)


def test_reference_gradient_agrees_with_finite_differences():
    assert_reference_gradient(lambda x, scale: rms_norm(x, scale, 1e-6), X_BTD, SCALE_D)
