import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference.feed_forward import sigmoid
from moezoo.core.reference.normalization import layer_norm, norm_gate, normalize, rms_norm
from moezoo.core.spec import LayerNormSpec, NormSpec, RMSNormSpec
from tests.support.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, FLOAT64, assert_close
from tests.support.twins import (
    B,
    D,
    H,
    M,
    T,
    Twin,
    assert_layer_matches,
    assert_reference_gradient,
    normal,
)

X_BTD, SCALE_D, BIAS_D = normal(0, B, T, D), normal(1, D), normal(2, D)
SPECS = {
    "rms": RMSNormSpec(),
    "rms, large epsilon": RMSNormSpec(epsilon=0.5),  # large enough to show that it is inside the root
    "zero-centred": RMSNormSpec(scale="zero_centred"),
    "no scale": RMSNormSpec(scale="none", epsilon=0.5),
    "layer": LayerNormSpec(),
    "layer, no bias, large epsilon": LayerNormSpec(bias=False, epsilon=0.5),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def values_of(spec: NormSpec, scale: np.ndarray = SCALE_D, bias: np.ndarray = BIAS_D) -> dict[str, np.ndarray]:
    if isinstance(spec, LayerNormSpec):
        return {"scale": scale, "bias": bias} if spec.bias else {"scale": scale}
    return {} if spec.scale == "none" else {"scale": scale}


def layer_of(twin: Twin, spec: NormSpec, values: dict[str, np.ndarray] | None = None, axes: int = 1):
    return twin.module("normalization").norm(spec, twin.weights(values_of(spec) if values is None else values), axes)


def assert_norm_matches(
    twin: Twin, spec: NormSpec, values: dict[str, np.ndarray], x: np.ndarray, axes: int = 1, **options
) -> None:
    assert_layer_matches(
        twin,
        layer_of(twin, spec, values, axes),
        lambda layer, x: layer(x),
        lambda values, x: normalize(spec, values, x, axes),
        values,
        x,
        **options,
    )


GATE = {"w_down": 0.3 * normal(3, D, H), "w_up": 0.3 * normal(4, H, D)}


def test_gate_matches_the_reference_and_its_formula(twin):
    layer = twin.module("normalization").NormGate(twin.weights(GATE))
    assert_layer_matches(twin, layer, lambda layer, x: layer(x), norm_gate, GATE, X_BTD)
    down = X_BTD[1, 2] @ GATE["w_down"]
    logits = (down * sigmoid(down)) @ GATE["w_up"]
    assert_close(norm_gate(GATE, X_BTD)[1, 2], X_BTD[1, 2] * sigmoid(logits), FLOAT64)
    assert_close(norm_gate(GATE | {"w_up": 0 * GATE["w_up"]}, X_BTD), X_BTD / 2, FLOAT64)


@each_spec
def test_value_and_gradients_match_the_reference(twin, spec):
    assert_norm_matches(twin, spec, values_of(spec), X_BTD)


@pytest.mark.parametrize("kind", ["zero-centred", "no scale", "layer"])
def test_two_axes_are_normalized_as_one(twin, kind):
    spec = SPECS[kind]
    values = values_of(spec, normal(1, M, H), normal(2, M, H))
    x_BTMH = normal(0, B, T, M, H)
    assert_norm_matches(twin, spec, values, x_BTMH, axes=2)
    as_one = {name: value.reshape(-1) for name, value in values.items()}
    flat = normalize(spec, as_one, x_BTMH.reshape(B, T, -1)).reshape(x_BTMH.shape)
    assert_close(normalize(spec, values, x_BTMH, axes=2), flat, FLOAT64)


@each_spec
def test_bfloat16_is_near_float32(twin, spec):
    assert_norm_matches(
        twin,
        spec,
        values_of(spec),
        X_BTD,
        dtype="bfloat16",
        tolerance=BFLOAT16,
        gradient_tolerance=BFLOAT16_GRADIENT,
    )


@pytest.mark.parametrize("spec", [RMSNormSpec(), LayerNormSpec(bias=False)], ids=["rms", "layer"])
def test_bfloat16_input_is_normalized_in_float32(twin, spec):
    """Only the result is rounded, so it is within half a unit in the last place of the exact value."""
    x = twin.array(X_BTD, "bfloat16")
    exact = normalize(spec, values_of(spec), twin.numpy(x))
    difference = np.abs(twin.numpy(layer_of(twin, spec)(x)) - exact)
    assert np.all(difference <= np.abs(exact) * 2.0**-8 * 1.001)


def test_the_scale_of_the_input_does_not_matter(twin):
    layer = layer_of(twin, RMSNormSpec(epsilon=1e-12))
    assert_close(twin.numpy(layer(twin.array(1000 * X_BTD))), twin.numpy(layer(twin.array(X_BTD))), FLOAT32)


def test_scale_of_one_gives_a_root_mean_square_of_one(twin):
    out = twin.numpy(layer_of(twin, RMSNormSpec(epsilon=1e-12), {"scale": np.ones(D)})(twin.array(X_BTD)))
    assert_close(np.sqrt(np.mean(out**2, axis=-1)), np.ones((B, T)), FLOAT32)


def test_a_zero_centred_scale_of_zero_changes_nothing(twin):
    centred = layer_of(twin, RMSNormSpec(scale="zero_centred"), {"scale": np.zeros(D)})
    without = layer_of(twin, RMSNormSpec(scale="none"))
    np.testing.assert_array_equal(twin.numpy(centred(twin.array(X_BTD))), twin.numpy(without(twin.array(X_BTD))))


def test_layer_norm_is_invariant_to_a_constant(twin):
    layer = layer_of(twin, LayerNormSpec())
    assert_close(twin.numpy(layer(twin.array(X_BTD + 8))), twin.numpy(layer(twin.array(X_BTD))), FLOAT32)


def test_reference_is_the_formula_written_out():
    of_rms, of_layer = np.empty_like(X_BTD), np.empty_like(X_BTD)
    for b in range(B):
        for t in range(T):
            row = X_BTD[b, t]
            of_rms[b, t] = row * SCALE_D / np.sqrt(sum(value**2 for value in row) / D + 0.5)
            mean = sum(row) / D
            variance = sum((value - mean) ** 2 for value in row) / D
            of_layer[b, t] = (row - mean) / np.sqrt(variance + 0.5) * SCALE_D + BIAS_D
    assert_close(rms_norm(X_BTD, SCALE_D, 0.5), of_rms, FLOAT64)
    assert_close(layer_norm(X_BTD, SCALE_D, BIAS_D, 0.5), of_layer, FLOAT64)


@each_spec
def test_reference_gradient_agrees_with_finite_differences(spec):
    values = values_of(spec)
    assert_reference_gradient(
        lambda x, *own: normalize(spec, dict(zip(values, own, strict=True)), x), X_BTD, *values.values()
    )


def test_a_scale_that_the_norm_does_not_know_is_refused():
    with pytest.raises(SpecError, match=r"scale.*'learned', 'zero_centred' or 'none'"):
        validate(RMSNormSpec, {"scale": "learnt"}, "config")
