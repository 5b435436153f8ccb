import math

import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.parameters.attention import attention_rows
from moezoo.core.parameters.row import Rows
from moezoo.core.reference.attention import attend, grouped_query_attention
from moezoo.core.reference.positions import temperature
from moezoo.core.spec import (
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LayerSpec,
    ModelSpec,
    NoPositionSpec,
    RelativePositionSpec,
    ResidualConvolutionSpec,
    RMSNormSpec,
    TemperatureTuningSpec,
)
from tests.layers.pieces import assert_pieces_match
from tests.support.backends_available import require_backend
from tests.support.tolerances import (
    BFLOAT16,
    BFLOAT16_GRADIENT,
    EXACT,
    FLOAT32,
    FLOAT32_GRADIENT,
    FLOAT64,
    assert_close,
)
from tests.support.twins import (
    B,
    D,
    F,
    G,
    H,
    M,
    N,
    T,
    Twin,
    V,
    assert_function_matches,
    assert_layer_matches,
    assert_reference_gradient,
    normal,
)

X_BTD = normal(0, B, T, D)


def grouped(**options) -> GroupedQueryAttentionSpec:
    return GroupedQueryAttentionSpec(**({"num_heads": N, "num_kv_heads": M, "head_dim": H} | options))


SPECS = {
    "grouped query": grouped(),
    "multi-head": grouped(num_kv_heads=N),
    "multi-query": grouped(num_kv_heads=1),
    "no position": grouped(position=NoPositionSpec()),
    "qk_norm": grouped(qk_norm=RMSNormSpec(epsilon=1e-3)),
    "biases": grouped(qkv_bias=True, output_bias=True),
    "qk_norm of the projection": grouped(qk_norm=RMSNormSpec(epsilon=1e-3), qk_norm_over="projection"),
    "weightless qk_norm of the projection": grouped(qk_norm=RMSNormSpec(scale="none"), qk_norm_over="projection"),
    "qk_norm after the rotation": grouped(qk_norm=RMSNormSpec(epsilon=1e-3), qk_norm_after_rotation=True),
    "clip": grouped(clip=0.7, qkv_bias=True),
    "clip behind qk_norm": grouped(clip=0.7, qk_norm=RMSNormSpec(epsilon=1e-3), qk_norm_over="projection"),
    "narrow values": grouped(value_head_dim=5, value_multiplier=0.7, qkv_bias=True, gate="elementwise"),
    "wide values": grouped(value_head_dim=11, softcap=0.8, sinks=True),
    "value norm": grouped(value_norm=RMSNormSpec(epsilon=1e-3), value_head_dim=5, value_multiplier=0.7),
    "values from keys": grouped(
        values_from_keys=True, qkv_bias=True, qk_norm=RMSNormSpec(), value_norm=RMSNormSpec(scale="none")
    ),
    "window": grouped(window=3),
    "chunk and temperature": grouped(chunk=3, temperature_tuning=TemperatureTuningSpec(floor_length=2, scale=0.5)),
    "sinks": grouped(sinks=True, scale=0.7),
    "softcap": grouped(softcap=0.8, scale=0.7),
    "softcap and sinks": grouped(softcap=0.8, sinks=True),
    "headwise gate": grouped(gate="headwise"),
    "elementwise gate": grouped(gate="elementwise", gate_bias="elementwise"),
    "softplus gate": grouped(gate="headwise", gate_function="softplus"),
    "gate with a bias and temperature as a power": grouped(
        gate="elementwise",
        gate_bias="headwise",
        value_head_dim=5,
        temperature_tuning=TemperatureTuningSpec(form="power", floor_length=2, scale=0.7),
    ),
}
SPECS |= {
    "relative positions and residual convolutions": grouped(
        position=NoPositionSpec(),
        relative=RelativePositionSpec(dim=3, extent=3),
        kv_convolution=ResidualConvolutionSpec(width=3),
        temperature_tuning=TemperatureTuningSpec(form="log", floor_length=2, scale=0.5),
    ),
    "clipped relative positions, projected sinks, dynamic convolutions": grouped(
        value_head_dim=5,
        qk_l2_clip=1.5,
        relative=RelativePositionSpec(dim=3, extent=2, l2_clip=0.7),
        projected_sinks=True,
        kv_convolution=ResidualConvolutionSpec(width=3, dynamic=True, unit_variance=True),
        window=4,
    ),
}
VALUE_RESIDUAL = grouped(value_residual=True, qkv_bias=True)


