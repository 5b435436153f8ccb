import numpy as np
import pytest

from moezoo.core.parameters import parameter_table
from moezoo.core.reference.attention import grouped_query_attention
from moezoo.core.reference.convolutional_attention import convolved, half_delayed_values
from moezoo.core.reference.positions import packed_documents
from moezoo.core.spec import (
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    HeadConvolutionSpec,
    LayerSpec,
    ModelSpec,
    RMSNormSpec,
)
from tests.layers.pieces import assert_pieces_match
from tests.support.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, FLOAT64, assert_close
from tests.support.twins import (
    B,
    D,
    F,
    H,
    M,
    N,
    T,
    Twin,
    V,
    assert_layer_matches,
    assert_reference_gradient,
    normal,
)

SPEC = GroupedQueryAttentionSpec(
    num_heads=N,
    num_kv_heads=M,
    head_dim=H,
    convolution=HeadConvolutionSpec(conv_width=3, mix_width=2),
    qk_norm=RMSNormSpec(scale="none", epsilon=1e-2),
    key_temperature=True,
    qkv_bias=True,
)
WINDOW = SPEC.model_copy(update={"window": 3, "qkv_bias": False})
MODEL = ModelSpec(
    vocab_size=V, embed_dim=D, layers=(LayerSpec(attention=SPEC, feed_forward=GatedFeedForwardSpec(hidden_dim=F)),)
)
PREFIX = "layers.0.attention."
VALUES = {
    row.name.removeprefix(PREFIX): 0.4 * normal(seed, *row.shape)
    for seed, row in enumerate(parameter_table(MODEL), start=1)
    if row.name.startswith(PREFIX)
}
WITHOUT_BIASES = {name: value for name, value in VALUES.items() if name.rpartition(".")[2][:2] != "b_"} | {
    name: value for name, value in VALUES.items() if name.endswith(("b_conv", "b_mix"))
}
OWN = {name.removeprefix("convolution."): value for name, value in VALUES.items()}
X_BTD = normal(0, B, T, D)


def layer_of(twin: Twin, spec: GroupedQueryAttentionSpec = SPEC):
    values = VALUES if spec.qkv_bias else WITHOUT_BIASES
    return twin.module("attention").GroupedQueryAttention(spec, twin.weights(values), 0)


def empty_cache(twin: Twin, spec: GroupedQueryAttentionSpec, batch: int, size: int):
    layers = (MODEL.layers[0].model_copy(update={"attention": spec}),)
    return twin.module("kv_cache").empty_cache(MODEL.model_copy(update={"layers": layers}), batch, size)[0]


def reference(values, x_BTD, spec: GroupedQueryAttentionSpec = SPEC):
    return grouped_query_attention(spec, values, x_BTD).out_BTD


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


@pytest.mark.parametrize(
    "spec", [pytest.param(SPEC, id="all", marks=pytest.mark.release), pytest.param(WINDOW, id="window")]
)
def test_padding_and_pieces_do_not_change_the_result(twin, spec):
    """Pieces shorter and longer than the convolutions, and rows with and without padding."""
    x_BTD, first, values = normal(0, B, 9, D), (2, 0, 4), VALUES if spec.qkv_bias else WITHOUT_BIASES
    layer, cache = layer_of(twin, spec), empty_cache(twin, spec, B, 9)
    assert_pieces_match(twin, layer, cache, lambda x: reference(values, x, spec), (1, 5, 1, 1, 1), first, x_BTD)


def test_documents_are_computed_alone(twin):
    document_BT = np.array([[0, 0, 1, 1, 1]] * B, np.int32)
    documents = twin.module("positions").packed_documents(twin.array(document_BT))
    packed = twin.compiled(layer_of(twin))(twin.array(X_BTD), documents=documents).out_BTD
    expected = np.concatenate([reference(VALUES, X_BTD[:, :2]), reference(VALUES, X_BTD[:, 2:])], axis=1)
    assert_close(twin.numpy(packed), expected, FLOAT32)
    own = grouped_query_attention(SPEC, VALUES, X_BTD, documents=packed_documents(document_BT)).out_BTD
    assert_close(own, expected, FLOAT64)


def test_convolutions_are_those_of_pytorch_with_zeros_in_front():
    """Written out as loops: both windows, biases, and the means of a group of query heads."""
    query, key = normal(1, 1, 4, N, H), normal(2, 1, 4, M, H)
    found_query, found_key = convolved(OWN, query, key)
    for which, x, found in (("query", query, found_query), ("key", key, found_key)):
        conv, mix = OWN[f"{which}.conv"], OWN[f"{which}.mix"]
        padded = np.concatenate([np.zeros((3, *x.shape[2:])), x[0]])  # of both windows: 2 + 1 tokens
        filtered = [sum(conv[w] * padded[t + w] for w in range(3)) + OWN[f"{which}.b_conv"] for t in range(5)]
        for t in range(4):
            for head in range(x.shape[2]):
                mixed = sum(filtered[t + w][head] @ mix[w, head] for w in range(2)) + OWN[f"{which}.b_mix"][head]
                group = head // (N // M) if which == "query" else head
                queries = [head] if which == "query" else range(head * (N // M), (head + 1) * (N // M))
                mean = np.mean([query[0, t, n] for n in queries], axis=0) / 2 + key[0, t, group] / 2
                assert_close(found[0, t, head], mixed + mean, FLOAT64)


def test_half_of_the_values_are_of_the_token_before():
    """With M even, those of half of the heads; before the first token they are the bias alone."""
    value = half_delayed_values(OWN, X_BTD, M)
    now = X_BTD @ OWN["w_value"] + OWN["b_value"]
    before = X_BTD @ OWN["w_value_before"] + OWN["b_value_before"]
    assert_close(value[:, :, : M // 2].reshape(now.shape), now, FLOAT64)
    assert_close(value[:, 1:, M // 2 :].reshape(before[:, 1:].shape), before[:, :-1], FLOAT64)
    assert_close(value[:, 0, M // 2 :].reshape(B, -1), np.tile(OWN["b_value_before"], (B, 1)), FLOAT64)


def test_reference_gradient_agrees_with_finite_differences():
    names = ("convolution.query.conv", "convolution.key.b_conv", "convolution.w_value_before", "key_temperature")
    assert_reference_gradient(
        lambda x, *some: reference(VALUES | dict(zip(names, some, strict=True)), x),
        X_BTD[:1, :4],
        *(VALUES[name] for name in names),
    )
