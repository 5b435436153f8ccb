import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.convolution import causal_convolution
from moezoo.core.reference.short_convolution import short_convolution
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import (
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LayerSpec,
    ModelSpec,
    ShortConvolutionSpec,
)
from tests.layers.pieces import assert_pieces_match
from tests.support.tolerances import BFLOAT16, BFLOAT16_GRADIENT, EXACT, FLOAT32, FLOAT64, assert_close
from tests.support.twins import B, D, F, H, M, N, T, Twin, V, assert_layer_matches, assert_reference_gradient, normal

WIDTH = 4
BARE, BIASED = ShortConvolutionSpec(conv_width=WIDTH), ShortConvolutionSpec(conv_width=WIDTH, bias=True)
MATRICES = {
    "w_input_gate": 0.3 * normal(1, D, D),
    "w_output_gate": 0.3 * normal(2, D, D),
    "w_value": 0.3 * normal(3, D, D),
    "conv": normal(4, WIDTH, D),
    "w_output": 0.3 * normal(5, D, D),
}
BIASES = {
    name: normal(6 + place, D)
    for place, name in enumerate(("b_input_gate", "b_output_gate", "b_value", "b_conv", "b_output"))
}
VALUES = {False: MATRICES, True: MATRICES | BIASES}
X_BTD = normal(0, B, T, D)


def layer_of(twin: Twin, spec: ShortConvolutionSpec = BIASED):
    return twin.module("short_convolution").ShortConvolution(spec, twin.weights(VALUES[spec.bias]), 0)


def out(spec: ShortConvolutionSpec = BIASED):
    return lambda values, x_BTD: short_convolution(spec, values, x_BTD).out_BTD


def empty_cache(twin: Twin, x_BTD):
    return empty_cache_of(twin, B, x_BTD.dtype)


def empty_cache_of(twin: Twin, batch: int, dtype):
    return twin.module("kv_cache").empty_convolution_cache(BIASED, batch, D, dtype)


@pytest.mark.parametrize("spec", [BARE, BIASED], ids=["bare", "biased"])
def test_value_and_gradients_match_the_reference(twin, spec):
    layer = layer_of(twin, spec)
    assert_layer_matches(twin, layer, lambda layer, x: layer(x).out_BTD, out(spec), VALUES[spec.bias], X_BTD)


def test_bfloat16_is_near_float32_and_so_is_its_cache(twin):
    assert_layer_matches(
        twin,
        layer_of(twin),
        lambda layer, x: layer(x).out_BTD,
        out(),
        VALUES[True],
        X_BTD,
        dtype="bfloat16",
        tolerance=BFLOAT16,
        gradient_tolerance=BFLOAT16_GRADIENT,
    )
    x_BTD = twin.array(X_BTD, "bfloat16")
    assert "bfloat16" in str(layer_of(twin)(x_BTD, empty_cache(twin, x_BTD)).cache.input_BSZ.dtype)


def test_a_token_depends_on_itself_and_earlier_tokens_of_the_filter(twin):
    """The last row multiplies the token itself, the first row the earliest token of the filter."""
    weight = np.zeros((WIDTH, D))
    weight[-1], weight[0] = 1.0, 2.0
    expected = X_BTD.copy()
    expected[:, WIDTH - 1 :] += 2 * X_BTD[:, : 1 - WIDTH]
    assert_close(causal_convolution(X_BTD, weight), expected, FLOAT64)
    before = np.zeros((B, WIDTH - 1, D))
    function = twin.module("convolution").causal_convolution
    assert_close(twin.numpy(function(*map(twin.array, (X_BTD, weight, before)))), expected, FLOAT32)


def test_inputs_before_the_first_token_have_no_biases(twin):
    """Inputs before the first token are zero, where padding before the projections would yield products of biases."""
    first = short_convolution(BIASED, VALUES[True], X_BTD[:, :1]).out_BTD
    assert_close(twin.numpy(layer_of(twin)(twin.array(X_BTD)).out_BTD)[:, :1], first, FLOAT32)
    only_itself = VALUES[True] | {"conv": VALUES[True]["conv"] * np.eye(WIDTH)[-1][:, None]}
    assert_close(first, short_convolution(BIASED, only_itself, X_BTD[:, :1]).out_BTD, FLOAT64)