LAYER = LayerSpec(attention=grouped(), feed_forward=GatedFeedForwardSpec(hidden_dim=F))


def values_of(spec: GroupedQueryAttentionSpec, layer: int = 0) -> dict[str, np.ndarray]:
    """Return a value for every row of the parameter table, each from its own seed."""
    model = ModelSpec(vocab_size=V, embed_dim=D, layers=(LAYER,))  # rows use only its width and initializer
    rows = attention_rows(Rows(model), "attention", spec, layer)
    values = {
        row.name.removeprefix("attention."): (0.3 if row.decay else 1.0) * normal(seed, *row.shape)
        for seed, row in enumerate(rows, start=1)
    }
    return values | ({"value_mix": np.array([0.3])} if "value_mix" in values else {})


def empty_cache(twin: Twin, spec: GroupedQueryAttentionSpec, size: int):
    layer = LAYER.model_copy(update={"repeat": 2, "attention": spec})
    first = LAYER.model_copy(update={"attention": spec.model_copy(update={"keys_of_layer": None})})
    model = ModelSpec(embed_dim=D, layers=(first, layer))
    return twin.module("kv_cache").empty_cache(model, B, size)[1]


def layer_of(twin: Twin, spec: GroupedQueryAttentionSpec, values=None, layer: int = 0):
    weights = twin.weights(values_of(spec, layer) if values is None else values)
    return twin.module("attention").GroupedQueryAttention(spec, weights, layer)


def output(twin: Twin, spec: GroupedQueryAttentionSpec, x_BTD, values=None) -> np.ndarray:
    return twin.numpy(twin.compiled(layer_of(twin, spec, values))(twin.array(x_BTD)).out_BTD)


@pytest.mark.parametrize("kind", SPECS)
def test_value_and_gradients_match_the_reference(twin, kind):
    spec = SPECS[kind]
    assert_layer_matches(
        twin,
        layer_of(twin, spec),
        lambda layer, x: layer(x).out_BTD,
        lambda values, x: grouped_query_attention(spec, values, x).out_BTD,
        values_of(spec),
        X_BTD,
    )


def test_value_residual_matches_the_reference(twin):
    """Also the gradient of the first layer's values, and the layer's own values, which it returns unmixed."""
    values, first = values_of(VALUE_RESIDUAL, layer=1), normal(40, B, T, M, H)
    assert_layer_matches(
        twin,
        layer_of(twin, VALUE_RESIDUAL, layer=1),
        lambda layer, x, first: layer(x, first_value_BTMH=first).out_BTD,
        lambda values, x, first: grouped_query_attention(VALUE_RESIDUAL, values, x, first_value_BTMH=first).out_BTD,
        values,
        X_BTD,
        first,
    )
    own = twin.compiled(layer_of(twin, VALUE_RESIDUAL, layer=1))(
        twin.array(X_BTD), first_value_BTMH=twin.array(first)
    ).value_BTMH
    expected = np.einsum("BTD,DMH->BTMH", X_BTD, values["w_value"]) + values["b_value"]
    assert_close(twin.numpy(own), expected, FLOAT32)


BIASED = {"relative": RelativePositionSpec(dim=3, extent=70), "projected_sinks": True, "window": 90}


