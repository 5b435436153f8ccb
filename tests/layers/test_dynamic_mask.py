"""Dynamic mask attention: values and gradients, caches and documents, and which keys are kept."""

import numpy as np
import pytest

from moezoo.core.reference.attention import grouped_query_attention
from moezoo.core.reference.dynamic_mask import keep_greatest, key_bias
from moezoo.core.reference.positions import packed_documents
from moezoo.core.spec import DynamicMaskSpec, GroupedQueryAttentionSpec
from tests.support.tolerances import EXACT, FLOAT32, assert_close
from tests.support.twins import (
    B,
    D,
    H,
    M,
    N,
    Twin,
    assert_layer_matches,
    assert_reference_gradient,
    normal,
)

T, KEEP = 14, 4
MASK = {"w_step": 0.5 * normal(5, M, H, M), "b_step": normal(6, M), "rate": np.array([0.7, -0.4])}
VALUES = {
    "w_query": 0.3 * normal(1, D, N, H),
    "w_key": 0.3 * normal(2, D, M, H),
    "w_value": 0.3 * normal(3, D, M, H),
    "w_output": 0.3 * normal(4, N, H, D),
    **{f"dynamic_mask.{name}": value for name, value in MASK.items() if name != "b_step"},
}
BIASES = {"b_query": normal(7, N, H), "b_key": normal(8, M, H), "b_value": normal(9, M, H)}
X_BTD = normal(0, B, T, D)
CAUSAL_TT = np.tril(np.ones((T, T), bool))


def spec_of(**options) -> GroupedQueryAttentionSpec:
    fields = {"num_heads": N, "num_kv_heads": M, "head_dim": H, "dynamic_mask": DynamicMaskSpec(keep=KEEP)}
    return GroupedQueryAttentionSpec(**(fields | options))


