"""Hyper-connections: values and gradients of both backends against the reference, and what they are at first."""

import numpy as np
import pytest

from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.hyper_connections import (
    enter_streams,
    merge_streams,
    read_streams,
    sinkhorn,
    write_streams,
)
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import GatedFeedForwardSpec, GroupedQueryAttentionSpec, HyperConnectionsSpec, LayerSpec, ModelSpec
from tests.support.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, FLOAT64, assert_close
from tests.support.twins import B, D, T, V, assert_layer_matches, assert_reference_gradient, normal

J = 3
MIXED = HyperConnectionsSpec(num_streams=J, sinkhorn_iterations=4, epsilon=1e-3, norm_epsilon=1e-2)
ALONE = HyperConnectionsSpec(num_streams=J, sinkhorn_iterations=None, magnitude=1.5, write_epsilon=0.2)
SHAPES = {
    **{f"w_{name}": (J, D, J) for name in ("read", "write")},
    "w_mix": (J, D, J, J),
    **{f"b_{name}": (J,) for name in ("read", "write")},
    "b_mix": (J, J),
    **{f"{name}_scale": (1,) for name in ("read", "write", "mix")},
}
VALUES = {
    name: (0.3 if name.startswith("w") else 1.0) * normal(seed, *shape)
    for seed, (name, shape) in enumerate(SHAPES.items(), start=1)
}
X_BTJD = normal(0, B, T, J, D)


def values_of(spec: HyperConnectionsSpec) -> dict[str, np.ndarray]:
    return {name: value for name, value in VALUES.items() if spec is MIXED or "mix" not in name}


def through_a_block(layer, streams):
    """The block multiplies what it reads by itself."""
    x_BTD, connection = layer.read(streams, 0)
    return layer.write(streams, connection, x_BTD * x_BTD, 0)


def reference(spec: HyperConnectionsSpec, values, streams):
    x_BTD, connection = read_streams(spec, values, streams)
    return write_streams(streams, connection, x_BTD * x_BTD)


@pytest.mark.parametrize("spec", [MIXED, ALONE], ids=["mixed", "alone"])
def test_values_and_gradients_match_the_reference(twin, spec):
    layer = twin.module("hyper_connections").HyperConnection(spec, twin.weights(values_of(spec)))
    assert_layer_matches(
        twin, layer, through_a_block, lambda values, x: reference(spec, values, x), values_of(spec), X_BTJD
    )


@pytest.mark.release
def test_bfloat16_is_near_float32(twin):
    layer = twin.module("hyper_connections").HyperConnection(MIXED, twin.weights(VALUES))
    assert_layer_matches(
        twin,
        layer,
        through_a_block,
        lambda values, x: reference(MIXED, values, x),
        VALUES,
        X_BTJD,
        dtype="bfloat16",
        tolerance=BFLOAT16,
        gradient_tolerance=BFLOAT16_GRADIENT,
    )


def test_the_last_step_matches_the_reference(twin):
    own = {name: VALUES[name] for name in ("w_read", "b_read", "read_scale")}
    layer = twin.module("hyper_connections").MergedStreams(MIXED, twin.weights(own))
    expected = lambda values, x: merge_streams(MIXED, values, x)  # noqa: E731
    assert_layer_matches(twin, layer, lambda layer, x: layer(x), expected, own, X_BTJD)


def test_the_last_step_may_be_the_mean(twin):
    averaged = MIXED.model_copy(update={"final_read": "mean"})
    layer = twin.module("hyper_connections").MergedStreams(averaged, twin.weights({}))
    expected = lambda values, x: merge_streams(averaged, values, x)  # noqa: E731
    assert_layer_matches(twin, layer, lambda layer, x: layer(x), expected, {}, X_BTJD)
    np.testing.assert_allclose(merge_streams(averaged, {}, X_BTJD), X_BTJD.mean(2))


def test_reference_gradient_agrees_with_finite_differences():
    names = ("b_read", "write_scale", "b_mix", "mix_scale")
    assert_reference_gradient(
        lambda *some: reference(MIXED, VALUES | dict(zip(names, some, strict=True)), X_BTJD),
        *(VALUES[name] for name in names),
    )


def test_rows_and_columns_of_the_mixing_matrix_have_sums_of_one():
    mix = sinkhorn(normal(5, B, T, J, J), 20, 0.0)
    for axis in (-1, -2):
        np.testing.assert_allclose(mix.sum(axis), 1, rtol=1e-6)


def test_weights_of_each_token_depend_on_it_alone():
    _, connection = read_streams(MIXED, VALUES, X_BTJD)
    _, other = read_streams(MIXED, VALUES, X_BTJD[:, 2:3])
    assert_close(other.mix_BTIU, connection.mix_BTIU[:, 2:3], FLOAT64)
    assert np.std(connection.write_BTJ, axis=(0, 1)).min() > 0.01


@pytest.mark.parametrize("iterations", [20, None])
def test_streams_are_at_first_those_of_a_plain_sum(iterations):
    """But for what depends on the token, which starts near 0 and is left out here."""
    layer = LayerSpec(
        attention=GroupedQueryAttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4),
        feed_forward=GatedFeedForwardSpec(hidden_dim=9),
        repeat=2,
    )
    plain = ModelSpec(vocab_size=V, embed_dim=D, layers=(layer,))
    residual = HyperConnectionsSpec(num_streams=J, sinkhorn_iterations=iterations)
    streams = plain.model_copy(update={"residual": residual})
    weights = initial_weights(streams, seed=0)
    assert weights["layers.1.feed_forward_residual.write_scale"] == np.float32(0.01)
    weights |= {name: 0 * value for name, value in weights.items() if name.endswith("_scale")}
    tokens_BT = np.random.default_rng(0).integers(0, V, (B, T))
    expected = forward(plain, initial_weights(plain, seed=0), tokens_BT).logits_BTV
    assert_close(forward(streams, weights, tokens_BT).logits_BTV, expected, FLOAT32)


def test_streams_begin_as_copies(twin):
    x_BTD = normal(4, B, T, D)
    found = twin.module("hyper_connections").enter_streams(MIXED, twin.array(x_BTD))
    np.testing.assert_array_equal(twin.numpy(found), enter_streams(MIXED, x_BTD))
