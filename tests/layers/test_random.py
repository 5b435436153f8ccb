import numpy as np
import pytest

from moezoo.core import random
from moezoo.core.errors import SpecError
from tests.support.tolerances import FLOAT32, assert_close
from tests.support.twins import Twin

SHAPES = ((), (7,), (2, 0, 3), (3, 5, 7))
KEY = random.key((5 << 32) + 1234567)
COUNTERS = (0, 1, random.ROUTER_NOISE, 2**31 + 3, 2**32 - 1)


def device_key(twin: Twin, key=KEY):
    """Return the key as a uint32 [2] array of the backend."""
    namespace = twin._namespace()
    return namespace.array(key, dtype=namespace.uint32)


@pytest.mark.parametrize("counter", COUNTERS)
def test_keys_are_the_references_bit_for_bit(twin, counter):
    ours = twin.module("random")
    folded = np.array(ours.fold_in(device_key(twin), counter, 7))
    assert folded.dtype == np.uint32
    np.testing.assert_array_equal(folded, random.fold_in(KEY, counter, 7))
    np.testing.assert_array_equal(np.array(ours.fold_in(device_key(twin))), KEY)


def test_uniforms_are_the_references_bit_for_bit_with_a_traced_key_and_counter(twin):
    """As drawn, and on JAX as compiled; our MLX backend compiles nothing, for on a CPU that takes a C++ compiler."""
    ours = twin.module("random")

    def draw(key, step):
        key = ours.fold_in(key, step, random.ATTENTION_DROPOUT)
        return [(ours.bits(key, shape), ours.uniform(key, shape)) for shape in SHAPES]

    step = device_key(twin, np.array(41, np.uint32))
    key = random.fold_in(KEY, 41, random.ATTENTION_DROPOUT)
    for results in (draw(device_key(twin), step), twin.compiled_function(draw)(device_key(twin), step)):
        for shape, (actual_bits, actual_uniform) in zip(SHAPES, results, strict=True):
            np.testing.assert_array_equal(np.array(actual_bits), random.bits(key, shape))
            np.testing.assert_array_equal(np.array(actual_uniform), random.uniform(key, shape))


def test_normal_and_gumbel_are_the_references_up_to_rounding(twin):
    ours, shape = twin.module("random"), (100_000,)
    both = twin.compiled_function(lambda key: (ours.normal(key, shape), ours.gumbel(key, shape)))(device_key(twin))
    for actual, expected in zip(both, (random.normal(KEY, shape), random.gumbel(KEY, shape)), strict=True):
        assert "float32" in str(actual.dtype)
        assert_close(twin.numpy(actual), expected, FLOAT32)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.25, 1.0])
def test_bernoulli_is_the_references(twin, probability):
    actual = twin.module("random").bernoulli(device_key(twin), probability, (11, 13))
    np.testing.assert_array_equal(np.array(actual), random.bernoulli(KEY, probability, (11, 13)))


def test_the_first_and_last_cells_of_a_uniform_become_finite_numbers(twin, monkeypatch):
    """0 and 1 - 2**-23 are possible draws; a logarithm of 0 would be infinite."""
    ours = twin.module("random")
    ends = np.array([0, 1, 2**23 - 1], np.uint32) << np.uint32(9)
    for module, values in ((random, ends), (ours, device_key(twin, ends))):
        monkeypatch.setattr(module, "bits", lambda key, shape, values=values: values)
    normal, gumbel = random.normal(KEY, (3,)), random.gumbel(KEY, (3,))
    assert normal[0] == pytest.approx(-normal[2], rel=1e-9)
    assert normal[2] == pytest.approx(5.29, abs=0.01)
    assert np.all(np.isfinite(gumbel))
    assert_close(twin.numpy(ours.normal(device_key(twin), (3,))), normal, FLOAT32)
    assert_close(twin.numpy(ours.gumbel(device_key(twin), (3,))), gumbel, FLOAT32)


def test_normal_gumbel_and_bernoulli_have_their_moments():
    """Five standard errors."""
    count = 50_000
    normal, gumbel = random.normal(KEY, (count,)), random.gumbel(KEY, (count,))
    assert abs(normal.mean()) < 5 / count**0.5
    assert abs(normal.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs(gumbel.mean() - 0.5772157) < 5 * (1.644934 / count) ** 0.5
    assert abs(random.bernoulli(KEY, 0.25, (count,)).mean() - 0.25) < 5 * (0.1875 / count) ** 0.5


def test_gumbel_noise_draws_from_the_softmax():
    logits_E = np.array([0.0, 1.0, -1.0, 2.0])
    drawn_P = np.argmax(logits_E + random.gumbel(KEY, (40_000, 4)), axis=-1)
    share_E = np.exp(logits_E) / np.sum(np.exp(logits_E))
    counted_E = np.bincount(drawn_P, minlength=4) / len(drawn_P)
    assert np.all(np.abs(counted_E - share_E) < 5 * np.sqrt(share_E * (1 - share_E) / len(drawn_P)))


def test_every_purpose_has_its_own_number():
    purposes = [value for name, value in vars(random).items() if name.isupper() and name[0] != "_"]
    assert len(purposes) == len(set(purposes)) == 7


def test_keys_in_a_batch_draw_normals_independently():
    keys = random.split(KEY, 3)
    np.testing.assert_array_equal(random.normal(keys, (5,)), [random.normal(one, (5,)) for one in keys])


def test_an_invalid_key_is_refused():
    with pytest.raises(SpecError, match=r"not a random key; got float64 \[2\]"):
        random.normal(np.zeros(2), (3,))
