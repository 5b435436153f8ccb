import numpy as np
import pytest

from moezoo.core.errors import DataError, SpecError
from moezoo.core.random import fold_in, key, uniform
from moezoo.core.reference.sampling import SamplingOptions, probabilities, sample

P = np.array([0.05, 0.4, 0.15, 0.3, 0.1])
LOGITS_1V = np.log(P)[None].astype(np.float32)


def kept(**options):
    p_BV = probabilities(LOGITS_1V, SamplingOptions(**options))
    np.testing.assert_allclose(p_BV.sum(axis=-1), 1, rtol=1e-12)
    return set(np.flatnonzero(p_BV[0]).tolist())


def random_logits(sequences=3, vocabulary=11, seed=0):
    return np.random.default_rng(seed).standard_normal((sequences, vocabulary)).astype(np.float32)


def test_greedy_takes_the_highest_logit_and_the_lower_id_on_ties():
    logits_BV = np.array([[0, 3, 1, 3], [2, 2, 2, 2], [-np.inf, -5, -4, -np.inf]], np.float32)
    chosen_B = sample(logits_BV, SamplingOptions(temperature=0, top_k=3, seed=9), 0)
    assert chosen_B.dtype == np.int32
    assert chosen_B.tolist() == [1, 0, 2]
    np.testing.assert_array_equal(probabilities(logits_BV, SamplingOptions(temperature=0)).argmax(axis=-1), chosen_B)


def test_top_k_of_one_and_tiny_temperature_equal_greedy():
    logits_BV = np.concatenate([random_logits(50), np.zeros((1, 11), np.float32)])
    greedy_B = sample(logits_BV, SamplingOptions(temperature=0), 3)
    for position in range(5):
        np.testing.assert_array_equal(sample(logits_BV, SamplingOptions(top_k=1), position), greedy_B)
        tiny = SamplingOptions(temperature=1e-320, top_k=10)
        np.testing.assert_array_equal(sample(logits_BV[:-1], tiny, position), greedy_B[:-1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.71}, {1, 2, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_p": 1e-9}, {1}),
        ({"min_p": 0.37}, {1, 2, 3}),
        ({"min_p": 0.38}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        ({"min_p": 0.0}, {0, 1, 2, 3, 4}),
        ({"top_k": 2, "top_p": 0.57}, {1}),  # top-p applies to 4/7 and 3/7, not 0.4 and 0.3
        ({"top_k": 3, "top_p": 0.9, "min_p": 0.5}, {1, 3}),
        ({"temperature": 2.0, "min_p": 0.37}, {1, 2, 3, 4}),  # the temperature is applied first
        ({"temperature": 0.5, "min_p": 0.37}, {1, 3}),
    ],
)
def test_filters_leave_exactly_the_expected_tokens(options, expected):
    assert kept(**options) == expected


def test_filters_break_ties_by_the_lower_id():
    equal_1V = np.zeros((1, 6), np.float32)
    assert np.flatnonzero(probabilities(equal_1V, SamplingOptions(top_k=2))[0]).tolist() == [0, 1]
    assert np.flatnonzero(probabilities(equal_1V, SamplingOptions(top_p=0.4))[0]).tolist() == [0, 1, 2]
    assert np.flatnonzero(probabilities(equal_1V, SamplingOptions(min_p=1.0))[0]).tolist() == list(range(6))


def test_probabilities_are_a_softmax_that_a_constant_does_not_change():
    logits_BV = random_logits()
    expected_BV = np.exp(logits_BV.astype(np.float64) / 0.7)
    expected_BV /= expected_BV.sum(axis=-1, keepdims=True)
    options = SamplingOptions(temperature=0.7)
    np.testing.assert_allclose(probabilities(logits_BV, options), expected_BV, rtol=1e-12)
    np.testing.assert_allclose(probabilities(logits_BV + 64, options), expected_BV, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.8},
        {"min_p": 0.2, "temperature": 1.5},
        *(pytest.param(options, marks=pytest.mark.release) for options in ({}, {"temperature": 0.5}, {"top_k": 3})),
    ],
)
@pytest.mark.slow
def test_frequencies_over_many_draws_are_the_probabilities(options):
    draws, options = 5_000, SamplingOptions(seed=1, **options)
    chosen_B = sample(np.repeat(LOGITS_1V, draws, axis=0), options, position=5)
    found = np.bincount(chosen_B, minlength=5) / draws
    expected = probabilities(LOGITS_1V, options)[0]
    standard_error = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(found - expected) <= 4.5 * standard_error).all()  # exactly 0 where a filter forbids


