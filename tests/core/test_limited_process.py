"""Limits of a child process, with functions of this file's own module of tricks."""

import os
import resource
import sys
import time

import pytest

from moezoo.core.limited_process import LimitedProcess, LimitedProcessError

TRICKS = """
import os

def echo(value):
    print("noise on standard output")
    return value

def endless(_):
    while True:
        pass

def asleep(_):
    import time
    time.sleep(60)

def large(size):
    return "a" * size

def panic(_):
    class Panic(BaseException):
        pass
    raise Panic("first line\\nsecond " + "x" * 1000)

def abort(_):
    os.abort()
"""


@pytest.fixture
def tricks(tmp_path, monkeypatch):
    (tmp_path / "tricks_of_a_child.py").write_text(TRICKS)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    return lambda name, seconds=5.0: LimitedProcess(f"tricks_of_a_child:{name}", seconds=seconds)


def test_a_process_is_reused_and_ends_with_its_object(tricks):
    process = tricks("echo")
    assert process.call({"a": [1, None, "ä\n"]}) == {"a": [1, None, "ä\n"]}
    child = process._process
    assert process.call("again") == "again"
    assert process._process is child
    assert child.poll() is None
    del process
    assert child.poll() is not None


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("large", 1 << 30, "it needs more than 256 MiB of memory"),
        ("panic", None, "Panic: first line second x{10}"),
        ("abort", None, "its process ended with SIGABRT"),
        ("asleep", None, "it took more than 0.4 s"),
        ("endless", None, r"it took (too much processor time|more than 0.4 s)"),
    ],
)
def test_each_limit_is_one_line(tricks, name, argument, message):
    process = tricks(name, seconds=0.1)
    started = time.monotonic()
    with pytest.raises(LimitedProcessError, match=message) as caught:
        process.call(argument)
    assert time.monotonic() - started < 20
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_next_call_after_a_crash_has_a_new_process(tricks):
    process = tricks("large")
    assert process.call(3) == "aaa"
    process._process.kill()
    with pytest.raises(LimitedProcessError, match="its process ended with SIGKILL"):
        process.call(3)
    assert process.call(2) == "aa"


def test_a_call_works_with_more_than_1024_open_files(tricks):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("the hard limit of open files is below 1,200")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    descriptors = [os.dup(0) for _ in range(1100)]
    try:
        assert tricks("echo").call(1) == 1
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