@pytest.mark.parametrize("limit", [{}, {"window": 40}, {"chunk": 50}, BIASED])
def test_sequences_of_several_chunks_match_the_reference(twin, limit):
    """130 tokens: on the CPU, queries come in chunks of 64, and with a window or chunks they do not read all keys."""
    spec = grouped(**limit)
    assert_layer_matches(
        twin,
        layer_of(twin, spec),
        lambda layer, x: layer(x).out_BTD,
        lambda values, x: grouped_query_attention(spec, values, x).out_BTD,
        values_of(spec),
        normal(0, 1, 130, D),
    )


PLAIN = {"grouped query", "multi-head", "multi-query"}  # test_kv_cache.py has whole models of these
CACHED = {kind: spec for kind, spec in SPECS.items() if kind not in PLAIN} | {"value residual": VALUE_RESIDUAL}


@pytest.mark.parametrize(
    ("twin", "kind", "first"),
    [
        pytest.param(
            *(backend, kind, first),
            id=f"{backend}-{kind}-{'ragged' if first else 'equal'}",
            # whole models decode rows of equal length on JAX in test_tiny_configs.py
            marks=pytest.mark.release if backend == "jax" and first is None and kind != "sinks" else (),
        )
        for backend in ("jax", "mlx")
        for kind in CACHED
        for first in (None, (2, 0, 1))
    ],
    indirect=["twin"],
)
def test_cached_pieces_equal_the_uncached_pass(twin, kind, first):
    """Nine slots in pieces of 4, 1, 4; the first piece starts with padding."""
    spec, length = CACHED[kind], 9
    values = values_of(spec, layer=1)
    cache = empty_cache(twin, spec, length + 2)
    assert_pieces_match(
        twin,
        layer_of(twin, spec, values, layer=1),
        cache,
        lambda x, first_value_BTMH: grouped_query_attention(spec, values, x, first_value_BTMH=first_value_BTMH).out_BTD,
        (4, 1, 4),
        first,
        normal(0, B, length, D),
        first_value_BTMH=normal(40, B, length, M, H),
    )


@pytest.mark.parametrize("pieces", [(1,) * 23, (3, 1, 1, 9, 1, 1, 1, 6), (23,)], ids=["tokens", "pieces", "whole"])
@pytest.mark.parametrize("limit", [{"window": 4}, {"chunk": 4}, {"window": 1}])
def test_a_rolling_cache_is_no_larger_than_the_window(twin, limit, pieces):
    spec = grouped(**limit)
    values, cache = values_of(spec), empty_cache(twin, spec, 23)
    cache = assert_pieces_match(
        twin,
        layer_of(twin, spec, values),
        cache,
        lambda x: grouped_query_attention(spec, values, x).out_BTD,
        pieces,
        (2, 0, 5),
        normal(0, B, 23, D),
    )
    assert cache.key_BSMH.shape == cache.value_BSMH.shape == (B, *limit.values(), M, H)


def test_attend_matches_the_reference_where_sources_outnumber_queries(twin):
    query, key, value = normal(1, B, T, M, G, H), normal(2, B, T + 2, M, H), normal(3, B, T + 2, M, H)
    mask_TS = np.arange(T)[:, None] + 2 >= np.arange(T + 2)[None, :]
    on_device = twin.array(mask_TS)
    assert_function_matches(
        twin,
        lambda query, key, value: twin.module("attention").attend(query, key, value, on_device),
        lambda query, key, value: attend(query, key, value, mask_TS),
        query,
        key,
        value,
    )


@pytest.mark.parametrize(
    "kind",
    [
        "grouped query",
        "qk_norm",
        "value norm",
        "chunk and temperature",
        "sinks",
        "softcap and sinks",
        "headwise gate",
    ],
)
def test_bfloat16_is_near_float32(twin, kind):
    spec = SPECS[kind]
    assert_layer_matches(
        twin,
        layer_of(twin, spec),
        lambda layer, x: layer(x).out_BTD,
        lambda values, x: grouped_query_attention(spec, values, x).out_BTD,
        values_of(spec),
        X_BTD,
        dtype="bfloat16",
        tolerance=BFLOAT16,
        gradient_tolerance=BFLOAT16_GRADIENT,
    )


