import numpy as np
import pytest

from moezoo.core.errors import SpecError
from moezoo.core.random import _threefry, bits, fold_in, key, split, uniform
from tests.support.backends_available import require_backend

SEEDS = (0, 1, 42, 2**31, 2**32 - 1)
SHAPES = ((), (1,), (7,), (3, 5), (2, 0, 3), (3, 5, 7))


@pytest.fixture
def jax():
    return require_backend("jax")


@pytest.mark.parametrize(
    ("counter", "secret", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_published_vectors(counter, secret, expected):
    """Known answers of the Random123 distribution (threefry2x32, 20 rounds)."""
    x0, x1 = (np.array([word], np.uint32) for word in counter)
    y0, y1 = _threefry(np.array(secret, np.uint32), x0, x1)
    assert (int(y0[0]), int(y1[0])) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_key_and_fold_in_equal_jax(jax, seed):
    ours, theirs = key(seed), jax.random.key(seed)
    np.testing.assert_array_equal(ours, jax.random.key_data(theirs))
    for number in (0, 1, 1000, 2**32 - 1):
        folded = jax.random.fold_in(theirs, np.uint32(number))
        np.testing.assert_array_equal(fold_in(ours, number), jax.random.key_data(folded))


def test_fold_in_of_several_numbers_is_sequential():
    np.testing.assert_array_equal(fold_in(key(3), 5, 7), fold_in(fold_in(key(3), 5), 7))
    np.testing.assert_array_equal(fold_in(key(3)), key(3))
    assert not np.array_equal(fold_in(key(3), 5, 7), fold_in(key(3), 7, 5))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_bits_and_uniform_equal_jax(jax, seed, shape):
    theirs = jax.random.key(seed)
    ours_bits, ours_uniform = bits(key(seed), shape), uniform(key(seed), shape)
    assert (ours_bits.dtype, ours_bits.shape) == (np.uint32, shape)
    assert (ours_uniform.dtype, ours_uniform.shape) == (np.float32, shape)
    np.testing.assert_array_equal(ours_bits, jax.random.bits(theirs, shape, np.uint32))
    np.testing.assert_array_equal(ours_uniform, jax.random.uniform(theirs, shape))


def test_split_equals_jax_and_fold_in(jax):
    keys = split(key(11), 5)
    np.testing.assert_array_equal(keys, jax.random.key_data(jax.random.split(jax.random.key(11), 5)))
    np.testing.assert_array_equal(keys, [fold_in(key(11), i) for i in range(5)])


def test_batch_of_keys_draws_what_each_key_draws_alone():
    keys = split(key(11), 3)
    np.testing.assert_array_equal(uniform(keys, (5, 7)), [uniform(one, (5, 7)) for one in keys])
    np.testing.assert_array_equal(uniform(keys, ()), [uniform(one, ()) for one in keys])


def test_seeds_that_differ_in_the_high_word_differ():
    assert not np.array_equal(bits(key(5), (4,)), bits(key(5 + 2**32), (4,)))


def test_uniform_is_uniform():
    draw = uniform(key(0), (100_000,))
    assert draw.min() >= 0
    assert draw.max() < 1
    assert abs(draw.mean() - 0.5) < 5 * (1 / 12 / draw.size) ** 0.5  # five standard errors
    counts = np.bincount((draw * 20).astype(int), minlength=20)
    assert np.abs(counts - 5000).max() < 5 * (5000 * 0.95) ** 0.5


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, None])
def test_seed_that_is_not_a_64_bit_integer_is_refused(seed):
    with pytest.raises(SpecError, match=r"got .*expected an integer in \[0, 2\*\*64\)"):
        key(seed)


@pytest.mark.parametrize("number", [-1, 2**32, 0.5])
def test_number_beyond_32_bits_is_refused(number):
    with pytest.raises(SpecError, match="two numbers, high word first"):
        fold_in(key(0), number)


def test_array_that_is_not_a_key_is_refused():
    with pytest.raises(SpecError, match=r"not a random key; got int64 \[2\]; expected uint32 \[2\]"):
        fold_in(np.array([0, 1]), 1)
    with pytest.raises(SpecError, match=r"expected uint32 \[..., 2\]"):
        bits(np.zeros(3, np.uint32), (2,))