SPEC = spec_of()
WINDOW = spec_of(window=6, qkv_bias=True, softcap=3.0)
KINDS = {
    "keep": (SPEC, VALUES),
    "window, softcap and biases": (WINDOW, VALUES | BIASES | {"dynamic_mask.b_step": MASK["b_step"]}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def layer_of(twin: Twin, kind="keep"):
    spec, values = KINDS[kind]
    return twin.module("attention").GroupedQueryAttention(spec, twin.weights(values), 0)


def out(kind="keep", documents=None):
    spec = KINDS[kind][0]
    return lambda values, x_BTD: grouped_query_attention(spec, values, x_BTD, documents=documents).out_BTD


@kinds
def test_value_and_gradients_match_the_reference(twin, kind):
    assert_layer_matches(
        twin, layer_of(twin, kind), lambda layer, x: layer(x).out_BTD, out(kind), KINDS[kind][1], X_BTD
    )


def test_the_bias_matches_the_reference_and_its_gradient_finite_differences(twin):
    value_BSMH = normal(10, B, T, M, H)
    mask = twin.module("dynamic_mask").DynamicMask(twin.weights(MASK))
    assert_layer_matches(twin, mask, lambda mask, value: mask(value), key_bias, MASK, value_BSMH)
    names = list(MASK)
    assert_reference_gradient(
        lambda value, *given: key_bias(dict(zip(names, given, strict=True)), value), value_BSMH, *MASK.values()
    )
    step = np.einsum("bsnh,nhm->bms", value_BSMH, MASK["w_step"]) + MASK["b_step"][:, None]
    assert_close(key_bias(MASK, value_BSMH), np.exp(MASK["rate"][:, None] * np.log1p(np.exp(step))), FLOAT32)


def test_each_query_keeps_the_visible_keys_of_the_greatest_bias(twin):
    bias_BMS = normal(11, B, M, T)
    ours = twin.module("dynamic_mask").keep_greatest
    found = keep_greatest(SPEC.dynamic_mask, bias_BMS, CAUSAL_TT)
    kept = ours(SPEC.dynamic_mask, twin.array(bias_BMS), twin.array(CAUSAL_TT))
    assert_close(twin.numpy(kept), found, EXACT)
    for row, head, t in np.ndindex(B, M, T):
        greatest = sorted(range(t + 1), key=lambda s: bias_BMS[row, head, s])[-KEEP:]
        assert set(np.flatnonzero(found[row, head, t])) == set(greatest)
    everything = ours(DynamicMaskSpec(keep=T), twin.array(bias_BMS), twin.array(CAUSAL_TT))
    assert_close(twin.numpy(everything), np.broadcast_to(CAUSAL_TT, found.shape), EXACT)


def test_equal_biases_keep_the_last_keys(twin):
    """As at first, when the rate is 0."""
    still = VALUES | {"dynamic_mask.rate": np.zeros(M)}
    plain = {name: value for name, value in VALUES.items() if not name.startswith("dynamic_mask")}
    spec = SPEC.model_copy(update={"dynamic_mask": None, "window": KEEP})
    expected = grouped_query_attention(spec, plain, X_BTD).out_BTD
    assert_close(out()(still, X_BTD), expected, FLOAT32)
    layer = twin.compiled(twin.module("attention").GroupedQueryAttention(SPEC, twin.weights(still), 0))
    assert_close(twin.numpy(layer(twin.array(X_BTD)).out_BTD), expected, FLOAT32)


@kinds
def test_cached_parts_equal_the_uncached_pass_also_behind_padding(twin, kind):
    spec = KINDS[kind][0]
    slots = T if spec.window is None else spec.window
    zeros = [twin.array(np.zeros((B, slots, M, H))) for _ in range(2)]
    empty = twin.array(np.array(0, np.int32)) if twin.name == "jax" else 0
    caches = twin.module("kv_cache")
    cache = (caches.KVCache if spec.window is None else caches.RollingCache)(*zeros, empty)
    first, start, found, layer = np.array([0, 4, 1]), 0, [], twin.compiled(layer_of(twin, kind))
    for part in (5, 1, 1, 7):
        attended = layer(twin.array(X_BTD[:, start : start + part]), cache, first_B=twin.array(first))
        cache, start = attended.cache, start + part
        found.append(twin.numpy(attended.out_BTD))
    for row, begin in enumerate(first):
        own = slice(row, row + 1), slice(begin, None)
        assert_close(np.concatenate(found, axis=1)[own], out(kind)(KINDS[kind][1], X_BTD[own]), FLOAT32)


def test_documents_keep_keys_of_their_own(twin):
    document_BT = np.array([[0] * 5 + [1] * 9, [0] * 14, [0] * 2 + [1] * 12])
    documents = packed_documents(document_BT)
    expected = out(documents=documents)(VALUES, X_BTD)
    assert_close(expected[:1, 5:], out()(VALUES, X_BTD[:1, 5:]), FLOAT32)
    ours = twin.module("positions").packed_documents(twin.array(document_BT))
    found = twin.compiled(layer_of(twin))(twin.array(X_BTD), documents=ours).out_BTD
    assert_close(twin.numpy(found), expected, FLOAT32)


def test_chunks_of_queries_keep_what_the_whole_keeps(twin, monkeypatch):
    monkeypatch.setattr(twin.module("attention"), "chunk_length", lambda length: 5)
    found = twin.compiled(layer_of(twin))(twin.array(X_BTD)).out_BTD
    assert_close(twin.numpy(found), out()(VALUES, X_BTD), FLOAT32)


def test_ties_in_a_cache_of_reused_slots_go_to_the_later_token(twin):
    """A window is kept in slots that are used again, so that their order is not that of the tokens."""
    mask, bias_BMS, slot_T = twin.module("dynamic_mask"), np.ones((B, M, T), np.float32), np.roll(np.arange(T), 5)
    given = (twin.array(each) for each in (bias_BMS, CAUSAL_TT[-1:, slot_T], slot_T.astype(np.int32)))
    kept = np.asarray(mask.keep_greatest(DynamicMaskSpec(keep=KEEP), *given))
    np.testing.assert_array_equal(kept, np.broadcast_to(slot_T >= T - KEEP, (B, M, 1, T)))
