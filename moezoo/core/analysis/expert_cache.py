"""Simulation of a cache of expert weights: a model decodes one token at a time, and loads experts that are not cached.

A step is a token in an MoE layer, which needs its chosen experts at once: those that are cached when the step begins
are hits, the others are loaded. Afterwards the policy keeps some of the cached and the loaded experts, up to the
capacity. All caches begin empty. Formulas and sources: writings/measures.md.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from moezoo.core.analysis.chosen import is_chosen, most_experts, spans
from moezoo.core.errors import DataError
from moezoo.core.progress import Progress
from moezoo.core.traces.trace import RoutingTrace

PolicyName = Literal["lru", "lfu", "static", "best"]
POLICIES: Mapping[PolicyName, str] = {
    "lru": "keeps the experts used most recently",
    "lfu": "keeps the experts used most often so far",
    "static": "keeps the experts that this trace uses most, known beforehand",
    "best": "keeps the experts needed soonest, known beforehand (Belady); no policy has more hits",
}

_NEVER = 1 << 62
_ITEM_BITS = 24
_ITEM_MASK = (1 << _ITEM_BITS) - 1
_TIME_BITS = 44

Steps = Sequence[Sequence[int]]


@dataclass(frozen=True)
class ExpertSizes:
    """Sizes of the experts of each MoE layer.

    Fields:
        expert_bytes: bytes of one expert, by MoE layer.
        num_experts: experts with weights, by MoE layer; those with higher ids (zero-computation experts) need none.
    """

    expert_bytes: tuple[int, ...]
    num_experts: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all experts of all layers."""
        return sum(size * number for size, number in zip(self.expert_bytes, self.num_experts, strict=True))


