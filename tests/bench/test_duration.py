"""How long a benchmark takes: known before it starts, and corrected as it goes."""

from collections.abc import Mapping
from types import SimpleNamespace

import pytest

from moezoo.bench import duration, modes
from moezoo.bench.case import Case
from moezoo.bench.configs import smoke_config
from moezoo.bench.contenders import OWN, Entry
from moezoo.bench.duration import Duration, unit_seconds
from moezoo.bench.measure import Effort
from moezoo.bench.modes import bench, planned
from moezoo.core.progress import Progress
from tests.bench.fakes import fake

EFFORT = Effort(slices=5, slice_seconds=2.0)


def test_every_warm_up_slice_and_start_is_planned() -> None:
    parts = planned(["train", "decode", "startup"], {"mine": smoke_config()}, OWN, EFFORT)
    contenders = {"train": 3, "decode": 3, "startup": 2}  # the limit is one, but for startup
    cases = {"train": 1, "decode": 4, "startup": 1}
    for mode, name, _, seconds in parts:
        turns = contenders[mode] * cases[mode]
        assert (name, len(seconds)) == ("mine", turns * (2 * 3 if mode == "startup" else 1 + 5))
        assert mode == "startup" or list(seconds[turns:]) == [2.0] * (5 * turns)


def test_progress_counts_all_modes_as_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    def turns(
        cases: list[Case], entries: Mapping[str, Entry], effort: Effort, on_progress: Progress, *_: object
    ) -> None:
        total = len(unit_seconds("train", cases, entries, effort))
        for done in range(total):
            on_progress("slice", done, total)
        on_progress("repeated slice", total, total + 3)

    monkeypatch.setattr(modes, "take_turns", turns)
    seen: list[tuple[str, int, int | None]] = []
    words, entries = ["train", "layer"], {"jax": fake("quick")}
    bench(words, {}, entries, {}, Effort(), lambda *report: seen.append(report), smoke=True)
    parts = planned(words, {}, entries, Effort(), smoke=True)
    first, second = (len(part.seconds) for part in parts)
    assert [done for _, done, _ in seen] == [*range(first + 1), *range(first, first + second + 1)]
    assert {total for what, _, total in seen if "repeated" not in what} == {first + second}
    assert {total for what, _, total in seen if "repeated" in what} == {first + second + 3}


def test_time_left_follows_the_pace_of_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(duration, "time", SimpleNamespace(monotonic=lambda: now.s))
    clock = Duration([10.0, 10.0, 1.0, 1.0])
    assert (clock.expected, clock.left(0)) == (22.0, 22.0)
    now.s += 5
    assert clock.left(1) == 6.0
    now.s += 5
    assert clock.left(2) == 1.0
    assert clock.left(4) == 0.0
