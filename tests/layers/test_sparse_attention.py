import math

import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference.sparse_attention import (
    attend_where,
    choose_pools,
    choose_sources,
    index,
    index_loss,
    indexer,
    pool_distribution,
    pool_keys,
)
from moezoo.core.spec import IndexerSpec, LatentAttentionSpec, NoPositionSpec, RoPESpec
from tests.support.tolerances import FLOAT32, FLOAT64, assert_close
from tests.support.twins import (
    B,
    D,
    G,
    H,
    M,
    T,
    Twin,
    assert_function_matches,
    assert_layer_matches,
    assert_reference_gradient,
    normal,
)

N, ROPE, Z, K = 3, 4, 10, 2
SPEC = IndexerSpec(num_heads=N, head_dim=H, top_k=K)
S = T + 2
MASK_TS = np.arange(T)[:, None] + 2 >= np.arange(S)[None, :]
X_BTD, SOURCE_BTZ = normal(0, B, T, D), normal(1, B, T, Z)
INDEX_BTS = normal(2, B, T, S)
VALUES = {
    "w_query": 0.3 * normal(3, Z, N, H),
    "w_key": 0.3 * normal(4, D, H),
    "w_weight": 0.3 * normal(5, D, N),
    "key_norm.scale": normal(6, H),
    "key_norm.bias": normal(7, H),
}


def chosen(twin: Twin, index_BTS: np.ndarray, mask_TS: np.ndarray, top_k: int) -> np.ndarray:
    mask = twin.module("sparse_attention").choose_sources(twin.array(index_BTS), twin.array(mask_TS), top_k)
    expected = choose_sources(index_BTS, mask_TS, top_k)
    np.testing.assert_array_equal(twin.numpy(mask), expected)
    return expected


@pytest.mark.parametrize(("layout", "rotated"), [("half_split", "first"), ("interleaved", "last")])
def test_indexer_and_its_index_match_the_reference(twin, layout, rotated):
    spec = SPEC.model_copy(update={"layout": layout, "rotated": rotated})
    position = RoPESpec(base=50, layout="interleaved")
    module = twin.module("sparse_attention")
    position_T = np.arange(T) + 3
    arrays = [twin.array(each) for each in (X_BTD, SOURCE_BTZ, position_T)]
    assert_layer_matches(
        twin,
        module.Indexer(spec, position, ROPE, twin.weights(VALUES)),
        lambda layer: module.index(*layer(*arrays)),
        lambda values: index(*indexer(spec, position, ROPE, values, X_BTD, SOURCE_BTZ, position_T)),
        VALUES,
    )


def test_only_the_first_features_are_rotated_and_by_the_indexers_own_layout():
    rotated, plain = (
        indexer(SPEC, position, ROPE, VALUES, X_BTD, SOURCE_BTZ, np.arange(T))
        for position in (RoPESpec(layout="interleaved"), NoPositionSpec())
    )
    for after, before in zip(rotated[:2], plain[:2], strict=True):
        assert_close(after[..., ROPE:], before[..., ROPE:], FLOAT64)
        assert_close(after[:, 0], before[:, 0], FLOAT64)
        half = ROPE // 2  # pair 0 (features 0 and ROPE / 2) is rotated by t
        turned = math.cos(2) * before[:, 2, ..., 0] - math.sin(2) * before[:, 2, ..., half]
        assert_close(after[:, 2, ..., 0], turned, FLOAT64)


def test_the_last_features_are_rotated_as_the_first_ones_would_be():
    last, position_T = SPEC.model_copy(update={"rotated": "last"}), np.arange(T)
    position, swapped = RoPESpec(), np.roll(np.arange(H), ROPE)  # the last features come first
    values = VALUES | {name: VALUES[name][..., swapped] for name in VALUES if name != "w_weight"}
    moved = indexer(SPEC, position, ROPE, values, X_BTD, SOURCE_BTZ, position_T)
    found = indexer(last, position, ROPE, VALUES, X_BTD, SOURCE_BTZ, position_T)
    for own, other in zip(found[:2], moved[:2], strict=True):
        assert_close(other, np.roll(own, ROPE, axis=-1), FLOAT64)


def test_index_matches_the_reference_and_its_formula(twin):
    query, key, weight = normal(1, B, T, N, H), normal(2, B, S, H), normal(3, B, T, N)
    assert_function_matches(twin, twin.module("sparse_attention").index, index, query, key, weight)
    one = sum(weight[1, 2, n] * max(0.0, query[1, 2, n] @ key[1, 4]) for n in range(N))
    assert_close(index(query, key, weight)[1, 2, 4], one, FLOAT64)


