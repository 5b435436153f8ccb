import math

import numpy as np

from moezoo.core.reference.feed_forward import silu, swiglu
from moezoo.core.spec import GatedFeedForwardSpec
from tests.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT64, assert_close
from tests.twins import B, D, F, T, Twin, assert_layer_matches, assert_reference_gradient, normal

X_BTD = normal(0, B, T, D)
VALUES = {
    "w_gate": 0.3 * normal(1, D, F),
    "w_up": 0.3 * normal(2, D, F),
    "w_down": 0.3 * normal(3, F, D),
}


def layer_of(twin: Twin, values=VALUES):
    return twin.module("feed_forward").SwiGLU(GatedFeedForwardSpec(hidden_dim=F), twin.weights(values))


def test_value_and_gradients_match_the_reference(twin):
    assert_layer_matches(twin, layer_of(twin), lambda layer, x: layer(x), swiglu, VALUES, X_BTD)


def test_bfloat16_is_near_float32(twin):
    assert_layer_matches(
        twin,
        layer_of(twin),
        lambda layer, x: layer(x),
        swiglu,
        VALUES,
        X_BTD,
        dtype="bfloat16",
        tolerance=BFLOAT16,
        gradient_tolerance=BFLOAT16_GRADIENT,
    )


def test_a_gate_of_zero_lets_nothing_through(twin):
    closed = layer_of(twin, VALUES | {"w_gate": np.zeros((D, F))})
    np.testing.assert_array_equal(twin.numpy(closed(twin.array(X_BTD))), np.zeros((B, T, D)))


def test_tokens_do_not_see_each_other(twin):
    x = X_BTD.copy()
    x[0, 0] += 1
    before, after = (twin.numpy(layer_of(twin)(twin.array(values))) for values in (X_BTD, x))
    np.testing.assert_array_equal(after[1:], before[1:])
    assert np.any(after[0, 0] != before[0, 0])


def test_silu_is_x_times_sigmoid_also_far_from_zero():
    values = [-50.0, -1.0, 0.0, 1.0, 50.0]
    assert_close(silu(np.array(values)), [x / (1 + math.exp(-x)) for x in values], FLOAT64)
    assert silu(np.array(-1000.0)) == 0
    assert silu(np.array(1000.0)) == 1000


def test_reference_gradient_agrees_with_finite_differences():
    assert_reference_gradient(
        lambda x, *weights: swiglu(dict(zip(VALUES, weights, strict=True)), x), X_BTD, *VALUES.values()
    )
