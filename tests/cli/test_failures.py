"""Errors that no command expects: one line on the terminal, and the traceback in a file."""

import errno
import re
import tempfile
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from moezoo.cli.main import main


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("MOEZOO_TRACEBACK", raising=False)


def failing(error: BaseException):
    """Run a command that raises an error."""

    @click.command("fail")
    def fail() -> None:
        raise error

    main.add_command(fail)
    try:
        return CliRunner().invoke(main, ["fail"])
    finally:
        del main.commands["fail"]


def allocation_error() -> Exception:
    with pytest.raises(MemoryError) as seen:
        np.empty((2**60,), np.float32)
    return seen.value


@pytest.mark.parametrize(
    "error",
    [
        allocation_error(),
        MemoryError(),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1099264429816 bytes.\n  at x\n"),
        RuntimeError("[malloc_or_wait] Unable to allocate 4000000000 bytes."),
        RuntimeError("[metal::malloc] Attempting to allocate 77 bytes which is greater than the maximum"),
    ],
    ids=["numpy", "python", "jax", "mlx", "metal"],
)
def test_memory_that_runs_out_is_one_line(error, tmp_path):
    result = failing(error)
    assert result.exit_code == 1
    assert result.stderr.startswith("OutOfMemoryError: memory ran out; got ")
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_bug_is_one_line_that_names_the_file_with_its_traceback():
    result = failing(ZeroDivisionError("too\nmany " + "words " * 1000))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("internal error: ZeroDivisionError: too many words ")
    assert len(line) < 700
    (path,) = re.findall(r"the traceback in (\S+);", line)
    text = Path(path).read_text(encoding="utf-8")
    assert text.startswith("Traceback (most recent call last)")
    assert "raise error" in text


def test_traceback_is_printed_if_asked_for_or_if_there_is_no_place_for_it(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert "Traceback (most recent call last)" in failing(KeyError("x")).stderr
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("MOEZOO_TRACEBACK", "1")
    assert "Traceback (most recent call last)" in failing(KeyError("x")).stderr
    assert not list(tmp_path.iterdir())


def test_text_that_only_mentions_memory_is_a_bug():
    assert failing(KeyError("RESOURCE_EXHAUSTED")).stderr.startswith("internal error: KeyError: ")


def test_exits_of_click_are_left_to_it():
    assert failing(click.exceptions.Exit(7)).exit_code == 7
    assert failing(click.UsageError("no such thing")).exit_code == 2
    assert failing(OSError(errno.EPIPE, "closed")).stderr == ""