def test_the_highest_allowed_positions_are_chosen(twin):
    mask = chosen(twin, INDEX_BTS, MASK_TS, K + 1)
    for b in range(B):
        for t in range(T):
            allowed = [s for s in range(S) if MASK_TS[t, s]]
            best = sorted(allowed, key=lambda s: -INDEX_BTS[b, t, s])[: K + 1]
            assert set(np.flatnonzero(mask[b, t])) == set(best)


def test_a_high_index_of_a_future_token_displaces_no_choice(twin):
    """A top-k before the mask would choose the last positions for every query, and leave early queries with none."""
    growing = np.broadcast_to(np.arange(float(T)), (1, T, T)).copy()
    mask = chosen(twin, growing, np.tri(T, dtype=bool), K)
    np.testing.assert_array_equal(mask[0].sum(axis=-1), np.minimum(np.arange(T) + 1, K))
    np.testing.assert_array_equal(mask[0], np.tri(T, dtype=bool) & ~np.tri(T, k=-K, dtype=bool))


def test_ties_go_to_the_lower_position(twin):
    """Where every relu is zero the index is 0 or -0: such ties are systematic."""
    tied = np.zeros((1, T, T))
    tied[..., 1::2] = -0.0
    mask = chosen(twin, tied, np.tri(T, dtype=bool), K)
    np.testing.assert_array_equal(np.flatnonzero(mask[0, -1]), np.arange(K))


@pytest.mark.parametrize("top_k", [1, 7, 33, 80])
def test_many_positions_with_few_values_are_chosen_as_by_the_reference(twin, top_k):
    """Of both signs, with ties at the threshold, infinite ones, and queries that see fewer than they may choose."""
    draw = np.random.default_rng(0)
    few = draw.choice([-np.inf, -2.5, -1e-3, -0.0, 0.0, 1e-30, 1.5, 3e8, np.inf], (2, 20, 70))
    mask = chosen(twin, few, draw.random((20, 70)) < np.linspace(0.1, 1, 20)[:, None], top_k)
    assert mask.any()


@pytest.mark.parametrize("heads", [(M, G), (1, G)], ids=["grouped", "shared key"])
def test_attend_where_matches_the_reference(twin, heads):
    query = normal(1, B, T, *heads, H)
    key, value = normal(2, B, S, heads[0], H), normal(3, B, S, heads[0], H + 3)
    mask = choose_sources(INDEX_BTS, MASK_TS, K)
    on_device = twin.array(mask)
    assert_function_matches(
        twin,
        lambda *arrays: twin.module("sparse_attention").attend_where(*arrays, on_device, 0.4)[0],
        lambda *arrays: attend_where(*arrays, mask, 0.4)[0],
        query,
        key,
        value,
    )
    arrays = [twin.array(each) for each in (query, key, value)]
    distribution = twin.numpy(twin.module("sparse_attention").attend_where(*arrays, on_device, 0.4)[1])
    assert_close(distribution, attend_where(query, key, value, mask, 0.4)[1], FLOAT32)
    assert np.all(distribution[~mask] == 0)
    assert_close(distribution.sum(axis=-1), np.ones((B, T)), FLOAT32)


def distribution_of(mask_BTS: np.ndarray, spread: float) -> np.ndarray:
    weight = np.where(mask_BTS, np.exp(spread * normal(8, B, T, S)), 0.0)
    return weight / weight.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("spread", [1.0, 60.0], ids=["even", "underflowing"])
def test_index_loss_matches_the_reference(twin, spread):
    mask = choose_sources(INDEX_BTS, MASK_TS, K + 2)
    distribution = distribution_of(mask, spread)
    on_device = twin.array(distribution), twin.array(mask)
    assert_function_matches(
        twin,
        lambda index: twin.module("sparse_attention").index_loss(index, *on_device),
        lambda index: index_loss(index, distribution, mask),
        INDEX_BTS,
    )


def test_index_loss_is_accurate_near_its_minimum(twin):
    """The divergence is 1e-6 here; as a difference of entropies in float32 it would have one digit."""
    mask = choose_sources(INDEX_BTS, MASK_TS, K + 2)
    distribution = distribution_of(mask, 1.0)
    near = np.log(np.where(mask, distribution, 1.0)) + 2.0**-9 * np.sign(normal(9, B, T, S))
    near = near.astype(np.float32).astype(np.float64)
    exactly = np.exp(near) * mask
    exactly = exactly / exactly.sum(axis=-1, keepdims=True)
    expected = index_loss(near, distribution, mask)
    assert 1e-7 < expected < 1e-5
    assert index_loss(near, exactly, mask) < 1e-15
    loss = twin.module("sparse_attention").index_loss(twin.array(near), twin.array(distribution), twin.array(mask))
    assert abs(float(loss) / expected - 1) < 1e-3


