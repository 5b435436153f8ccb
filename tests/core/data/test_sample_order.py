import numpy as np
import pytest

from moezoo.core.data import sample_order


def words(*values):
    return np.array(values, np.uint64)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 10, 97, 100, 1562])
def test_permutation_is_a_bijection(size):
    index = np.arange(size, dtype=np.uint64)
    result = sample_order.permute(index, size, np.full(size, sample_order.key(5, size), np.uint64))
    assert sorted(result.tolist()) == list(range(size))


def test_permutation_looks_random():
    index = np.arange(4096, dtype=np.uint64)
    result = sample_order.permute(index, 4096, np.full(4096, sample_order.key(1), np.uint64)).astype(float)
    assert abs(np.corrcoef(result[:-1], result[1:])[0, 1]) < 0.05
    assert (result == index).sum() < 8


def test_permutations_are_uniform_over_keys():
    size, draws = 7, 7000
    keys = np.array([sample_order.key(2, draw) for draw in range(draws)], np.uint64)
    for index in range(size):
        counts = np.bincount(sample_order.permute(np.full(draws, index, np.uint64), size, keys).astype(int))
        assert counts.min() > 850  # 1000 expected, standard deviation 29
        assert counts.max() < 1150


def test_the_order_is_the_same_on_every_machine():
    """Golden values: a change changes the training data of every seed."""
    keys = np.full(5, sample_order.key(7, 3), np.uint64)
    assert sample_order.permute(words(0, 1, 2, 3, 4), 1000, keys).tolist() == [627, 375, 686, 880, 201]
    starts = sample_order.starts(words(0, 1, 5, 10**9), 10**6, 128, 7, 0)
    assert starts.tolist() == [627640, 353976, 163384, 301351]


@pytest.mark.parametrize(
    ("num_tokens", "length"), [(2, 1), (6, 5), (7, 5), (10, 5), (11, 5), (12, 5), (1000, 7), (50, 1), (97, 96)]
)
def test_every_token_is_a_target_in_every_epoch(num_tokens, length):
    n = sample_order.windows_per_epoch(num_tokens, length)
    repeats = n * length - (num_tokens - 1)
    assert 0 <= repeats <= max(0, 2 * length - 2)
    seen = set()
    for epoch in range(40):
        index = np.arange(epoch * n, (epoch + 1) * n, dtype=np.uint64)
        starts = np.sort(sample_order.starts(index, num_tokens, length, 3, 0).astype(int))
        assert starts[0] == 0
        assert starts[-1] + length + 1 == num_tokens
        inside = starts[(starts > 0) & (starts + length + 1 < num_tokens)]
        assert (np.diff(inside) == length).all()
        targets = (starts[:, None] + np.arange(1, length + 1)).ravel()
        assert set(targets) == set(range(1, num_tokens))
        seen.update(inside[:1])
    if num_tokens > 3 * length > 3:
        assert len(seen) > length // 2  # boundaries change


def test_epochs_seeds_and_sources_have_different_orders():
    index = np.arange(500, dtype=np.uint64)
    first = sample_order.starts(index, 500 * 8, 8, 1, 0)
    for other in (
        sample_order.starts(index + np.uint64(499), 500 * 8, 8, 1, 0),
        sample_order.starts(index, 500 * 8, 8, 2, 0),
        sample_order.starts(index, 500 * 8, 8, 1, 1),
    ):
        assert (first // np.uint64(8) == other // np.uint64(8)).mean() < 0.05


def test_blend_is_exact_and_has_no_gaps():
    weights = [1.0, 2.0, 5.5, 0.25]
    sample = np.arange(20_000, dtype=np.uint64)
    source, index = sample_order.blend(sample, weights, seed=3)
    for k, weight in enumerate(weights):
        assert index[source == k].tolist() == list(range(int((source == k).sum())))
        for upto in (20, 1000, 20_000):
            expected = upto * weight / sum(weights)
            assert abs((source[:upto] == k).sum() - expected) <= len(weights)


def test_blend_has_random_access():
    weights = [3.0, 1.0, 1.0]
    source, index = sample_order.blend(np.arange(1000, dtype=np.uint64), weights, seed=3)
    for g in (0, 7, 999):
        one_source, one_index = sample_order.blend(words(g), weights, seed=3)
        assert (one_source[0], one_index[0]) == (source[g], index[g])


def test_blend_does_not_overflow():
    source, index = sample_order.blend(np.arange(2**62, 2**62 + 100, dtype=np.uint64), [1.0, 3.0], seed=0)
    assert 24 <= (source == 0).sum() <= 26
    assert abs(int(index[source == 0][0]) - 2**60) <= 1


def test_blend_supports_weights_of_very_different_size():
    source, _ = sample_order.blend(np.arange(1000, dtype=np.uint64), [1e30, 1e-30], seed=0)
    assert (source == 0).sum() >= 999
