import numpy as np
import pytest

from moezoo.core.reference.lightning_attention import decay_rates, lightning_attention
from moezoo.core.reference.positions import packed_documents
from moezoo.core.spec import LightningAttentionSpec, RMSNormSpec
from tests.layers.pieces import assert_pieces_match
from tests.support.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, FLOAT64, assert_close
from tests.support.twins import B, D, H, N, T, Twin, assert_layer_matches, assert_reference_gradient, normal

SPEC = LightningAttentionSpec(num_heads=N, head_dim=H, decay_scale=0.6, norm=RMSNormSpec(epsilon=1e-3))
SHAPES = {
    **{f"w_{name}": (D, N, H) for name in ("query", "key", "value", "gate")},
    "output_norm.scale": (N, H),
    "w_output": (N, H, D),
}
VALUES = {name: 0.3 * normal(seed, *shape) for seed, (name, shape) in enumerate(SHAPES.items(), start=1)}
X_BTD = normal(0, B, T, D)


def layer_of(twin: Twin):
    return twin.module("lightning_attention").LightningAttention(SPEC, twin.weights(VALUES), 0)


def caches(twin: Twin, batch: int):
    return twin.module("kv_cache").empty_state_cache(SPEC, batch)


def reference(values, x_BTD):
    return lightning_attention(SPEC, values, x_BTD).out_BTD


def test_value_and_gradients_match_the_reference(twin):
    assert_layer_matches(twin, layer_of(twin), lambda layer, x: layer(x).out_BTD, reference, VALUES, X_BTD)


@pytest.mark.release
def test_bfloat16_is_near_float32(twin):
    assert_layer_matches(
        twin,
        layer_of(twin),
        lambda layer, x: layer(x).out_BTD,
        reference,
        VALUES,
        X_BTD,
        dtype="bfloat16",
        tolerance=BFLOAT16,
        gradient_tolerance=BFLOAT16_GRADIENT,
    )


def test_padding_and_pieces_do_not_change_the_cache(twin):
    """One token, and several chunks; the cache is that of a row alone."""
    length, first = 74, (2, 0, 4)
    x_BTD, layer, pieces = normal(0, B, length, D), layer_of(twin), (3, 1, length - 4)
    cache = assert_pieces_match(twin, layer, caches(twin, B), lambda x: reference(VALUES, x), pieces, first, x_BTD)
    alone = twin.compiled(layer)(twin.array(x_BTD[:1, first[0] :]), caches(twin, 1)).cache
    assert_close(twin.numpy(cache.state_BMGHZ)[:1], twin.numpy(alone.state_BMGHZ), FLOAT32)


def test_a_document_begins_with_an_empty_state(twin):
    document_BT = np.array([[0, 0, 1, 1, 1]] * (B - 1) + [[0, 0, 0, 1, 1]])
    documents = twin.module("positions").packed_documents(twin.array(document_BT))
    found = twin.numpy(twin.compiled(layer_of(twin))(twin.array(X_BTD), documents=documents).out_BTD)
    expected = lightning_attention(SPEC, VALUES, X_BTD, documents=packed_documents(document_BT)).out_BTD
    alone = np.concatenate([reference(VALUES, X_BTD[:1, part]) for part in (slice(0, 2), slice(2, T))], axis=1)
    assert_close(expected[:1], alone, FLOAT64)
    assert_close(found, expected, FLOAT32)


def test_rates_halve_from_head_to_head_when_there_are_eight():
    assert_close(decay_rates(SPEC), 0.6 * 0.5 ** np.arange(1, 9), FLOAT64)


def test_reference_gradient_agrees_with_finite_differences():
    names = ("w_query", "w_key", "w_value", "w_gate", "output_norm.scale")
    assert_reference_gradient(
        lambda x, *some: reference(VALUES | dict(zip(names, some, strict=True)), x),
        X_BTD[:1, :3],
        *(VALUES[name] for name in names),
    )
