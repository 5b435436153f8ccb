"""A router over attention heads: what it chooses, and where it puts it. Gradients: the parity of its tiny config."""

import numpy as np

from moezoo.core.reference.head_router import choose_heads, place_heads
from moezoo.core.reference.routing import Routing
from tests.support.tolerances import FLOAT32, FLOAT64, assert_close
from tests.support.twins import B, G, H, M, T, Twin, normal


def test_a_head_is_placed_where_it_was_chosen_and_weighted(twin: Twin):
    """All four heads of a group, in another order for each token, are the heads themselves times their weights."""
    order_PK = np.argsort(normal(1, B * T, G), axis=-1)
    weight_PK, x = normal(2, B * T, G), normal(3, B, T, M, G, H)
    module, routing = twin.module("head_router"), twin.module("routing").Routing

    def both(choose, place, make, array):
        given = make._make(
            [array(order_PK), None, array(weight_PK), array(weight_PK), *[None] * (len(make._fields) - 4)]
        )
        return choose(array(x), given), place(choose(array(x), given), given)

    expected = both(choose_heads, place_heads, Routing, np.asarray)
    token = np.arange(B * T)[:, None]
    own = x.reshape(B * T, M, G, H)[token, :, order_PK].swapaxes(1, 2)
    by_head_PG = np.empty_like(weight_PK)
    by_head_PG[token, order_PK] = weight_PK
    assert_close(expected[0], own.reshape(x.shape), FLOAT64)
    assert_close(expected[1], by_head_PG.reshape(B, T, 1, G, 1) * x, FLOAT64)
    for mine, theirs in zip(expected, both(module.choose_heads, module.place_heads, routing, twin.array), strict=True):
        assert_close(twin.numpy(theirs), mine, FLOAT32)