def test_reference_gradients_agree_with_finite_differences():
    mask = choose_sources(INDEX_BTS, MASK_TS, K + 2)
    assert_reference_gradient(lambda index: index_loss(index, distribution_of(mask, 1.0), mask), INDEX_BTS)
    assert_reference_gradient(index, normal(1, 1, 2, N, H), normal(2, 1, 3, H), normal(3, 1, 2, N))
    key, value = normal(2, B, S, M, H), normal(3, B, S, M, H)
    assert_reference_gradient(lambda *arrays: attend_where(*arrays, mask, 0.4)[0], normal(1, B, T, M, G, H), key, value)


def test_index_heads_narrower_than_what_they_rotate_are_refused():
    fields = {"num_heads": 2, "head_dim": 6, "rope_head_dim": 4, "value_head_dim": 5, "latent_dim": 8}
    fields["indexer"] = {"num_heads": 2, "head_dim": 2, "top_k": 3}
    with pytest.raises(SpecError, match=r"indexer.head_dim is 2, but it rotates rope_head_dim = 4 features"):
        validate(LatentAttentionSpec, fields, "config")


POOLS = SPEC.model_copy(update={"top_k": 4, "pool_size": 2})


def test_the_key_of_a_pool_is_the_mean_of_its_tokens_weighted_by_their_gates():
    key_BSH, gate_BSH, bias_SH = normal(11, B, S, H), normal(12, B, S, H), normal(13, 3, H)
    power = np.exp(gate_BSH[:, 2:5] + bias_SH)
    expected = np.sum(power * key_BSH[:, 2:5], axis=1) / np.sum(power, axis=1)
    assert_close(pool_keys(key_BSH, gate_BSH, bias_SH)[:, 4], expected, FLOAT64)


def test_whole_pools_are_chosen_and_the_tokens_behind_them(twin):
    """Queries 2 to T + 1 over pools (0, 1), (2, 3), ... of which two are chosen."""
    spec, index_BTS, position_S = POOLS, INDEX_BTS, np.arange(S)
    position_T = position_S[2:]
    found = choose_pools(spec, index_BTS, position_T, position_S, MASK_TS)
    ours = [twin.array(each) for each in (index_BTS, position_T, position_S, MASK_TS)]
    np.testing.assert_array_equal(twin.numpy(twin.module("sparse_attention").choose_pools(spec, *ours)), found)
    for row in range(B):
        for place, t in enumerate(position_T):
            ends = list(range(1, t + 1, 2))
            best = sorted(ends, key=lambda end: -index_BTS[row, place, end])[:2]
            expected = {s for end in best for s in (end - 1, end)} | ({t} if t % 2 == 0 else set())
            assert set(np.flatnonzero(found[row, place])) == expected


def test_the_loss_of_pools_compares_the_attention_to_each(twin):
    spec, position_S = POOLS, np.arange(S)
    chosen_BTS = choose_pools(spec, INDEX_BTS, position_S[2:], position_S, MASK_TS)
    chosen_BTS[0, 0] = [True] + [False] * (S - 1)  # a query without a complete pool
    distribution_BTS = distribution_of(chosen_BTS, 1.0)
    mass_BTS, end_BTS = pool_distribution(spec, distribution_BTS, chosen_BTS, position_S)
    assert_close(mass_BTS.sum(-1), np.ones((B, T)), FLOAT64)
    np.testing.assert_array_equal(mass_BTS[0, 0], np.eye(S)[0])
    t = T - 1
    ends = np.flatnonzero(end_BTS[1, t])
    sums = np.array([distribution_BTS[1, t, end - 1 : end + 1].sum() for end in ends])
    assert_close(mass_BTS[1, t, ends], sums / sums.sum(), FLOAT64)
    ours = [twin.array(each) for each in (distribution_BTS, chosen_BTS, position_S)]
    found = twin.module("sparse_attention").pool_distribution(spec, *ours)
    assert_close(twin.numpy(found[0]), mass_BTS, FLOAT32)
    np.testing.assert_array_equal(twin.numpy(found[1]), end_BTS)
