import math

import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference.feed_forward import activate, feed_forward, gelu, silu
from moezoo.core.spec import ClampedSwiGLUSpec, FeedForwardSpec, GatedFeedForwardSpec, LayerSpec, PlainFeedForwardSpec
from tests.support.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, FLOAT64, assert_close
from tests.support.twins import B, D, F, T, Twin, assert_layer_matches, assert_reference_gradient, normal

X_BTD = normal(0, B, T, D)
SWIGLU = GatedFeedForwardSpec(hidden_dim=F)
CLAMPED = ClampedSwiGLUSpec(hidden_dim=F, limit=1.5)  # low enough to be met
SPECS = {
    "swiglu": SWIGLU,
    "swiglu, bias": GatedFeedForwardSpec(hidden_dim=F, bias=True),
    "swiglu, bounded": GatedFeedForwardSpec(hidden_dim=F, limit=0.5),
    "geglu": GatedFeedForwardSpec(kind="geglu", hidden_dim=F),
    "exact_geglu": GatedFeedForwardSpec(kind="exact_geglu", hidden_dim=F),
    "reglu": GatedFeedForwardSpec(kind="reglu", hidden_dim=F),
    "relu_squared_glu": GatedFeedForwardSpec(kind="relu_squared_glu", hidden_dim=F),
    "clamped_swiglu": CLAMPED,
    "clamped_swiglu, no bias": ClampedSwiGLUSpec(hidden_dim=F, limit=1.5, alpha=1.0, up_offset=0.0, bias=False),
    "relu": PlainFeedForwardSpec(kind="relu", hidden_dim=F),
    "gelu, bias": PlainFeedForwardSpec(kind="gelu", hidden_dim=F, bias=True),
    "silu": PlainFeedForwardSpec(kind="silu", hidden_dim=F),
    "relu_squared": PlainFeedForwardSpec(kind="relu_squared", hidden_dim=F),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def values_of(spec: FeedForwardSpec) -> dict[str, np.ndarray]:
    values = {
        "w_gate": 0.3 * normal(1, D, F),
        "w_up": 0.3 * normal(2, D, F),
        "w_down": 0.3 * normal(3, F, D),
        "b_gate": 0.3 * normal(4, F),
        "b_up": 0.3 * normal(5, F),
        "b_down": 0.3 * normal(6, D),
    }
    plain = isinstance(spec, PlainFeedForwardSpec)
    return {
        name: value
        for name, value in values.items()
        if (spec.bias or name.startswith("w_")) and not (plain and name.endswith("gate"))
    }


def layer_of(twin: Twin, spec: FeedForwardSpec, values: dict[str, np.ndarray] | None = None):
    return twin.module("feed_forward").FeedForward(spec, twin.weights(values_of(spec) if values is None else values))


def assert_feed_forward_matches(twin: Twin, spec: FeedForwardSpec, **options) -> None:
    assert_layer_matches(
        twin,
        layer_of(twin, spec),
        lambda layer, x: layer(x),
        lambda values, x: feed_forward(spec, values, x),
        values_of(spec),
        X_BTD,
        **options,
    )


@each_spec
def test_value_and_gradients_match_the_reference(twin, spec):
    assert_feed_forward_matches(twin, spec)


@each_spec
def test_bfloat16_is_near_float32(twin, spec):
    x = twin.array(X_BTD, "bfloat16")
    out = layer_of(twin, spec)(x)
    assert "bfloat16" in str(out.dtype)
    assert_close(twin.numpy(out), feed_forward(spec, values_of(spec), twin.numpy(x)), BFLOAT16)


@pytest.mark.parametrize("kind", ["swiglu, bias", "geglu", "relu_squared_glu"])
def test_bfloat16_gradients_are_near_float32(twin, kind):
    """For kinds with a continuous gradient: near a jump, rounding decides on which side a value is."""
    assert_feed_forward_matches(
        twin, SPECS[kind], dtype="bfloat16", tolerance=BFLOAT16, gradient_tolerance=BFLOAT16_GRADIENT
    )


@pytest.mark.parametrize("kind", ["swiglu", "geglu", "relu_squared_glu"])
def test_a_gate_of_zero_outputs_zero(twin, kind):
    spec = SPECS[kind]
    closed = layer_of(twin, spec, values_of(spec) | {"w_gate": np.zeros((D, F))})
    np.testing.assert_array_equal(twin.numpy(closed(twin.array(X_BTD))), np.zeros((B, T, D)))


def test_tokens_are_independent(twin):
    x = X_BTD.copy()
    x[0, 0] += 1
    before, after = (twin.numpy(layer_of(twin, SWIGLU)(twin.array(values))) for values in (X_BTD, x))
    np.testing.assert_array_equal(after[1:], before[1:])
    assert np.any(after[0, 0] != before[0, 0])


def test_clamped_gate_has_no_lower_limit_and_up_has_two(twin):
    """gpt-oss: gate at most 7, up in [-7, 7], plus one. Written out, at values beyond both limits."""
    gate, up = np.array([9.0, 9.0, -9.0, 0.5, 7.5]), np.array([9.0, -9.0, 9.0, 0.25, -1.0])
    limited = [(7.0, 7.0), (7.0, -7.0), (-9.0, 7.0), (0.5, 0.25), (7.0, -1.0)]
    expected = [g / (1 + math.exp(-1.702 * g)) * (u + 1) for g, u in limited]
    spec = ClampedSwiGLUSpec(hidden_dim=5)
    assert_close(activate(spec, gate, up), expected, FLOAT64)
    on_device = twin.module("feed_forward").activate(spec, twin.array(gate[None]), twin.array(up[None]))
    assert_close(twin.numpy(on_device)[0], expected, FLOAT32)


@pytest.mark.parametrize(("kind", "far"), [("swiglu", 9 / (1 + math.exp(9))), ("relu_squared_glu", 0.0)])
def test_a_bound_is_of_the_activated_gate_and_of_up(twin, kind, far):
    """Step 3.5: silu(gate) at most 7, so a gate of 7.001 is still below it; up in [-7, 7]."""
    gate, up = np.array([9.0, 9.0, -9.0, 0.5, 7.001]), np.array([9.0, -8.0, 9.0, 0.25, -1.0])
    inner = {"swiglu": lambda x: x / (1 + math.exp(-x)), "relu_squared_glu": lambda x: max(x, 0) ** 2}[kind]
    expected = [7 * 7, 7 * -7, -far * 7, inner(0.5) * 0.25, -min(inner(7.001), 7)]
    spec = GatedFeedForwardSpec(kind=kind, hidden_dim=5, limit=7.0)
    assert_close(activate(spec, gate, up), expected, FLOAT64)
    on_device = twin.module("feed_forward").activate(spec, twin.array(gate[None]), twin.array(up[None]))
    assert_close(twin.numpy(on_device)[0], expected, FLOAT32)


def test_activations_are_their_formulas_also_far_from_zero():
    values = [-50.0, -1.0, 0.0, 1.0, 50.0]
    assert_close(silu(np.array(values)), [x / (1 + math.exp(-x)) for x in values], FLOAT64)
    assert silu(np.array(-1000.0)) == 0
    assert silu(np.array(1000.0)) == 1000
    exact = [x / 2 * math.erfc(-x / math.sqrt(2)) for x in values]
    assert np.max(np.abs(gelu(np.array(values)) - exact)) < 5e-4
    up = np.array([-2.0, 0.0, 3.0])
    assert activate(SPECS["relu"], None, up).tolist() == [0, 0, 3]
    assert activate(SPECS["relu_squared"], None, up).tolist() == [0, 0, 9]
    assert activate(SPECS["reglu"], up, np.array([5.0, 5.0, 5.0])).tolist() == [0, 0, 15]
    assert_close(activate(SPECS["exact_geglu"], np.array(values), np.full(5, 2.0)), [2 * x for x in exact], FLOAT64)
    assert activate(SPECS["relu_squared_glu"], up, np.array([5.0, 5.0, 5.0])).tolist() == [0, 0, 45]


@each_spec
def test_reference_gradient_agrees_with_finite_differences(spec):
    values = values_of(spec)
    assert_reference_gradient(
        lambda x, *own: feed_forward(spec, dict(zip(values, own, strict=True)), x), X_BTD, *values.values()
    )


def test_a_kind_that_does_not_exist_is_refused():
    layer = {"attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 4}, "feed_forward": {"kind": "swish"}}
    with pytest.raises(
        SpecError, match=r"feed_forward.kind is 'swish'; expected one of swiglu, .*clamped_swiglu.*relu_squared"
    ):
        validate(LayerSpec, layer, "config")
