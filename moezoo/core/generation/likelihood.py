"""Log-likelihoods of continuations, and the windows in which a text longer than the context is scored."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moezoo.core.backend import Model, checked_tokens
from moezoo.core.errors import DataError
from moezoo.core.progress import Progress
from moezoo.core.tokens import Floats, Integers

_SHORTEST = 16


class Pair(NamedTuple):
    """Token ids of a continuation, and of the context before it."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """A scored continuation.

    Fields:
        nats: log-probability of all its tokens together, each given those before it.
        is_greedy: each of its tokens is the likeliest one (of equal ones, that of the lowest id).
    """

    nats: float
    is_greedy: bool


def log_likelihoods(
    model: Model,
    pairs: Sequence[Pair],
    *,
    max_length: int,
    batch_size: Callable[[int], int],
    on_progress: Progress | None = None,
) -> list[Likelihood]:
    """Return the log-likelihood of each continuation after its context, with the routing of generation.

    A pair of more than `max_length` + 1 tokens loses the first of them. Pairs that differ in their last token alone,
    such as the answers of a multiple choice, share a forward pass. Sequences of like length form a batch, padded on the
    right: no token sees what comes after it.

    Args:
        model: a built model.
        pairs: contexts of at least one token, and continuations.
        max_length: number of tokens that the model sees at once.
        batch_size: returns the number of sequences in a batch, for sequences of so many tokens.
        on_progress: called with the number of pairs.

    Raises DataError: no context, a continuation of more than `max_length` tokens, or a token outside the vocabulary.
    """
    of_inputs: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        of_inputs.setdefault(_inputs(pair, max_length), []).append(index)
    found, done = [Likelihood(0.0, True)] * len(pairs), 0
    waiting = sorted(of_inputs, key=len, reverse=True)
    while waiting:
        width = padded_length(len(waiting[0]), max_length)
        size = max(1, batch_size(width))
        rows, waiting = waiting[:size], waiting[size:]
        logits_BTV = model.forward(_padded(model, rows, width), inference=True).logits
        for logits_TV, inputs in zip(logits_BTV, rows, strict=False):
            for index in of_inputs[inputs]:
                continuation = np.asarray(pairs[index].continuation, np.int32)
                found[index] = likelihood_of(logits_TV[len(inputs) - len(continuation) : len(inputs)], continuation)
                done += 1
        if on_progress is not None:
            on_progress("scoring", done, len(pairs))
    return found


def likelihood_of(logits_TV: Floats, token_T: Integers) -> Likelihood:
    """Return the likelihood of tokens by the logits at the places before them."""
    own = log_softmax(logits_TV)[np.arange(len(token_T)), token_T]
    return Likelihood(float(own.sum()), bool((logits_TV.argmax(-1) == token_T).all()))


def log_softmax(logits_TV: Floats) -> NDArray[np.float64]:
    """Return the log-probability of every token, in nats: float64 [T, V]."""
    shifted_TV = logits_TV.astype(np.float64) - logits_TV.max(-1, keepdims=True, initial=-np.inf)
    return np.asarray(shifted_TV - np.log(np.exp(shifted_TV).sum(-1, keepdims=True)))


def rolling_windows(tokens: Sequence[int], first_token: int, max_length: int) -> Iterator[Pair]:
    """Yield the windows of a text whose tokens are all scored, each once, with as much context as there is.

    The first window is of `max_length` tokens after `first_token`. In the others all but the last token of the model's
    input is what it predicted before, unless there are fewer tokens left: the last window has a longer context.

    >>> [tuple(window) for window in rolling_windows(range(10), 99, 4)]
    [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    """
    known = list(tokens)
    for start in range(0, len(known), max_length):
        end = min(start + max_length, len(known))
        context = known[max(0, end - max_length - 1) : start] if start else [first_token]
        yield Pair(context, known[start:end])


def padded_length(length: int, longest: int | None) -> int:
    """Return the next power of two, so that a backend that compiles sees few lengths; at most `longest`."""
    padded = max(_SHORTEST, 1 << (length - 1).bit_length())
    return padded if longest is None else min(padded, longest)


def _inputs(pair: Pair, max_length: int) -> tuple[int, ...]:
    """Return what the model reads: all tokens but the last, and no more than `max_length`."""
    if not len(pair.context) or len(pair.continuation) > max_length:
        raise DataError(
            f"cannot score {len(pair.continuation)} tokens after {len(pair.context)}; expected at most {max_length} "
            "(max_length) after at least one. Use a larger max_length, or shorter texts."
        )
    sequence = [*pair.context, *pair.continuation]
    return tuple(sequence[-max_length - 1 :][:-1])


def _padded(model: Model, rows: Sequence[Sequence[int]], width: int) -> Integers:
    """Return rows of ids padded to [B, width], B a power of two."""
    tokens = np.zeros((1 << (len(rows) - 1).bit_length(), width), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    return checked_tokens(model.spec, tokens, "text")
