"""N-gram embeddings as data, with the numbers of their hash functions."""

import math
from functools import cache
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from moezoo.core.spec.base import Part, impossible

_LARGEST_TABLE = 2**31 - 1
_MOST_HEADS = 4096
_WORD = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


class NGramEmbeddingsSpec(Part):
    """Embeddings of the last n tokens together, for n = 2 to `largest`, added to the residual stream before a layer.

    They are looked up by hash: each n has `heads` hash functions, each with a table of its own, whose number of rows is
    a prime, at least `table_size`; `dim` features come from all tables together. Keys and a value are projected from
    them; the value is multiplied by the sigmoid of the signed root of `key . x / sqrt(D)`, x being the residual stream,
    key and x normalized by the model's norm; and a depthwise causal convolution of the normalized result over
    `conv_width` tokens, each `largest` apart, is added behind a silu. `reset_token` ends contexts: an n-gram has it in
    place of the tokens before it, and of those before the first. `index` numbers the n-gram embeddings of a model, from
    0: they share no prime and no hash function; `seed`: of the functions. The rows of all heads are padded to a
    `multiple`, and stored in `parts` of equal size. Source: Cheng et al. 2026, arXiv 2601.07372 (Engram), in the form
    of Qwen4 (transformers, `qwen4_exp_text`).
    """

    largest: Annotated[int, Field(ge=2)] = 3
    heads: PositiveInt = 8
    dim: PositiveInt
    table_size: Annotated[int, Field(ge=2, le=2**30)]
    conv_width: Annotated[int, Field(ge=2)] = 4
    reset_token: NonNegativeInt = 0
    index: NonNegativeInt = 0
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 1234
    multiple: PositiveInt = 1
    parts: PositiveInt = 1

    @property
    def num_heads(self) -> int:
        """Number of hash functions of all n."""
        return (self.largest - 1) * self.heads

    @property
    def head_dim(self) -> int:
        """Features of a row."""
        return self.dim // self.num_heads

    @property
    def reach(self) -> int:
        """Number of inputs before a token that its convolution sees."""
        return (self.conv_width - 1) * self.largest

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of rows of each head's table: the next primes after those of the n-gram embeddings before."""
        return _primes(self.table_size, self.index * self.num_heads, self.num_heads)

    @property
    def rows(self) -> int:
        """Number of rows of all tables together, with padding."""
        return math.ceil(sum(self.sizes) / self.multiple) * self.multiple

    def multipliers(self, vocab: int) -> tuple[int, ...]:
        """Return the odd factor of the token at each place, itself first; with tokens below `vocab`, below 2**63.

        They are numbers of splitmix64 (Steele et al. 2014, OOPSLA) below `2**63 / vocab`.
        """
        half = max(1, (2**63 - 1) // vocab // 2)
        start = self.seed + 10007 * self.index
        return tuple(2 * (_mixed(start + _GAMMA * (place + 1)) % half) + 1 for place in range(self.largest))

    @model_validator(mode="after")
    def _sizes(self) -> "NGramEmbeddingsSpec":
        if (self.index + 1) * self.num_heads > _MOST_HEADS:
            raise impossible(
                "heads",
                f"is {self.heads}, {self.num_heads} of n = 2 to {self.largest}, at index {self.index}",
                f"Use at most {_MOST_HEADS} in all",
            )
        if self.dim % self.num_heads:
            raise impossible(
                "dim",
                f"is {self.dim}, which is not divisible by the {self.num_heads} heads of n = 2 to {self.largest}",
                f"Use a multiple of {self.num_heads}",
            )
        if self.rows > _LARGEST_TABLE:
            raise impossible(
                "table_size", f"is {self.table_size}, which makes {self.rows} rows", f"Use at most {_LARGEST_TABLE}"
            )
        if self.rows % self.parts:
            raise impossible(
                "parts",
                f"is {self.parts}, which does not divide the {self.rows} rows",
                f"Use multiple: {self.parts}, or other parts",
            )
        return self


def _mixed(value: int) -> int:
    """Return the number of splitmix64 after the state `value`."""
    value = (value + _GAMMA) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


@cache
def _primes(least: int, skipped: int, number: int) -> tuple[int, ...]:
    """Return `number` primes from `least` on, after the first ones, which are `skipped`."""
    found: list[int] = []
    value = least
    while len(found) < skipped + number:
        if _is_prime(value):
            found.append(value)
        value += 1
    return tuple(found[skipped:])


def _is_prime(value: int) -> bool:
    """Test by strong pseudoprimes to bases that decide below 3,215,031,751. Source: Jaeschke 1993, Math. Comp. 61."""
    if value in (2, 3, 5, 7) or value < 2 or any(value % base == 0 for base in (2, 3, 5, 7)):
        return value in (2, 3, 5, 7)
    twos = ((value - 1) & -(value - 1)).bit_length() - 1
    for base in (2, 3, 5, 7):
        power = pow(base, (value - 1) >> twos, value)
        if power != 1 and all(pow(power, 1 << place, value) != value - 1 for place in range(twos)):
            return False
    return True
