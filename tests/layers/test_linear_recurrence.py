"""Recurrent states that decay: the form in chunks, of the reference and of both backends, is the recurrence."""

import numpy as np
import pytest

from moezoo.core.reference.linear_recurrence import linear_recurrence, linear_recurrence_in_chunks
from tests.support.tolerances import FLOAT32, FLOAT64, assert_close
from tests.support.twins import B, G, H, M, Twin, assert_function_matches, assert_reference_gradient, normal

Z, SEVERAL_CHUNKS = 10, 70  # 64 is one chunk


def inputs(length: int) -> list[np.ndarray]:
    """Return queries, keys, values, and log decays, for decays from about 0.999 to 1e-20."""
    query, key, value = normal(1, B, length, M, H), normal(2, B, length, M, H), normal(3, B, length, M, G, Z)
    return [query, key, value, -np.exp(2 * normal(4, B, length, M, G) - 2)]


def of_twin(twin: Twin):
    """Return the twin's recurrence from a state of zeros, without the last state."""
    state = twin.array(np.zeros((B, M, G, H, Z)))
    recurrence = twin.module("linear_recurrence").linear_recurrence
    return twin.compiled_function(lambda *arrays: recurrence(*arrays, state)[0])


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
def test_chunks_and_recurrence_are_the_same_function(chunk):
    arrays = inputs(11)
    assert_close(linear_recurrence_in_chunks(*arrays, chunk), linear_recurrence(*arrays), FLOAT64)


def test_values_and_gradients_over_several_chunks_match_the_recurrence(twin: Twin):
    assert_function_matches(twin, of_twin(twin), linear_recurrence, *inputs(SEVERAL_CHUNKS))


def test_a_slow_decay_after_a_reset_stays_accurate(twin: Twin):
    """Differences of sums from the start of a chunk would lose four of seven digits after the -1000."""
    *others, log_decay = inputs(SEVERAL_CHUNKS)
    log_decay = np.where(np.arange(SEVERAL_CHUNKS)[:, None, None] % 16 == 3, -1000.0, 0.01 * np.tanh(log_decay))
    found = of_twin(twin)(*(twin.array(array) for array in (*others, log_decay)))
    assert_close(twin.numpy(found), linear_recurrence(*others, log_decay), FLOAT32)


def test_without_decay_a_query_reads_the_sum_of_the_values_of_its_key(twin: Twin):
    key = np.broadcast_to(np.eye(H)[[0, 1, 0]][None, :, None], (B, 3, M, H))
    value = normal(3, B, 3, M, G, Z)
    found = of_twin(twin)(*(twin.array(array) for array in (key, key, value, np.zeros((B, 3, M, G)))))
    expected = np.stack([value[:, 0], value[:, 1], value[:, 0] + value[:, 2]], axis=1)
    assert_close(twin.numpy(found), expected, FLOAT32)


def test_reference_gradient_agrees_with_finite_differences():
    assert_reference_gradient(linear_recurrence, *(array[:1] for array in inputs(3)))