def test_later_tokens_are_invisible_to_earlier_ones(twin):
    layer = layer_of(twin)
    changed = X_BTD.copy()
    changed[:, 3:] = normal(21, B, T - 3, D)
    before, after = (twin.numpy(layer(twin.array(x)).out_BTD) for x in (X_BTD, changed))
    assert_close(after[:, :3], before[:, :3], FLOAT32)
    assert np.max(np.abs(after[:, 3:] - before[:, 3:])) > 1e-2


def test_cached_parts_equal_the_uncached_pass(twin):
    """A part shorter than the convolution, tokens one at a time, a part longer than it."""
    parts = (2, 1, 1, 1, 6)
    x_BTD = normal(0, B, sum(parts), D)
    layer, cache, found = twin.compiled(layer_of(twin)), empty_cache(twin, twin.array(x_BTD)), []
    for start, part in zip(np.cumsum((0, *parts)), parts, strict=False):
        attended = layer(twin.array(x_BTD[:, start : start + part]), cache)
        cache = attended.cache
        found.append(twin.numpy(attended.out_BTD))
    assert int(cache.length) == sum(parts)
    assert_close(np.concatenate(found, axis=1), out()(VALUES[True], x_BTD), FLOAT32)


def test_padding_does_not_change_the_cache(twin):
    x_BTD, first = normal(0, B, 7, D), (2, 0, 5)
    layer = layer_of(twin)
    cache = assert_pieces_match(
        twin, layer, empty_cache(twin, twin.array(x_BTD)), lambda x: out()(VALUES[True], x), (3, 1, 3), first, x_BTD
    )
    for row, start in enumerate(first):
        before = twin.array(x_BTD[:1])
        alone = twin.compiled(layer)(
            twin.array(x_BTD[row : row + 1, start:]), empty_cache_of(twin, 1, before.dtype)
        ).cache
        assert_close(twin.numpy(cache.input_BSZ)[row : row + 1], twin.numpy(alone.input_BSZ), FLOAT32)


def test_an_extended_cache_holds_the_last_inputs(twin):
    inputs = normal(1, B, 6, D)
    cache = empty_cache(twin, twin.array(inputs))
    for part in (slice(0, 1), slice(1, 6)):
        cache = cache.extend(twin.array(inputs[:, part]))
    assert_close(twin.numpy(cache.input_BSZ), inputs[:, 3:], EXACT)


def test_generation_equals_the_uncached_pass(twin):
    """JAX pads the prompt from five to sixteen tokens; a full-attention layer follows the convolution."""
    full = GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H)
    layers = tuple(LayerSpec(attention=each, feed_forward=GatedFeedForwardSpec(hidden_dim=F)) for each in (BARE, full))
    spec = ModelSpec(vocab_size=V, embed_dim=D, layers=layers)
    weights = {name: 5 * value for name, value in initial_weights(spec, seed=0).items()}
    tokens = np.random.default_rng(0).integers(0, V, (B, 8)).astype(np.int32)
    expected = forward(spec, {name: value.astype(np.float64) for name, value in weights.items()}, tokens).logits_BTV
    model = twin.backend().build(spec, weights)
    logits, cache = model.prefill(tokens[:, :5], 8)
    assert_close(logits, expected[:, 4], FLOAT32)
    for t in range(5, 8):
        logits, cache = model.decode(tokens[:, t], cache)
        assert_close(logits, expected[:, t], FLOAT32, f"after {t + 1} tokens")


def test_filters_are_initialized_as_a_depthwise_convolution_in_pytorch():
    spec = ModelSpec(
        vocab_size=V,
        embed_dim=500,
        layers=(LayerSpec(attention=BARE, feed_forward=GatedFeedForwardSpec(hidden_dim=1)),),
    )
    filters = initial_weights(spec, seed=0)["layers.0.attention.conv"]
    assert np.max(np.abs(filters)) <= 0.5
    assert np.max(filters) > 0.49
    assert abs(np.mean(filters)) < 0.03


def test_reference_gradient_agrees_with_finite_differences():
    names = ("w_input_gate", "conv", "b_value", "b_conv")
    assert_reference_gradient(
        lambda x, *some: out()(VALUES[True] | dict(zip(names, some, strict=True)), x),
        X_BTD[:1],
        *(VALUES[True][name] for name in names),
    )


def test_a_convolution_of_one_token_is_refused():
    with pytest.raises(SpecError, match="conv_width is 1; input should be greater than or equal to 2"):
        validate(ShortConvolutionSpec, {"conv_width": 1}, "config")
