"""Contenders in their processes: turns, deaths in one line, and nobody left behind."""

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
from moezoo.bench.measure import Effort, take_turns, time_starts
from moezoo.bench.process import Process
from moezoo.core.errors import BenchError
from tests.bench.fakes import CASE, fake

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FORWARD = Case("forward", "forward", smoke_config())


def running(pid: int) -> bool:
    """Whether a process is there and not only waiting to be counted."""
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(status) and not status.startswith("Z")


def gone(pid: int, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not running(pid)


def test_what_a_contender_prints_does_not_disturb_its_answers():
    with Process("fake", fake("quick", environment={"MOEZOO_FAKE": "set", "PATH": None})) as process:
        assert process.ask("facts") == {"seconds": "0.5", "argument": "set"}
        assert process.ask("prepare", case=CASE.to_json(), slice_seconds=0.0)["repeats"] == 1
        assert process.ask("slice", label="train")["seconds"] == 0.5
        assert process.ask("memory")["bytes"] > 2**20


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("dying", ("ended with status 9 while asked to prepare", "first | second | the memory is full")),
        ("refusing", ("cannot prepare: DataError: the model is too large; expected a smaller one.",)),
    ],
)
def test_a_contender_that_fails_is_one_line(name, pieces):
    with Process(name, fake(name)) as process, pytest.raises(BenchError) as error:
        process.ask("prepare", case=CASE.to_json(), slice_seconds=0.0)
    assert len(str(error.value).splitlines()) == 1
    for piece in (f"contender {name} ", *pieces):
        assert piece in str(error.value)


def test_a_contender_that_does_not_import_says_what_is_missing():
    with Process("none", Entry("tests.bench.nowhere:make")) as process, pytest.raises(BenchError) as error:
        process.ask("facts")
    assert str(error.value).endswith("ModuleNotFoundError: No module named 'tests.bench.nowhere'")


def test_contenders_take_turns_and_one_that_dies_does_not_stop_the_others():
    told = []
    entries = {name: fake(name) for name in ("quick", "dying", "slow")}
    timings = take_turns([CASE, FORWARD], entries, Effort(slices=2, slice_seconds=0.0), told.append)
    assert list(timings.failed) == ["dying"]
    assert timings.slices["slow", "train"] == [2.0, 2.0]
    assert timings.seconds("quick", "forward") == 0.5
    assert timings.seconds("dying", "train") is None
    assert timings.peak_memory.keys() == {"quick", "slow"}
    turns = [(line.split(", ")[1].split(": ")) for line in told if line.startswith("slice")]
    assert turns == 2 * [["train", "quick"], ["train", "slow"], ["forward", "quick"], ["forward", "slow"]]


def test_a_contender_takes_part_in_its_kinds_only():
    entries = {"quick": fake("quick"), "slow": fake("slow", kinds=("forward",))}
    timings = take_turns([CASE, FORWARD], entries, Effort(1, 0.0), lambda _: None)
    assert timings.slices.keys() == {("quick", "train"), ("quick", "forward"), ("slow", "forward")}


def test_starts_are_timed_with_empty_and_with_filled_caches():
    told = []
    timings = time_starts(CASE, {"quick": fake("quick"), "refusing": fake("refusing")}, Effort(2, 0.0), told.append)
    assert [line.split(", ")[1].split(":")[0] for line in told if "quick" in line] == 2 * ["cold", "warm"]
    assert len(timings.slices["quick", "cold"]) == len(timings.slices["quick", "warm"]) == 2
    assert list(timings.failed) == ["refusing"]


BENCHMARK = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
from moezoo.bench.measure import Effort, take_turns
from moezoo.bench.process import Process
from tests.bench.fakes import CASE, fake

started = Process.__init__
def noted(self, *arguments):
    started(self, *arguments)
    print(self._process.pid, flush=True)
Process.__init__ = noted
take_turns([CASE], {"quick": fake("quick"), "sleeping": fake("sleeping")}, Effort(1, 0.0), lambda _: None)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_benchmark_that_is_stopped_leaves_no_process(how):
    """Ctrl-C goes to all processes of a terminal, the other signals to the parent alone."""
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
    if how == signal.SIGINT:
        os.killpg(parent.pid, how)
    else:
        parent.send_signal(how)
    parent.wait(20)
    assert all(gone(pid) for pid in workers)
    parent.stdout.close()
