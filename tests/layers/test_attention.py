import math

import numpy as np
import pytest

from moezoo.core.config import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference.attention import attend, grouped_query_attention
from moezoo.core.spec import GroupedQueryAttentionSpec, NoPositionSpec, RMSNormSpec
from tests.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, FLOAT64, assert_close
from tests.twins import (
    B,
    D,
    G,
    H,
    M,
    N,
    T,
    Twin,
    assert_function_matches,
    assert_layer_matches,
    assert_reference_gradient,
    normal,
)

X_BTD = normal(0, B, T, D)
SPECS = {
    "grouped query": GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H),
    "multi-head": GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=N, head_dim=H),
    "multi-query": GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=1, head_dim=H),
    "no position": GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H, position=NoPositionSpec()),
    "qk_norm": GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H, qk_norm=RMSNormSpec(epsilon=1e-3)),
    "biases": GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H, qkv_bias=True, output_bias=True),
}


def values_of(spec: GroupedQueryAttentionSpec) -> dict[str, np.ndarray]:
    heads, kv_heads, head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    values = {
        "w_query": 0.3 * normal(1, D, heads, head_dim),
        "w_key": 0.3 * normal(2, D, kv_heads, head_dim),
        "w_value": 0.3 * normal(3, D, kv_heads, head_dim),
        "w_output": 0.3 * normal(4, heads, head_dim, D),
    }
    if spec.qkv_bias:
        values |= {
            "b_query": normal(5, heads, head_dim),
            "b_key": normal(6, kv_heads, head_dim),
            "b_value": normal(7, kv_heads, head_dim),
        }
    if spec.qk_norm is not None:
        values |= {"query_norm.scale": normal(8, head_dim), "key_norm.scale": normal(9, head_dim)}
    if spec.output_bias:
        values["b_output"] = normal(10, D)
    return values


def layer_of(twin: Twin, spec: GroupedQueryAttentionSpec, values=None):
    weights = twin.weights(values_of(spec) if values is None else values)
    return twin.module("attention").GroupedQueryAttention(spec, weights, 0)


def output(twin: Twin, spec: GroupedQueryAttentionSpec, x_BTD, values=None) -> np.ndarray:
    return twin.numpy(layer_of(twin, spec, values)(twin.array(x_BTD)).out_BTD)


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


def test_sequences_of_several_chunks_match_the_reference(twin):
    """70 tokens: on the CPU, JAX takes queries 64 at a time."""
    spec = SPECS["grouped query"]
    assert_layer_matches(
        twin,
        layer_of(twin, spec),
        lambda layer, x: layer(x).out_BTD,
        lambda values, x: grouped_query_attention(spec, values, x).out_BTD,
        values_of(spec),
        normal(0, 2, 70, D),
    )


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


@pytest.mark.parametrize("kind", ["grouped query", "qk_norm"])
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
    spec = GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=N, head_dim=H, position=NoPositionSpec())
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
    """Query head n is served by key/value head n // G, not n % M."""
    grouped, plain = SPECS["grouped query"], SPECS["multi-head"]
    values = values_of(grouped)
    repeated = values | {name: np.repeat(values[name], G, axis=1) for name in ("w_key", "w_value")}
    assert_close(output(twin, plain, X_BTD, repeated), output(twin, grouped, X_BTD, values), FLOAT32)


def test_a_constant_added_to_all_scores_changes_nothing(twin):
    """The same vector on every key adds q . b to every score of a query."""
    spec = GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H, position=NoPositionSpec(), qkv_bias=True)
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


@pytest.mark.parametrize("kind", ["qk_norm", "biases"])
def test_reference_gradient_agrees_with_finite_differences(kind):
    spec = SPECS[kind]
    values = values_of(spec)
    assert_reference_gradient(
        lambda x, *some: (
            grouped_query_attention(spec, values | dict(zip(("w_key", "w_value"), some, strict=True)), x).out_BTD
        ),
        X_BTD[:1, :3],
        values["w_key"],
        values["w_value"],
    )


def test_heads_that_kv_heads_do_not_divide_are_refused():
    with pytest.raises(SpecError, match=r"num_heads is 8, which num_kv_heads = 3 does not divide.*Use a multiple"):
        validate(GroupedQueryAttentionSpec, {"num_heads": 8, "num_kv_heads": 3, "head_dim": 6}, "config")
