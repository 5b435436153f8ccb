"""Sampling the next token from logits: the reference for the backends, which sample on the device.

Sampling has no state: the random number of sequence b at position t is a function of (seed, t, b), so a text can be
continued, repeated or checked from any token on.
"""

from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from moezoo.core.errors import DataError, SpecError
from moezoo.core.random import fold_in, key, uniform

Tokens = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]
Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling options; None turns a filter off. SpecError for a value out of range.

    | field | range | meaning |
    |---|---|---|
    | temperature | >= 0 | divides the logits; 0 is greedy, and then the filters and the seed have no effect |
    | top_k | >= 1 | keep the k most probable tokens |
    | top_p | (0, 1] | keep the fewest most probable tokens whose probabilities add up to p (nucleus) |
    | min_p | [0, 1] | keep the tokens at least min_p times as probable as the most probable one |
    | repetition_penalty | > 0 | see `penalized`; 1 is off |
    | seed | [0, 2**64) | seed of the random draws |
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        number, off = (int, float, np.integer, np.floating), "or null for off"
        temperature, top_k, top_p, min_p = self.temperature, self.top_k, self.top_p, self.min_p
        if not _is(number, temperature) or not 0 <= temperature < float("inf"):
            _refuse("temperature", temperature, "a finite number >= 0 (0 is greedy)")
        if top_k is not None and (not _is((int, np.integer), top_k) or top_k < 1):
            _refuse("top_k", top_k, f"an integer >= 1, {off}")
        if top_p is not None and (not _is(number, top_p) or not 0 < top_p <= 1):
            _refuse("top_p", top_p, f"a number in (0, 1], {off}")
        if min_p is not None and (not _is(number, min_p) or not 0 <= min_p <= 1):
            _refuse("min_p", min_p, f"a number in [0, 1], {off}")
        penalty = self.repetition_penalty
        if not _is(number, penalty) or not 0 < penalty < float("inf"):
            _refuse("repetition_penalty", penalty, "a finite number > 0 (1 is off)")
        key(self.seed)


def sample(logits_BV: Logits, options: SamplingOptions, position: int | Tokens) -> Tokens:
    """Sample the next token of each sequence: int32 [B].

    `logits_BV` is float32 [B, V]; -inf forbids a token. `position` is the position in the sequence that the token will
    have, in [0, 2**32): one for all sequences or, int [B], one for each.

    Greedy (temperature 0): the highest logit, ties to the lower id. Otherwise sequence b draws one uniform number u_b
    from the key fold_in(key(seed), position, b), and takes the first token, in the order of ids, at which the
    cumulative sum of `probabilities` exceeds u_b. Unlike the order of probabilities, the order of ids keeps the choice
    when two nearly equal logits swap places between backends.

    Raises DataError for logits that hold NaN or +inf, or forbid every token.

    Differs: u_b is a multiple of 2**-23, as `jax.random.uniform` draws it, so tokens less probable than 1e-7
    are drawn unevenly.
    """
    if options.temperature == 0:
        greedy_B: Tokens = np.argmax(checked_logits(logits_BV), axis=-1).astype(np.int32)  # the lowest of equals
        return greedy_B
    cumulative_BV = np.cumsum(probabilities(logits_BV, options), axis=-1)
    position_B = np.broadcast_to(position, len(cumulative_BV))
    keys = np.stack([fold_in(key(options.seed), int(each), row) for row, each in enumerate(position_B)])
    target_B = uniform(keys, ()).astype(np.float64) * cumulative_BV[:, -1]
    chosen_B: Tokens = np.sum(cumulative_BV <= target_B[:, None], axis=-1).astype(np.int32)
    return chosen_B


