"""Assertion for layers with a cache: padded rows, processed in pieces, equal each row processed alone."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.support.tolerances import FLOAT32, assert_close
from tests.support.twins import Twin


def assert_pieces_match(
    twin: Twin,
    layer: Any,
    cache: Any,
    reference: Callable[..., Any],
    pieces: Sequence[int],
    first: Sequence[int] | None,
    x_BTD: np.ndarray,
    **others: np.ndarray,
) -> Any:
    """Assert that `layer` on pieces of x_BTD equals `reference` on each row's own tokens, from slot `first` on.

    Earlier slots are padding: large numbers, which must not change the result. `others`: further inputs [B, T, ...],
    split in the same way. Returns the last cache.
    """
    starts = [0] * len(x_BTD) if first is None else list(first)
    expected = [
        reference(x_BTD[row : row + 1, start:], **{name: each[row : row + 1, start:] for name, each in others.items()})
        for row, start in enumerate(starts)
    ]
    x_BTD = np.array(x_BTD)
    for row, start in enumerate(starts):
        x_BTD[row, :start] = 1e3
    layer = twin.compiled(layer)
    first_B, found, position = None if first is None else twin.array(first), [], 0
    for length in pieces:
        piece = slice(position, position + length)
        inputs = {name: twin.array(each[:, piece]) for name, each in others.items()}
        attended = layer(twin.array(x_BTD[:, piece]), cache, first_B=first_B, **inputs)
        cache, position = attended.cache, position + length
        found.append(twin.numpy(attended.out_BTD))
        assert int(cache.length) == position
    for row, start in enumerate(starts):
        own = np.concatenate(found, axis=1)[row : row + 1, start:]
        assert_close(own, expected[row], FLOAT32, f"row {row}")
    return cache
