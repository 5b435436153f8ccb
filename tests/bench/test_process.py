"""Contenders in their processes: interleaved slices, one-line errors, and no leftover processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moezoo.bench.case import Case
from moezoo.bench.configs import smoke_config
from moezoo.bench.contenders import Entry
from moezoo.bench.foreign_load import foreign_load
from moezoo.bench.machine import cores
from moezoo.bench.measure import Effort, Timings, take_turns, time_starts
from moezoo.bench.process import Process
from moezoo.core.errors import BenchError
from tests.bench.fakes import CASE, fake

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FORWARD = Case("forward", "forward", smoke_config())


def running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(status) and not status.startswith("Z")


def has_ended(pid: int, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not running(pid)


def test_output_of_a_contender_does_not_mix_with_its_answers():
    with Process("fake", fake("quick", environment={"MOEZOO_FAKE": "set", "PATH": None})) as process:
        assert process.ask("facts") == {"seconds": "0.5", "argument": "set"}
        assert process.ask("prepare", case=CASE.to_json(), slice_seconds=0.0)["repeats"] == 1
        assert process.ask("slice", label="train")["seconds"] == 0.5
        assert process.ask("memory")["bytes"] > 2**20


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("dying", ("exited with status 9 during request prepare", "first | second | the memory is full")),
        ("refusing", ("failed at request prepare: DataError: the model is too large; expected a smaller one.",)),
    ],
)
def test_failed_contender_error_is_one_line(name, pieces):
    with Process(name, fake(name)) as process, pytest.raises(BenchError) as error:
        process.ask("prepare", case=CASE.to_json(), slice_seconds=0.0)
    assert len(str(error.value).splitlines()) == 1
    for piece in (f"contender {name} ", *pieces):
        assert piece in str(error.value)


def test_import_error_of_a_contender_names_the_module():
    with Process("none", Entry("tests.bench.nowhere:make")) as process, pytest.raises(BenchError) as error:
        process.ask("facts")
    assert str(error.value).endswith("ModuleNotFoundError: No module named 'tests.bench.nowhere'")


def test_contenders_take_turns_and_a_crash_does_not_stop_the_others():
    seen = []
    entries = {name: fake(name) for name in ("quick", "dying", "slow")}
    timings = Timings()
    take_turns([CASE, FORWARD], entries, Effort(slices=2, slice_seconds=0.0), lambda *row: seen.append(row), timings)
    assert list(timings.failed) == ["dying"]
    assert timings.slices["slow", "train"] == [2.0, 2.0]
    assert timings.seconds("quick", "forward") == 0.5
    assert timings.seconds("dying", "train") is None
    assert timings.peak_memory.keys() == {"quick", "slow"}
    turns = [what.split(", ")[1].split(": ") for what, _, _ in seen if what.startswith("slice")]
    assert turns == 2 * [["train", "quick"], ["train", "slow"], ["forward", "quick"], ["forward", "slow"]]
    assert {total for _, _, total in seen} == {3 * 2 * 3}


def test_contender_runs_only_its_kinds_of_cases_and_a_case_can_be_repeated():
    entries, timings = {"quick": fake("quick"), "slow": fake("slow", kinds=("forward",))}, Timings()
    take_turns([CASE, FORWARD], entries, Effort(1, 0.0), lambda *_: None, timings, lambda found: [FORWARD])
    lengths = {key: len(slices) for key, slices in timings.slices.items()}
    assert lengths == {("quick", "train"): 1, ("quick", "forward"): 2, ("slow", "forward"): 2}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_load_of_other_processes_is_measured_and_that_of_contenders_is_not():
    shares: dict[str, list[float]] = {"own": [], "foreign": [], "short": []}
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        for name, pids, seconds in (("own", [busy.pid], 0.5), ("foreign", [], 0.5), ("short", [], 0.0)):
            with foreign_load(pids, shares[name]):
                time.sleep(seconds)
        busy.kill()
    (own,), (foreign,) = shares["own"], shares["foreign"]
    assert foreign - own > 0.5 / cores()
    assert shares["short"] == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_contender_leads_its_own_scheduling_group():
    with Process("fake", fake("quick")) as process:
        assert os.getsid(process.pid) == process.pid
        group = Path(f"/proc/{process.pid}/autogroup")
        nice = group.read_text().split()[-1] if group.is_file() else "none"
        assert process.scheduling in (
            f"own group, nice {nice}",
            "own group",
            "shared with all processes",
            "the system's",
        )
        assert (nice == "-9") == (process.scheduling == "own group, nice -9")


def test_startup_is_timed_with_cold_and_warm_caches():
    seen = []
    entries = {"quick": fake("quick"), "refusing": fake("refusing")}
    timings = Timings()
    time_starts(CASE, entries, Effort(2, 0.0), lambda *row: seen.append(row), timings)
    assert [what.split(", ")[1].split(":")[0] for what, _, _ in seen if "quick" in what] == 2 * ["cold", "warm"]
    assert len(timings.slices["quick", "cold"]) == len(timings.slices["quick", "warm"]) == 2
    assert list(timings.failed) == ["refusing"]


BENCHMARK = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
from moezoo.bench.measure import Effort, Timings, take_turns
from moezoo.bench.process import Process
from tests.bench.fakes import CASE, fake

start = Process.__init__
def start_and_print(self, *arguments):
    start(self, *arguments)
    print(self._process.pid, flush=True)
Process.__init__ = start_and_print
take_turns([CASE], {"quick": fake("quick"), "sleeping": fake("sleeping")}, Effort(1, 0.0), lambda *_: None, Timings())
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_benchmark_leaves_no_process(stop):
    """Ctrl-C is sent to all processes of a terminal, other signals only to the parent."""
    parent = subprocess.Popen(
        [sys.executable, "-c", BENCHMARK],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert parent.stdout is not None
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    assert all(running(pid) for pid in workers)
    if stop == signal.SIGINT:
        os.killpg(parent.pid, stop)
    else:
        parent.send_signal(stop)
    parent.wait(20)
    assert all(has_ended(pid) for pid in workers)
    parent.stdout.close()
