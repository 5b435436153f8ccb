"""Fake contenders without a framework, for tests of their processes."""

import os
import sys
import time

from moezoo.bench.case import Case, Work
from moezoo.bench.configs import smoke_config
from moezoo.bench.contenders import Entry
from moezoo.core.errors import DataError

CASE = Case("train", "train", smoke_config())


def fake(name: str, **options) -> Entry:
    """Return the entry of `make_<name>` below."""
    return Entry(f"tests.bench.fakes:make_{name}", **options)


class Fake:
    """Reports a fixed time per unit, and prints to stdout like some libraries."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def facts(self) -> dict[str, str]:
        print("this line is not an answer")
        return {"seconds": str(self._seconds), "argument": os.environ.get("MOEZOO_FAKE", "unset")}

    def prepare(self, case: Case) -> Work:
        os.write(1, b"neither is this one\n")
        return lambda repeats: repeats * self._seconds


class Dying(Fake):
    """Crashes while it prepares a case."""

    def prepare(self, case: Case) -> Work:
        print("first\nsecond\n\nthe memory is full", file=sys.stderr, flush=True)
        os._exit(9)


class Refusing(Fake):
    """Raises an error that users can fix."""

    def prepare(self, case: Case) -> Work:
        raise DataError("the model is too large;\nexpected a smaller one.")


class Sleeping(Fake):
    """Never returns in time."""

    def prepare(self, case: Case) -> Work:
        time.sleep(600)
        raise AssertionError


def make_quick() -> Fake:
    return Fake(0.5)


def make_slow() -> Fake:
    return Fake(2.0)


def make_dying() -> Fake:
    return Dying(1.0)


def make_refusing() -> Fake:
    return Refusing(1.0)


def make_sleeping() -> Fake:
    return Sleeping(1.0)