@dataclass(frozen=True)
class CacheResult:
    """Result of a policy at a cache size.

    Fields:
        policy: name of the policy.
        cache_bytes: size of the cache.
        capacity: experts that it holds, of all layers together.
        is_shared: one cache for all layers; else each has an equal part.
        tokens: tokens decoded.
        accesses, hits: chosen experts, and those that were cached.
        loaded_bytes: bytes of those that were not.
    """

    policy: PolicyName
    cache_bytes: int
    capacity: int
    is_shared: bool
    tokens: int
    accesses: int
    hits: int
    loaded_bytes: int

    @property
    def hit_rate(self) -> float:
        """Share of the chosen experts that were cached."""
        return self.hits / self.accesses if self.accesses else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes to load for a token."""
        return self.loaded_bytes / self.tokens

    def tokens_per_second(self, bandwidth: float) -> float:
        """Return the decoding rate that a bandwidth in bytes per second allows, if nothing else took time."""
        return bandwidth / self.bytes_per_token if self.loaded_bytes else float("inf")


def sizes_of(parameter_bytes: Mapping[str, int], layers: Sequence[int], num_experts: Mapping[int, int]) -> ExpertSizes:
    """Return the sizes of the experts of MoE layers, from the bytes of each parameter and the experts with weights."""
    sizes, numbers = [], []
    for layer in layers:
        prefix = f"layers.{layer}.moe.experts."
        total = sum(size for name, size in parameter_bytes.items() if name.startswith(prefix))
        number = num_experts.get(layer, 0)
        if total == 0 or number == 0:
            raise DataError(
                f"the model has no routed experts in layer {layer}, which the trace has; expected the model that the "
                "trace was recorded of. Name it with --model, or give --expert-bytes."
            )
        sizes.append(total // number)
        numbers.append(number)
    return ExpertSizes(tuple(sizes), tuple(numbers))


def simulate_cache(
    trace: RoutingTrace,
    sizes: ExpertSizes,
    cache_bytes: int,
    policy: PolicyName,
    *,
    is_shared: bool = False,
    on_progress: Progress | None = None,
) -> CacheResult:
    """Simulate a cache over the tokens of a trace, in order.

    Args:
        trace: its tokens are decoded one after the other.
        sizes: of the experts.
        cache_bytes: size of the cache. Unless it is shared, each layer has a part proportional to its experts' bytes.
        policy: see POLICIES. Also experts that were just used may be left out of the cache: a step loads them into
            working memory besides it.
        is_shared: one cache for the experts of all layers, which must have the same size.
        on_progress: called with the policy and the number of tokens done.

    Raises DataError: a shared cache for experts of unequal sizes.

    Source: Belady 1966, "A study of replacement algorithms for a virtual-storage computer". Keeping an expert from one
    use to the next is an interval, the cache holds at most C at a time, and dropping the interval that ends last keeps
    the most of them: Carlisle and Lloyd 1995, "On the k-coloring of intervals".
    """
    if is_shared and len(set(sizes.expert_bytes)) > 1:
        raise DataError(
            f"experts of {min(sizes.expert_bytes)} to {max(sizes.expert_bytes)} bytes cannot share a cache; expected "
            "one size. Leave out --shared."
        )
    capacities = _capacities(sizes, cache_bytes, is_shared)
    accesses_L, hits_L = np.zeros(trace.num_layers, np.int64), np.zeros(trace.num_layers, np.int64)
    if policy == "static":
        accesses_L, hits_L = _static(trace, sizes, capacities, is_shared, on_progress)
    else:
        kinds: dict[str, Callable[[int], _Policy]] = {"lru": _Lru, "lfu": _Lfu, "best": _Best}
        caches = [kinds[policy](capacity) for capacity in capacities]
        for items_NLK, next_NLK in _accesses(trace, sizes, policy, on_progress):
            accesses_L += (items_NLK >= 0).sum(axis=(0, 2))
            for place in range(trace.num_layers):
                if not is_shared:
                    hits_L[place] += caches[place].run(*_steps(items_NLK[:, place], next_NLK[:, place]))
            if is_shared:  # only the sum matters: experts have one size
                steps = _steps(items_NLK.reshape(-1, trace.top_k), next_NLK.reshape(-1, trace.top_k))
                hits_L[0] += caches[0].run(*steps)
    return CacheResult(
        policy=policy,
        cache_bytes=cache_bytes,
        capacity=sum(capacities),
        is_shared=is_shared,
        tokens=trace.num_tokens,
        accesses=int(accesses_L.sum()),
        hits=int(hits_L.sum()),
        loaded_bytes=int(((accesses_L - hits_L) * np.array(sizes.expert_bytes)).sum()),
    )


def _capacities(sizes: ExpertSizes, cache_bytes: int, is_shared: bool) -> list[int]:
    """Return the number of experts that each layer's cache holds, or that of the shared one."""
    if is_shared:
        return [min(cache_bytes // sizes.expert_bytes[0], sum(sizes.num_experts))]
    total = sizes.total_bytes
    return [min(number, cache_bytes * number // total) for number in sizes.num_experts]


def _accesses(
    trace: RoutingTrace, sizes: ExpertSizes, policy: PolicyName, on_progress: Progress | None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield parts of the accesses in order: [N, L, K] items, -1 for none, and the step of each one's next use.

    An item is `layer * E + expert`, a step `token * L + layer`. Next uses are only computed for `best`: one pass from
    the end notes, for each part, the step of every item's first use after the part.
    """
    parts = list(spans(trace))
    upcoming = np.full(trace.num_layers * most_experts(trace), _NEVER)
    after = []
    if policy == "best":
        for first, last in reversed(parts):
            after.append(upcoming.copy())
            items, steps = _flat(_items(trace, sizes, first, last), first)
            upcoming[items[::-1]] = steps[::-1]  # the last assignment, the earliest use, stays
        after.reverse()
    for index, (first, last) in enumerate(parts):
        if on_progress is not None:
            on_progress(f"cache, {policy}", first, trace.num_tokens)
        items_NLK = _items(trace, sizes, first, last)
        next_NLK = np.zeros_like(items_NLK)
        if policy == "best":
            items, steps = _flat(items_NLK, first)
            order = np.argsort(items, kind="stable")
            ends = np.flatnonzero(np.diff(items[order], append=-1))
            following = np.append(steps[order][1:], 0)
            following[ends] = after[index][items[order][ends]]
            flat = np.empty_like(following)
            flat[order] = following
            next_NLK[items_NLK >= 0] = flat
        yield items_NLK, next_NLK


def _items(trace: RoutingTrace, sizes: ExpertSizes, first: int, last: int) -> NDArray[np.int64]:
    """Return the item of each access, [N, L, K]; -1 for an unused slot and an expert without weights."""
    expert_NLK = trace.column("expert", first, last).astype(np.int64)
    needed = (expert_NLK >= 0) & (expert_NLK < np.array(sizes.num_experts)[:, None])
    return np.where(needed, expert_NLK + np.arange(trace.num_layers)[:, None] * most_experts(trace), -1)


def _flat(items_NLK: NDArray[np.int64], first: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the items in order, and the step of each."""
    token, layer, _ = np.nonzero(items_NLK >= 0)
    return items_NLK[items_NLK >= 0], (first + token) * items_NLK.shape[1] + layer


def _steps(items_SK: NDArray[np.int64], next_SK: NDArray[np.int64]) -> tuple[Steps, Steps]:
    """Return the items of each step, and their next uses, as lists without unused slots."""
    used = items_SK >= 0
    if used.all():
        return items_SK.tolist(), next_SK.tolist()
    return [row[own].tolist() for row, own in zip(items_SK, used, strict=True)], [
        row[own].tolist() for row, own in zip(next_SK, used, strict=True)
    ]


def _static(
    trace: RoutingTrace,
    sizes: ExpertSizes,
    capacities: Sequence[int],
    is_shared: bool,
    on_progress: Progress | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return accesses and hits of each layer if the most used experts are kept; the first use of each is a miss."""
    counts_LE = np.zeros((trace.num_layers, most_experts(trace)), np.int64)
    for first, last in spans(trace, "cache, static", on_progress):
        counts_LE += is_chosen(trace, first, last).sum(axis=0)
    counts_LE[np.arange(counts_LE.shape[1]) >= np.array(sizes.num_experts)[:, None]] = 0
    hits_LE = np.maximum(counts_LE - 1, 0)
    rows = hits_LE.reshape(1, -1) if is_shared else hits_LE
    kept = [np.sort(row)[::-1][:capacity].sum() for row, capacity in zip(rows, capacities, strict=True)]
    hits_L = np.zeros(trace.num_layers, np.int64)
    hits_L[: len(kept)] = kept
    return counts_LE.sum(axis=1), hits_L


class _Policy(Protocol):
    """A cache of some capacity."""

    def __init__(self, capacity: int) -> None: ...

    def run(self, steps: Steps, next_uses: Steps) -> int:
        """Take the next steps: the items of each, and the steps of their next uses. Return the number of hits."""
        ...


class _Lru:
    """Least recently used is dropped; of one step, the expert with the lowest weight."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[int, None] = OrderedDict()

    def run(self, steps: Steps, next_uses: Steps) -> int:
        kept, capacity, hits = self._kept, self._capacity, 0
        for items in steps:
            for item in items:
                if item in kept:
                    hits += 1
            for item in reversed(items):
                kept[item] = None
                kept.move_to_end(item)
            while len(kept) > capacity:
                kept.popitem(last=False)
        return hits


class _Lfu:
    """Least often used so far is dropped; of equally many uses, the least recent."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._step = capacity, 0
        self._uses: dict[int, int] = {}
        self._kept: dict[int, int] = {}  # item: its key, (uses, step, item) as one number
        self._heap: list[int] = []  # of keys; those that are not in _kept any more are outdated

    def run(self, steps: Steps, next_uses: Steps) -> int:
        kept, heap, uses, hits = self._kept, self._heap, self._uses, 0
        for items in steps:
            self._step += 1
            for item in items:
                if item in kept:
                    hits += 1
                uses[item] = count = uses.get(item, 0) + 1
                kept[item] = key = (count << _TIME_BITS | self._step) << _ITEM_BITS | item
                heappush(heap, key)
            while len(kept) > self._capacity:
                key = heappop(heap)
                if kept.get(key & _ITEM_MASK) == key:
                    del kept[key & _ITEM_MASK]
            if len(heap) > 4 * len(kept) + 64:
                heap[:] = kept.values()
                heapify(heap)
        return hits


class _Best:
    """Belady's policy: the item whose next use is furthest away is dropped, even if it was just used."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: dict[int, int] = {}  # item: its key, (next use, item) as one negative number
        self._heap: list[int] = []

    def run(self, steps: Steps, next_uses: Steps) -> int:
        kept, heap, hits = self._kept, self._heap, 0
        for items, following in zip(steps, next_uses, strict=True):
            for item, use in zip(items, following, strict=True):
                if kept.pop(item, None) is not None:
                    hits += 1
                if use != _NEVER:
                    kept[item] = key = -(use << _ITEM_BITS | item)
                    heappush(heap, key)
            while len(kept) > self._capacity:
                key = heappop(heap)
                if kept.get(-key & _ITEM_MASK) == key:
                    del kept[-key & _ITEM_MASK]
            if len(heap) > 4 * len(kept) + 64:
                heap[:] = kept.values()
                heapify(heap)
        return hits
