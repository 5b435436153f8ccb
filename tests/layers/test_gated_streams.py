"""Gated streams: values and gradients of both backends against the reference, and a model that has them."""

import numpy as np
import pytest

from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.gated_streams import read_gated, write_weights
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import (
    GatedFeedForwardSpec,
    GatedStreamsSpec,
    GroupedQueryAttentionSpec,
    LayerSpec,
    ModelSpec,
    NGramEmbeddingsSpec,
    RMSNormSpec,
)
from tests.support.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, FLOAT64, assert_close
from tests.support.twins import B, D, T, V, assert_layer_matches, assert_reference_gradient, normal

J, Z = 3, 7
NORM = RMSNormSpec(epsilon=1e-2, scale="zero_centred")
READ = {"norm.scale": normal(1, J, D), "w_down": 0.3 * normal(2, J, D, Z), "w_up": 0.3 * normal(3, Z, J, D)}
VALUES = READ | {"w_write": 0.3 * normal(4, J, D, J)}
X_BTJD = normal(0, B, T, J, D)


def through_a_block(layer, streams):
    """The block multiplies what it reads by itself."""
    x_BTD, connection = layer.read(streams, 0)
    return layer.write(streams, connection, x_BTD * x_BTD, 0)


def reference(values, streams):
    written_BTJ = write_weights(NORM, values, streams)
    return streams + written_BTJ[..., None] * read_gated(NORM, values, streams)[:, :, None] ** 2


@pytest.mark.parametrize("dtype", [None, pytest.param("bfloat16", marks=pytest.mark.release)])
def test_values_and_gradients_match_the_reference(twin, dtype):
    layer = twin.module("gated_streams").GatedStreams(NORM, twin.weights(VALUES))
    near = {} if dtype is None else {"tolerance": BFLOAT16, "gradient_tolerance": BFLOAT16_GRADIENT}
    assert_layer_matches(twin, layer, through_a_block, reference, VALUES, X_BTJD, dtype=dtype, **near)


def test_the_last_step_matches_the_reference(twin):
    layer = twin.compiled(twin.module("gated_streams").GatedRead(NORM, twin.weights(READ)))
    assert_close(twin.numpy(layer(twin.array(X_BTJD))), read_gated(NORM, READ, X_BTJD), FLOAT32)


def test_without_maps_a_block_reads_half_the_mean_and_writes_once():
    zeros = {name: 0 * value for name, value in VALUES.items()}
    normed = X_BTJD / np.sqrt(np.mean(X_BTJD**2, axis=-1, keepdims=True) + 1e-2)
    assert_close(read_gated(NORM, zeros, X_BTJD), normed.mean(axis=2) / 2, FLOAT64)
    assert_close(write_weights(NORM, zeros, X_BTJD), np.ones((B, T, J)), FLOAT64)


def test_reference_gradient_agrees_with_finite_differences():
    names = ("norm.scale", "w_write")
    assert_reference_gradient(
        lambda *some: reference(VALUES | dict(zip(names, some, strict=True)), X_BTJD[:1, :2]),
        *(VALUES[name] for name in names),
    )


def test_a_model_has_no_other_norm_and_generates_as_it_reads(twin):
    layer = LayerSpec(
        attention=GroupedQueryAttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4),
        feed_forward=GatedFeedForwardSpec(hidden_dim=9),
        ngram_embeddings=NGramEmbeddingsSpec(heads=1, dim=4, table_size=11, conv_width=2),
    )
    residual = GatedStreamsSpec(num_streams=J, rank=Z)
    spec = ModelSpec(vocab_size=V, embed_dim=D, layers=(layer,), norm=NORM, residual=residual)
    norms = {row.name for row in parameter_table(spec) if "norm" in row.name}
    assert {name for name in norms if "residual" not in name and "ngram" not in name} == set()
    weights = {name: 5 * value for name, value in initial_weights(spec, seed=0).items()}
    tokens_BT = np.random.default_rng(0).integers(0, V, (B, 8)).astype(np.int32)
    expected = forward(spec, {name: value.astype(np.float64) for name, value in weights.items()}, tokens_BT).logits_BTV
    model = twin.backend().build(spec, weights)
    logits, cache = model.prefill(tokens_BT[:, :5], 8)
    assert_close(logits, expected[:, 4], FLOAT32)
    for t in range(5, 8):
        logits, cache = model.decode(tokens_BT[:, t], cache)
        assert_close(logits, expected[:, t], FLOAT32, f"after {t + 1} tokens")
