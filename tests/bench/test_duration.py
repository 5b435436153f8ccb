"""How long a benchmark takes: known before it starts, and corrected as it goes."""

from types import SimpleNamespace

import pytest

from moezoo.bench import duration
from moezoo.bench.configs import smoke_config
from moezoo.bench.contenders import OWN
from moezoo.bench.duration import Duration
from moezoo.bench.measure import Effort
from moezoo.bench.modes import bench, planned
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
    monkeypatch.setattr("moezoo.bench.modes.LIMIT", fake("quick"))
    seen: list[tuple[str, int, int | None]] = []
    modes, entries = ["layer", "startup"], {"jax": fake("quick")}
    bench(modes, {}, entries, {}, Effort(), lambda *report: seen.append(report), smoke=True)
    total = sum(len(part.seconds) for part in planned(modes, {}, entries, Effort(), smoke=True))
    assert {report[2] for report in seen} == {total}
    done = [report[1] for report in seen]
    assert (done, done[-1]) == (sorted(done), total - 1)


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
