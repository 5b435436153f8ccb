import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.convolution import causal_convolution, residual_convolution
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import ModelSpec, ResidualConvolutionSpec
from tests.support.tolerances import FLOAT32, FLOAT64, assert_close
from tests.support.twins import B, D, H, M, T, V, assert_layer_matches, assert_reference_gradient, normal

WIDTH = 3
PLAIN = ResidualConvolutionSpec(width=WIDTH)
DYNAMIC = ResidualConvolutionSpec(width=WIDTH, dynamic=True, unit_variance=True)
VALUES = {"conv": normal(1, WIDTH, M, H), "w_filter": 0.3 * normal(2, D, M, WIDTH)}
X_BTMH, SOURCE_BTD = normal(3, B, T, M, H), normal(4, B, T, D)


@pytest.mark.parametrize("spec", [PLAIN, DYNAMIC], ids=["plain", "dynamic"])
def test_value_and_gradients_match_the_reference(twin, spec):
    values = VALUES if spec.dynamic else {"conv": VALUES["conv"]}
    assert_layer_matches(
        twin,
        twin.module("convolution").ResidualConvolution(spec, twin.weights(values)),
        lambda layer, *inputs: layer(*inputs)[0],
        lambda values, *inputs: residual_convolution(spec, values, *inputs),
        values,
        *((X_BTMH, SOURCE_BTD) if spec.dynamic else (X_BTMH,)),
    )


def test_a_dynamic_filter_is_that_of_the_token_over_the_root_of_its_terms():
    """By hand, token by token; the first row of a dynamic filter multiplies the token itself."""
    own = VALUES["conv"] + np.einsum("BTD,DMS->BTSM", SOURCE_BTD, VALUES["w_filter"])[..., None]
    expected = X_BTMH.copy()
    for t in range(T):
        for back in range(min(WIDTH, t + 1)):
            expected[:, t] += own[:, t, back] * X_BTMH[:, t - back]
    assert_close(residual_convolution(DYNAMIC, VALUES, X_BTMH, SOURCE_BTD), expected / np.sqrt(7), FLOAT64)


def test_terms_of_variance_one_give_variance_one():
    spec = ResidualConvolutionSpec(width=WIDTH, unit_variance=True)
    x_BTD = normal(5, 40, 50, D)
    convolved = residual_convolution(spec, {"conv": np.sign(normal(6, WIDTH, D))}, x_BTD)
    assert abs(np.var(convolved[:, WIDTH:]) - 1) < 0.1
    plain = residual_convolution(PLAIN, {"conv": np.zeros((WIDTH, D))}, x_BTD)
    assert_close(plain, x_BTD, FLOAT64)


def test_reference_gradient_agrees_with_finite_differences():
    assert_reference_gradient(
        lambda x, source, conv, w_filter: residual_convolution(
            DYNAMIC, {"conv": conv, "w_filter": w_filter}, x, source
        ),
        X_BTMH[:1],
        SOURCE_BTD[:1],
        *VALUES.values(),
    )


CONVOLVED = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "kv_convolution": {"width": 3}}
MODEL = {
    "vocab_size": V,
    "embed_dim": D,
    "embedding_norm": True,
    "layers": [
        {
            "attention": CONVOLVED | {"window": 4, "relative": {"dim": 3, "extent": 4}},
            "feed_forward": {"hidden_dim": 9},
            "feed_forward_scale": True,
            "output_convolution": {"width": 4},
        },
        {"attention": {"kind": "none"}, "feed_forward": {"hidden_dim": 9}, "output_convolution": {"width": 2}},
        {
            "attention": CONVOLVED | {"kv_convolution": {"width": 2, "dynamic": True}, "projected_sinks": True},
            "mixer_only": True,
            "output_convolution": {"width": 3, "unit_variance": True},
        },
    ],
}


def test_cached_tokens_and_documents_are_computed_as_alone(twin):
    """A prompt of five tokens, which JAX pads, and seven more one by one; then packed documents."""
    spec = validate(ModelSpec, MODEL, "config")
    weights = {name: 3 * value for name, value in initial_weights(spec, seed=0).items()}
    reference = {name: value.astype(np.float64) for name, value in weights.items()}
    tokens = np.random.default_rng(0).integers(0, V, (B, 12)).astype(np.int32)
    expected = forward(spec, reference, tokens).logits_BTV
    model = twin.backend().build(spec, weights)
    logits, cache = model.prefill(tokens[:, :5], 12)
    for t in range(5, 12):
        assert_close(logits, expected[:, t - 1], FLOAT32, f"after {t} tokens")
        logits, cache = model.decode(tokens[:, t], cache)
    document_BT = np.repeat([[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]], B, axis=0)
    packed = forward(spec, reference, tokens, document_BT=document_BT).logits_BTV
    for part in (slice(0, 5), slice(5, 8), slice(8, 12)):
        assert_close(packed[:, part], forward(spec, reference, tokens[:, part]).logits_BTV, FLOAT64)
    assert_close(model.forward(tokens, documents=document_BT).logits, packed, FLOAT32)


def test_a_causal_convolution_is_zero_before_the_first_token():
    assert_close(causal_convolution(X_BTMH, VALUES["conv"])[:, 0], VALUES["conv"][-1] * X_BTMH[:, 0], FLOAT64)