def test_as_many_kv_heads_as_heads_is_plain_multi_head_attention(twin):
    spec = grouped(num_kv_heads=N, position=NoPositionSpec())
    values = values_of(spec)
    expected = np.zeros((B, T, D))
    for b in range(B):
        for n in range(N):
            query, key, value = (X_BTD[b] @ values[name][:, n] for name in ("w_query", "w_key", "w_value"))
            for t in range(T):
                score = [math.exp(query[t] @ key[s] / math.sqrt(H)) for s in range(t + 1)]
                attended = sum(score[s] * value[s] for s in range(t + 1)) / sum(score)
                expected[b, t] += attended @ values["w_output"][n]
    assert_close(output(twin, spec, X_BTD), expected, FLOAT32)
    assert_close(grouped_query_attention(spec, values, X_BTD).out_BTD, expected, FLOAT64)


def test_grouped_heads_equal_repeated_kv_heads(twin):
    """Query head n uses key/value head n // G, not n % M."""
    shared, plain = SPECS["grouped query"], SPECS["multi-head"]
    values = values_of(shared)
    repeated = values | {name: np.repeat(values[name], G, axis=1) for name in ("w_key", "w_value")}
    assert_close(output(twin, plain, X_BTD, repeated), output(twin, shared, X_BTD, values), FLOAT32)


def test_a_constant_added_to_all_scores_changes_nothing(twin):
    """The same vector on every key adds q . b to every score of a query."""
    spec = grouped(position=NoPositionSpec(), qkv_bias=True)
    values = values_of(spec)
    shifted = values | {"b_key": values["b_key"] + 3 * normal(20, M, H)}
    assert_close(output(twin, spec, X_BTD, shifted), output(twin, spec, X_BTD, values), FLOAT32)


@pytest.mark.parametrize("kind", ["grouped query", "no position"])
def test_later_tokens_are_invisible_to_earlier_ones(twin, kind):
    changed = X_BTD.copy()
    changed[:, 3:] = normal(21, B, T - 3, D)
    before, after = output(twin, SPECS[kind], X_BTD), output(twin, SPECS[kind], changed)
    assert_close(after[:, :3], before[:, :3], FLOAT32)
    assert np.max(np.abs(after[:, 3:] - before[:, 3:])) > 1e-2


def test_without_positions_the_order_of_earlier_tokens_is_invisible(twin):
    swapped = X_BTD[:, [1, 0, 2, 3, 4]]
    last = [output(twin, SPECS["no position"], x)[:, -1] for x in (X_BTD, swapped)]
    assert_close(last[0], last[1], FLOAT32)
    with_rope = [output(twin, SPECS["grouped query"], x)[:, -1] for x in (X_BTD, swapped)]
    assert np.max(np.abs(with_rope[0] - with_rope[1])) > 1e-3


def test_scores_of_a_thousand_do_not_overflow(twin):
    spec = SPECS["no position"]
    values = values_of(spec) | {"w_query": 30 * normal(1, D, N, H), "w_key": 30 * normal(2, D, M, H)}
    out = output(twin, spec, X_BTD, values)
    assert np.all(np.isfinite(out))
    assert np.any(out != 0)


def moved_by(twin: Twin, spec: GroupedQueryAttentionSpec, token: int) -> list[int]:
    """Return the positions whose output depends on this input token."""
    changed = X_BTD.copy()
    changed[:, token] += 1
    difference = np.abs(output(twin, spec, changed) - output(twin, spec, X_BTD))
    return np.flatnonzero(np.max(difference, axis=(0, 2)) > 1e-4).tolist()


def test_a_token_is_visible_to_its_window_and_to_its_chunk_only(twin):
    assert moved_by(twin, grouped(), 1) == [1, 2, 3, 4]
    assert moved_by(twin, grouped(window=3), 1) == [1, 2, 3]
    assert moved_by(twin, grouped(chunk=3), 1) == [1, 2]
    assert moved_by(twin, grouped(chunk=3), 3) == [3, 4]


