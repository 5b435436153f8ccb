"""Sampling on the device against `moezoo.core.reference.sampling`, which is float64."""

import numpy as np
import pytest

from moezoo.core.random import fold_in, key, uniform
from moezoo.core.reference.sampling import SamplingOptions, penalized, probabilities, sample
from tests.support.tolerances import FLOAT32, assert_close
from tests.support.twins import Twin, normal

SEQUENCES, VOCAB = 37, 53
LOGITS_BV = (3 * normal(1, SEQUENCES, VOCAB)).astype(np.float32)
POSITIONS_B = np.arange(SEQUENCES) * 3 + 5
OPTIONS = {
    "greedy": SamplingOptions(temperature=0),
    "plain": SamplingOptions(seed=2**40 + 3),
    "hot": SamplingOptions(temperature=3.0, seed=1),
    "top-k": SamplingOptions(top_k=5),
    "top-k beyond the vocabulary": SamplingOptions(top_k=2**33),
    "top-p": SamplingOptions(top_p=0.7),
    "min-p": SamplingOptions(min_p=0.2),
    "all": SamplingOptions(temperature=0.7, top_k=20, top_p=0.9, min_p=0.05, seed=3),
    "cold": SamplingOptions(temperature=1e-300),
}


def sampled(twin: Twin, logits_BV, options: SamplingOptions, position_B) -> np.ndarray:
    sampling = twin.module("sampling")
    rows = twin.array(np.arange(len(logits_BV), dtype=np.uint32))

    def drawn(logits_BV, rule, position_B):
        return sampling.sample(logits_BV, rule, sampling.draws(rule.key, position_B, rows))

    position_B = twin.array(np.asarray(position_B, np.uint32))
    return twin.numpy(twin.compiled_function(drawn)(twin.array(logits_BV), sampling.rule_of(options), position_B))


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_are_those_of_the_reference(twin, name):
    np.testing.assert_array_equal(
        sampled(twin, LOGITS_BV, OPTIONS[name], POSITIONS_B), sample(LOGITS_BV, OPTIONS[name], POSITIONS_B)
    )


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("greedy", "cold")])
def test_probabilities_are_those_of_the_reference(twin, name):
    sampling = twin.module("sampling")
    found = twin.numpy(sampling.probabilities(twin.array(LOGITS_BV), sampling.rule_of(OPTIONS[name])))
    expected = probabilities(LOGITS_BV, OPTIONS[name])
    np.testing.assert_array_equal(found > 0, expected > 0)
    assert_close(found / found.sum(axis=-1, keepdims=True), expected, FLOAT32)


@pytest.mark.parametrize(
    "options", [SamplingOptions(temperature=0), SamplingOptions(top_k=2), SamplingOptions(top_p=0.4)]
)
def test_ties_go_to_the_lower_id_and_forbidden_tokens_are_never_drawn(twin, options):
    row = np.array([-np.inf, 0.5, -np.inf, 0.5, 0.5, -np.inf, 0.5, -1], np.float32)
    logits_BV = np.tile(row, (40, 1))
    found = sampled(twin, logits_BV, options, np.arange(40))
    np.testing.assert_array_equal(found, sample(logits_BV, options, np.arange(40)))
    assert set(found.tolist()) == ({1} if options.temperature == 0 else {1, 3})


def test_draws_are_bit_equal_to_the_reference(twin):
    words = np.array(key(2**33 + 5))
    found = twin.module("sampling").draws(
        twin.array(words), twin.array(POSITIONS_B.astype(np.uint32)), twin.array(np.arange(SEQUENCES, dtype=np.uint32))
    )
    expected = [float(uniform(fold_in(words, int(place), row), ())) for row, place in enumerate(POSITIONS_B)]
    np.testing.assert_array_equal(twin.numpy(found), expected)


def test_penalty_is_that_of_the_reference(twin):
    tokens_BT = np.random.default_rng(0).integers(0, VOCAB, (SEQUENCES, 9))
    seen_BV = np.zeros((SEQUENCES, VOCAB), bool)
    np.put_along_axis(seen_BV, tokens_BT, True, axis=-1)
    found = twin.module("sampling").penalized(twin.array(LOGITS_BV), twin.array(seen_BV), twin.array(np.float32(1.3)))
    assert_close(twin.numpy(found), penalized(LOGITS_BV, tokens_BT, 1.3), FLOAT32)


@pytest.mark.parametrize("options", [SamplingOptions(temperature=0), SamplingOptions(), SamplingOptions(top_p=0.5)])
def test_only_rows_that_cannot_be_sampled_are_refused(twin, options):
    logits_BV = np.array(LOGITS_BV[:5])
    logits_BV[1, 3], logits_BV[2, 0], logits_BV[3] = np.nan, np.inf, -np.inf
    found = sampled(twin, logits_BV, options, POSITIONS_B[:5])
    np.testing.assert_array_equal(found < 0, [False, True, True, True, False])
    np.testing.assert_array_equal(found[[0, 4]], sample(LOGITS_BV[:5], options, POSITIONS_B[:5])[[0, 4]])
