"""The simulated expert cache: small sequences by hand, and Belady's policy against an exhaustive search."""

from itertools import combinations

import numpy as np
import pytest

from moezoo.core.analysis.expert_cache import POLICIES, ExpertSizes, simulate_cache, sizes_of
from moezoo.core.errors import DataError
from moezoo.core.traces.trace import TraceInfo, TraceRows, trace_of
from tests.support.traces import synthetic_trace


def trace_with(expert, num_experts):
    expert = np.array(expert)
    info = TraceInfo(layers=tuple(range(expert.shape[1])), num_experts=(num_experts,) * expert.shape[1])
    return trace_of(info, TraceRows(expert))


def hits(expert, num_experts, capacity, **options):
    """The hits of each policy, with experts of 1 byte."""
    trace = trace_with(expert, num_experts)
    sizes = ExpertSizes((1,) * trace.num_layers, trace.info.num_experts)
    return {name: simulate_cache(trace, sizes, capacity, name, **options).hits for name in POLICIES}


def most_hits(steps, capacity):
    """The most hits of any policy that may keep any of the cached and the loaded experts: all of them are tried."""
    states = {frozenset(): 0}
    for items in map(frozenset, steps):
        later = {}
        for kept, found in states.items():
            pool = sorted(kept | items)
            for size in range(min(capacity, len(pool)) + 1):
                for choice in map(frozenset, combinations(pool, size)):
                    later[choice] = max(later.get(choice, 0), found + len(kept & items))
        states = later
    return max(states.values())


@pytest.mark.parametrize("is_shared", [False, True])
def test_belady_has_the_most_hits_of_all_policies(is_shared):
    generator = np.random.default_rng(0)
    for _ in range(60):
        tokens, layers, experts = (int(generator.integers(low, high)) for low, high in ((3, 9), (1, 3), (2, 5)))
        top_k = int(generator.integers(1, min(3, experts) + 1))
        shape = (tokens, layers, experts)
        expert = np.argsort(generator.random(shape) ** 2 * np.arange(1, experts + 1), axis=-1)[..., :top_k]
        capacity = int(generator.integers(0, experts + 1)) * (1 if is_shared else layers)
        if is_shared:
            steps = (expert + experts * np.arange(layers)[:, None]).reshape(-1, top_k)
            best = most_hits(steps.tolist(), capacity)
        else:
            best = sum(most_hits(expert[:, layer].tolist(), capacity // layers) for layer in range(layers))
        found = hits(expert, experts, capacity, is_shared=is_shared)
        assert found["best"] == best
        assert max(found.values()) == best


def test_belady_is_not_beaten_on_long_sequences_at_any_size():
    trace = synthetic_trace(num_tokens=600, num_experts=12, top_k=3)
    sizes = ExpertSizes((5,) * 3, (12,) * 3)
    for is_shared in (False, True):
        rates = []
        for experts in (0, 3, 9, 18, 30, 36):
            found = {name: simulate_cache(trace, sizes, 5 * experts, name, is_shared=is_shared) for name in POLICIES}
            assert max(each.hits for each in found.values()) == found["best"].hits
            rates.append([each.hit_rate for each in found.values()])
        assert (np.diff(np.array(rates), axis=0) >= 0).all()
        assert rates[0] == [0] * 4
        np.testing.assert_allclose(rates[-1], 1 - 36 / (600 * 9))  # only the first use of each is a miss


def test_policies_by_hand():
    sequence = [0, 1, 0, 2, 0, 1]
    # lru and lfu replace 1 by 2, which was used as often and later; static and best keep 0 and 1
    assert hits([[[expert]] for expert in sequence], 3, 2) == {"lru": 2, "lfu": 2, "static": 3, "best": 3}
    # now 1 was used more often than 2 before
    assert hits([[[expert]] for expert in [1, *sequence]], 3, 2) == {"lru": 3, "lfu": 4, "static": 4, "best": 4}


def test_bytes_and_rates():
    trace = trace_with([[[0, 1]], [[0, 2]], [[-1, -1]], [[3, 0]]], 4)
    result = simulate_cache(trace, ExpertSizes((100,), (3,)), 199, "lru")  # expert 3 has no weights
    assert (result.capacity, result.accesses, result.hits, result.loaded_bytes) == (1, 5, 2, 300)
    assert result.bytes_per_token == 75
    assert result.tokens_per_second(7500) == 100
    assert simulate_cache(trace, ExpertSizes((100,), (3,)), 300, "best").capacity == 3


def test_layers_with_experts_of_unequal_sizes():
    trace = synthetic_trace(layers=(0, 1))
    sizes = ExpertSizes((10, 30), (8, 8))
    assert simulate_cache(trace, sizes, 160, "lru").capacity == 8
    with pytest.raises(DataError, match="experts of 10 to 30 bytes cannot share a cache"):
        simulate_cache(trace, sizes, 160, "lru", is_shared=True)


def test_sizes_of_the_experts_of_a_model():
    parameters = {f"layers.1.moe.experts.w_{name}": 80 for name in ("gate", "up", "down")} | {"layers.1.norm": 9}
    assert sizes_of(parameters, (1,), {1: 4}) == ExpertSizes((60,), (4,))
    with pytest.raises(DataError, match="no routed experts in layer 2"):
        sizes_of(parameters, (1, 2), {1: 4})