def test_a_window_or_chunk_as_long_as_the_text_changes_nothing(twin):
    for spec in (grouped(window=T), grouped(chunk=T)):
        assert_close(output(twin, spec, X_BTD), output(twin, SPECS["grouped query"], X_BTD), EXACT)


def test_norm_before_and_after_the_rotation_differ_only_by_a_learned_scale(twin):
    """A rotation preserves norms."""
    before, after = (grouped(qk_norm=RMSNormSpec(scale="none"), qk_norm_after_rotation=late) for late in (False, True))
    assert_close(output(twin, after, X_BTD), output(twin, before, X_BTD), FLOAT32)
    before, after = (grouped(qk_norm=RMSNormSpec(), qk_norm_after_rotation=late) for late in (False, True))
    assert np.max(np.abs(output(twin, after, X_BTD) - output(twin, before, X_BTD))) > 1e-2


def test_a_sink_joins_the_softmax_denominator(twin):
    """A single token has the weight `exp(score) / (exp(sink) + exp(score))`; with a negligible sink it is 1."""
    spec = grouped(sinks=True)
    values = values_of(spec)
    equal_to_the_score = values | {"w_query": 0 * values["w_query"], "sink": np.zeros(N)}
    none_to_speak_of = values | {"sink": np.full(N, -1e4)}
    plain = {name: value for name, value in values.items() if name != "sink"}
    half, whole, expected = (
        twin.numpy(twin.compiled(layer_of(twin, *each))(twin.array(X_BTD[:, :1])).out_BTD)
        for each in ((spec, equal_to_the_score), (spec, none_to_speak_of), (grouped(), plain))
    )
    assert_close(half, expected / 2, FLOAT32)
    assert_close(whole, expected, FLOAT32)


def test_a_large_sink_does_not_overflow(twin):
    spec = grouped(sinks=True)
    assert_close(output(twin, spec, X_BTD, values_of(spec) | {"sink": np.full(N, 1e4)}), np.zeros((B, T, D)), EXACT)


def test_queries_keep_their_temperature_until_the_floor_length():
    position_T = np.array([0, 3, 4, 8190, 8191, 16383])
    expected = [1, 1, 1, 1, 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(3)]
    assert_close(temperature(TemperatureTuningSpec(), position_T), expected, FLOAT64)


def test_a_temperature_as_a_power_has_no_steps():
    spec = TemperatureTuningSpec(form="power", floor_length=2048, scale=0.1)
    assert_close(temperature(spec, np.array([0, 2047, 6143])), [(2049 / 2048) ** 0.1, 2**0.1, 4**0.1], FLOAT64)


def test_a_temperature_as_a_logarithm_is_one_up_to_its_floor():
    spec = TemperatureTuningSpec(form="log", floor_length=8, scale=0.5)
    assert_close(temperature(spec, np.array([0, 7, 15])), [1, 1, 1 + 0.5 * math.log(2)], FLOAT64)


def test_relative_logits_depend_on_the_distance_alone_and_end_with_their_extent(twin):
    """All profiles are one number per distance, and no score has anything else: weights are their exponentials."""
    spec = grouped(num_kv_heads=N, position=NoPositionSpec(), relative=RelativePositionSpec(dim=1, extent=2))
    values = values_of(spec) | {"relative.profile": np.log([[1.0, 3.0]])}
    values |= {"w_query": 0 * values["w_query"], "relative.w_feature": np.full((D, N, 1), 1 / D)}
    x_BTD = X_BTD + 1 - np.mean(X_BTD, axis=-1, keepdims=True)
    weight_TS = np.array([[1, 0, 0], [3, 1, 0], [1, 3, 1]]) / np.array([[1], [4], [5]])
    expected = np.einsum("TS,BSD,DNH,NHE->BTE", weight_TS, x_BTD[:, :3], values["w_value"], values["w_output"])
    assert_close(output(twin, spec, x_BTD[:, :3], values), expected, FLOAT32)