def test_frequencies_over_many_positions_are_the_probabilities():
    draws = 3000
    chosen = [int(sample(LOGITS_1V, SamplingOptions(seed=2), position)[0]) for position in range(draws)]
    found = np.bincount(chosen, minlength=5) / draws
    assert (np.abs(found - P) <= 4.5 * np.sqrt(P * (1 - P) / draws)).all()


def test_forbidden_tokens_are_never_drawn():
    logits_BV = np.full((2000, 7), -np.inf, np.float32)
    logits_BV[:, [2, 4]] = 0
    assert set(sample(logits_BV, SamplingOptions(), 0).tolist()) == {2, 4}
    assert set(sample(logits_BV, SamplingOptions(top_k=5, top_p=0.99, min_p=0.1), 0).tolist()) == {2, 4}


def test_draw_is_a_function_of_seed_position_and_sequence():
    logits_BV = np.zeros((64, 1000), np.float32)
    first_B = sample(logits_BV, SamplingOptions(seed=7), 3)
    np.testing.assert_array_equal(sample(logits_BV, SamplingOptions(seed=7), 3), first_B)
    np.testing.assert_array_equal(sample(logits_BV[:5], SamplingOptions(seed=7), 3), first_B[:5])
    assert len(set(first_B.tolist())) > 50  # sequences differ
    for other in (sample(logits_BV, SamplingOptions(seed=8), 3), sample(logits_BV, SamplingOptions(seed=7), 4)):
        assert (other == first_B).mean() < 0.1


def test_draw_inverts_the_cumulative_distribution_in_the_order_of_ids():
    for position in range(20):
        for sequence, token in enumerate(sample(np.repeat(LOGITS_1V, 4, axis=0), SamplingOptions(seed=5), position)):
            draw = float(uniform(fold_in(key(5), position, sequence), ()))
            assert token == np.searchsorted(np.cumsum(P), draw, side="right")


def test_swapping_nearly_equal_logits_does_not_change_the_draws():
    one = np.array([[1.0, 1.0 + 1e-6, -2.0, 0.5]], np.float32)
    other = np.array([[1.0 + 1e-6, 1.0, -2.0, 0.5]], np.float32)
    options = SamplingOptions(top_k=3, top_p=0.99)
    same = [sample(one, options, position) == sample(other, options, position) for position in range(500)]
    assert np.mean(same) > 0.995


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"temperature": -0.1}, r"sampling\.temperature is -0\.1; expected a finite number >= 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"top_k": 0}, "top_k is 0; expected an integer >= 1, or null for off"),
        ({"top_k": 2.0}, r"top_k is 2\.0"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": 0.0}, r"top_p is 0\.0; expected a number in \(0, 1\]"),
        ({"top_p": 1.01}, r"top_p is 1\.01"),
        ({"min_p": -0.1}, r"min_p is -0\.1; expected a number in \[0, 1\]"),
        ({"min_p": 1.1}, r"min_p is 1\.1"),
        ({"seed": -1}, "seed .* got -1"),
    ],
)
def test_bad_option_is_refused(options, problem):
    with pytest.raises(SpecError, match=problem):
        SamplingOptions(**options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_are_refused(temperature):
    options = SamplingOptions(temperature=temperature)
    logits_BV = random_logits()
    for value in (np.nan, np.inf):
        broken_BV = logits_BV.copy()
        broken_BV[2, 5] = value
        with pytest.raises(DataError, match=rf"sequence 2 hold {value} at token 5"):
            sample(broken_BV, options, 0)
    logits_BV[1] = -np.inf
    with pytest.raises(DataError, match="sequence 1 forbid every token"):
        sample(logits_BV, options, 0)
    with pytest.raises(DataError, match=r"logits have shape \[11\]; expected .*\[B, V\]"):
        sample(logits_BV[0], options, 0)
