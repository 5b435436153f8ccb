"""Log-likelihoods do not depend on batches, on padding, or on what else is scored."""

from types import SimpleNamespace

import numpy as np
import pytest

from moezoo.core.errors import DataError
from moezoo.core.generation.likelihood import (
    Likelihood,
    Pair,
    log_likelihoods,
    log_softmax,
    padded_length,
    rolling_windows,
)

VOCAB = 11


class CausalModel:
    """Logits are a function of the tokens up to each place; remembers the shapes of its inputs."""

    spec = SimpleNamespace(vocab=VOCAB, max_length=None)

    def __init__(self):
        self.shapes = []

    def forward(self, tokens, *, inference):
        assert inference
        self.shapes.append(tokens.shape)
        logits = np.zeros((*tokens.shape, VOCAB), np.float32)
        for row, place in np.ndindex(tokens.shape):
            logits[row, place] = logits_after(tokens[row, : place + 1])
        return SimpleNamespace(logits=logits)


def logits_after(tokens):
    return np.random.default_rng([int(token) for token in tokens]).normal(0, 4, VOCAB).astype(np.float32)


def expected(context, continuation):
    """One token after the other, in float64."""
    sequence, nats, is_greedy = list(context), 0.0, True
    for token in continuation:
        logits = logits_after(sequence).astype(np.float64)
        nats += logits[token] - np.log(np.exp(logits).sum())
        is_greedy &= int(logits.argmax()) == token
        sequence.append(token)
    return nats, is_greedy


def greedy(context, length):
    sequence = list(context)
    for _ in range(length):
        sequence.append(int(logits_after(sequence).argmax()))
    return sequence[len(context) :]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_pair_is_scored_as_by_itself(batch_size):
    draw = np.random.default_rng(0)
    pairs = [Pair(draw.integers(VOCAB, size=1 + n % 7), draw.integers(VOCAB, size=1 + n % 4)) for n in range(20)]
    pairs += [Pair([1, 2], greedy([1, 2], 3)), Pair([1, 2], [])]
    found = log_likelihoods(CausalModel(), pairs, max_length=32, batch_size=lambda _: batch_size)
    for pair, likelihood in zip(pairs, found, strict=True):
        nats, is_greedy = expected(*pair)
        np.testing.assert_allclose(likelihood.nats, nats, rtol=1e-12)
        assert likelihood.is_greedy == is_greedy
    assert found[-2].is_greedy
    assert found[-1] == Likelihood(0.0, True)


def test_answers_of_one_token_share_a_pass():
    model = CausalModel()
    pairs = [Pair([3, 1, 4], [token]) for token in range(VOCAB)]
    found = log_likelihoods(model, pairs, max_length=32, batch_size=lambda _: 8)
    assert model.shapes == [(1, 16)]
    np.testing.assert_allclose(sum(np.exp([each.nats for each in found])), 1, rtol=1e-12)
    assert sum(each.is_greedy for each in found) == 1


def test_a_long_context_loses_its_first_tokens():
    context = [int(token) for token in np.random.default_rng(1).integers(VOCAB, size=40)]
    (found,) = log_likelihoods(CausalModel(), [Pair(context, [5, 6])], max_length=9, batch_size=lambda _: 1)
    assert found.nats == pytest.approx(expected(context[-8:], [5, 6])[0], rel=1e-12)
    for wrong in (Pair([], [1]), Pair([1], [1] * 10)):
        with pytest.raises(DataError, match="expected at most 9"):
            log_likelihoods(CausalModel(), [wrong], max_length=9, batch_size=lambda _: 1)


def test_windows_score_each_token_once_with_the_context_that_fits():
    for length in range(12):
        for longest in range(1, 7):
            windows = list(rolling_windows(range(length), 99, longest))
            assert [token for window in windows for token in window.continuation] == list(range(length))
            read = [len(window.context) + len(window.continuation) - 1 for window in windows]
            assert read == [min(longest, length)] * len(windows)
            assert all(window.context[-1] in (window.continuation[0] - 1, 99) for window in windows)


def test_sequences_are_computed_in_few_lengths():
    assert [padded_length(length, 100) for length in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]
    assert padded_length(200, None) == 256
    assert log_softmax(np.zeros((0, 4), np.float32)).shape == (0, 4)