def test_softcap_bounds_the_ratio_of_attention_weights(twin):
    """Scores in the thousands: without softcap one token has all the weight; with 1e-3, weights are equal."""
    spec = grouped(num_kv_heads=N, softcap=1e-3, scale=1e3)
    values = values_of(spec)
    mean_BTD = np.cumsum(X_BTD, axis=1) / np.arange(1, T + 1)[:, None]
    expected = np.einsum("BTD,DNH,NHE->BTE", mean_BTD, values["w_value"], values["w_output"])
    assert np.max(np.abs(output(twin, spec, X_BTD) - expected)) < 2e-3 * np.max(np.abs(expected))


@pytest.mark.parametrize(
    "kind",
    [
        *("qk_norm", "biases", "qk_norm of the projection", "qk_norm after the rotation", "clip behind qk_norm"),
        *(
            "narrow values",
            "value norm",
            "values from keys",
            "sinks",
            "chunk and temperature",
            "softcap and sinks",
            "headwise gate",
            "elementwise gate",
            "softplus gate",
            "gate with a bias and temperature as a power",
        ),
    ],
)
def test_reference_gradient_agrees_with_finite_differences(kind):
    spec = SPECS[kind]
    values = values_of(spec)
    names = ("w_key", "query_norm.scale", "value_norm.scale", "b_key", "sink", "w_gate", "b_gate")
    some = {name: values[name] for name in names if name in values}
    assert_reference_gradient(
        lambda x, *moved: grouped_query_attention(spec, values | dict(zip(some, moved, strict=True)), x).out_BTD,
        X_BTD[:1, :4],
        *some.values(),
    )


def test_reference_gradient_of_mixed_values_agrees_with_finite_differences():
    values = values_of(VALUE_RESIDUAL, layer=1)

    def out(mix, first):
        changed = values | {"value_mix": mix}
        return grouped_query_attention(VALUE_RESIDUAL, changed, X_BTD[:1, :4], first_value_BTMH=first).out_BTD

    assert_reference_gradient(out, values["value_mix"], normal(40, 1, 4, M, H))


def test_clip_is_applied_after_the_norm_and_before_the_rotation(twin):
    """A normalized head with mean square 1 has no feature above sqrt(H), however large its projection was."""
    normed = grouped(qk_norm=RMSNormSpec(scale="none"), position=NoPositionSpec())
    values = values_of(normed)
    values |= {"w_query": 100 * values["w_query"], "w_value": 0.01 * values["w_value"]}
    before = output(twin, normed, X_BTD, values)
    loose, tight = (normed.model_copy(update={"clip": clip}) for clip in (math.sqrt(H), 1.0))
    assert_close(output(twin, loose, X_BTD, values), before, EXACT)
    assert np.max(np.abs(output(twin, tight, X_BTD, values) - before)) > 1e-4


def test_values_from_keys_are_those_before_norm_and_rotation(twin):
    """The result is as if w_value equaled w_key."""
    shared, apart = (grouped(qk_norm=RMSNormSpec(), values_from_keys=flag) for flag in (True, False))
    values = values_of(shared)
    expected = output(twin, apart, X_BTD, values | {"w_value": values["w_key"]})
    assert_close(output(twin, shared, X_BTD, values), expected, EXACT)


def test_value_norm_removes_the_scale_of_values(twin):
    spec = grouped(value_norm=RMSNormSpec(epsilon=1e-12))
    values = values_of(spec)
    longer = output(twin, spec, X_BTD, values | {"w_value": 7 * values["w_value"]})
    assert_close(longer, output(twin, spec, X_BTD, values), FLOAT32)


SHARED = grouped(keys_of_layer=0, qkv_bias=True, qk_norm=RMSNormSpec(epsilon=1e-3), window=3, value_head_dim=5)