def probabilities(logits_BV: Logits, options: SamplingOptions) -> Probabilities:
    """Return the probabilities that `sample` draws from: float64 [B, V], rows sum to 1, filtered tokens exactly 0.

    softmax(logits / temperature) in float64, then the filters top-k, top-p and min-p in this order, each on the
    renormalized result of the one before. Between equally probable tokens, top-k and top-p keep the lower ids; min-p
    keeps or drops them together. With temperature 0 the greedy token has probability 1.

    Source: top-p, Holtzman et al. 2020, arXiv 1904.09751, eq. 2; min-p, Nguyen et al. 2024, arXiv 2407.01082.
    """
    logits = checked_logits(logits_BV)
    if options.temperature == 0:
        greedy = np.zeros_like(logits)
        greedy[np.arange(len(logits)), np.argmax(logits, axis=-1)] = 1
        return greedy
    with np.errstate(over="ignore"):  # a tiny temperature may yield -inf, a probability of 0
        p_BV: Probabilities = np.exp((logits - logits.max(axis=-1, keepdims=True)) / options.temperature)
    p_BV /= p_BV.sum(axis=-1, keepdims=True)
    if options.top_k is not None or options.top_p is not None:
        order_BV = np.argsort(-logits, axis=-1, kind="stable")  # most probable first, ties to the lower id
        ranked_BV = np.take_along_axis(p_BV, order_BV, axis=-1)
        if options.top_k is not None:
            ranked_BV[:, options.top_k :] = 0
        if options.top_p is not None and options.top_p < 1:
            ranked_BV /= ranked_BV.sum(axis=-1, keepdims=True)
            enough_BV = np.cumsum(ranked_BV, axis=-1) >= options.top_p
            ranked_BV[:, 1:][enough_BV[:, :-1]] = 0  # the token that reaches top_p stays
        np.put_along_axis(p_BV, order_BV, ranked_BV, axis=-1)
    if options.min_p is not None:
        p_BV[p_BV < options.min_p * p_BV.max(axis=-1, keepdims=True)] = 0
    p_BV /= p_BV.sum(axis=-1, keepdims=True)
    return p_BV


def penalized(logits_BV: Logits, tokens_BT: Tokens, penalty: float) -> Logits:
    """Apply the repetition penalty to the logits of tokens that the sequence already has, prompt included.

    Positive logits are divided by the penalty, others multiplied by it; logits of other tokens are unchanged. `sample`
    expects penalized logits.

    Source: Keskar et al. 2019, arXiv 1909.05858, section 4.1.
    Differs: the paper divides every logit, which makes negative ones more likely; this is the form in transformers.
    """
    if penalty == 1:
        return logits_BV
    logits_BT = np.take_along_axis(logits_BV, tokens_BT, axis=-1)
    changed_BV, factor = np.array(logits_BV), np.float32(penalty)
    np.put_along_axis(changed_BV, tokens_BT, np.where(logits_BT > 0, logits_BT / factor, logits_BT * factor), axis=-1)
    return changed_BV


def checked_logits(logits_BV: Logits) -> npt.NDArray[np.float64]:
    """Return logits as float64. Raises DataError for logits from which no token can be sampled."""
    logits = np.asarray(logits_BV, np.float64)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise DataError(f"logits have shape {list(logits.shape)}; expected [sequences, vocabulary], [B, V].")
    bad_BV = np.isnan(logits) | (logits == np.inf)
    if bad_BV.any():
        row, token = (int(index) for index in np.argwhere(bad_BV)[0])
        raise DataError(
            f"the logits of sequence {row} hold {logits[row, token]} at token {token}; expected finite numbers, or "
            "-inf for a forbidden token. Look for weights that are not finite."
        )
    all_forbidden_B = (logits == -np.inf).all(axis=-1)
    if all_forbidden_B.any():
        row = int(np.argmax(all_forbidden_B))
        raise DataError(f"the logits of sequence {row} forbid every token; expected one that is not -inf.")
    return logits


def raise_unsampled(logits_BV: Logits) -> NoReturn:
    """Raise DataError: no token could be sampled from these logits, or not with the penalty that they had."""
    checked_logits(logits_BV)
    raise DataError("the repetition penalty makes logits infinite; expected finite ones. Use a penalty nearer to 1.")


def _is(types: tuple[type, ...], value: object) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _refuse(field: str, value: object, rule: str) -> NoReturn:
    raise SpecError(f"sampling.{field} is {value!r}; expected {rule}.")