def test_a_layer_may_attend_to_anothers_keys_and_values(twin):
    values = values_of(SHARED, layer=1)
    assert sorted(values) == ["b_query", "query_norm.scale", "w_output", "w_query"]
    assert_layer_matches(
        twin,
        layer_of(twin, SHARED, layer=1),
        lambda layer, x, key, value: layer(x, source=(key, value)).out_BTD,
        lambda values, x, key, value: grouped_query_attention(SHARED, values, x, source=(key, value)).out_BTD,
        values,
        X_BTD,
        normal(30, B, T, M, H),
        normal(31, B, T, M, 5),
    )


def test_shared_keys_are_those_of_the_earlier_layer_also_in_its_cache(twin):
    """On the same input, it equals a layer whose own key and value projections are those of the other layer."""
    own = SHARED.model_copy(update={"keys_of_layer": None})
    values = values_of(own)
    first, alike = (twin.compiled(layer_of(twin, spec, values, layer)) for layer, spec in enumerate((own, SHARED)))
    x, cache = twin.array(X_BTD), empty_cache(twin, own, T + 2)
    shared_cache = empty_cache(twin, SHARED, T + 2)
    expected = first(x)
    assert_close(twin.numpy(alike(x, source=expected.source).out_BTD), twin.numpy(expected.out_BTD), EXACT)
    for piece in (slice(0, 3), slice(3, 4), slice(4, 5)):
        ahead = first(x[:, piece], cache)
        attended = alike(x[:, piece], shared_cache, source=ahead.source)
        cache, shared_cache = ahead.cache, attended.cache
        assert_close(twin.numpy(attended.out_BTD), twin.numpy(expected.out_BTD)[:, piece], FLOAT32)
    assert int(shared_cache.length) == T


def test_heads_that_kv_heads_do_not_divide_are_refused():
    with pytest.raises(SpecError, match=r"num_heads is 8, which is not divisible by num_kv_heads = 3.*Use a multiple"):
        validate(GroupedQueryAttentionSpec, {"num_heads": 8, "num_kv_heads": 3, "head_dim": 6}, "config")


def test_a_window_and_chunks_at_once_are_refused():
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 6}
    with pytest.raises(SpecError, match=r"chunk is 4, but window is also set to 3.*Set only one"):
        validate(GroupedQueryAttentionSpec, sizes | {"window": 3, "chunk": 4}, "config")


@pytest.mark.parametrize("options", [{"sinks": True}, {"window": 40}, {"chunk": 50, "scale": 0.7}])
def test_the_cpu_kernel_of_jax_gives_the_values_and_gradients_of_attend(monkeypatch, options):
    require_backend("jax")
    import jax
    import jax.numpy as jnp

    module = Twin("jax").module("attention")
    spec = GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H, **options)
    arrays = [normal(seed, B, 150, M, *more) for seed, more in enumerate([(N // M, H), (H,), (H,)])]
    arrays = [jnp.asarray(array) for array in (*arrays, normal(3, N))]

    def loss(query, key, value, sink_N):
        out = module.attend_causally(spec, query, key, value, sink_N if spec.sinks else None)
        return jnp.sum(jnp.sin(out)), out

    found = []
    for kernel in (True, False):
        monkeypatch.setattr(module, "uses_chunk_kernel", lambda _, kernel=kernel: kernel)
        differentiated = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
        (_, out), gradients = differentiated(*arrays)
        found.append((np.asarray(out), [np.asarray(gradient) for gradient in gradients]))
    assert_close(found[0][0], found[1][0], FLOAT32)
    for own, expected in zip(found[0][1], found[1][1], strict=True):
        assert_close(own, expected, FLOAT32_GRADIENT)
    assert "custom gradient" in Twin("jax").backend().facts()["attention"]


def test_a_long_sequence_has_few_chunks_on_the_cpu(twin):
    """Each chunk is a part of JAX's program, which takes as long to compile as it has parts."""
    length = twin.module("kernels.attention").chunk_length
    assert [length(tokens) for tokens in (1, 384, 1024, 1025)] == [64, 64, 64, 128 if twin.name == "jax" else 64]
    assert twin.name == "mlx" or 100_000 / length(100_000) <= 16
