"""Output streams: lost terminals, broken pipes and full disks, and encodings that lack a character."""

import errno
import io
import os
import sys
from types import SimpleNamespace

import click
import pytest
from rich.console import Console
from rich.table import Table

from moezoo.cli.output import (
    Output,
    continue_without_output,
    new_console,
    output_streams,
    print_lines,
    show_progress,
    warn,
)
from moezoo.core import progress
from moezoo.core.errors import RunError


class Failing(io.StringIO):
    """A stream that a number of writes reach before each raises an OSError."""

    def __init__(self, number: int, writes: int) -> None:
        super().__init__()
        self.number, self.writes, self.tried = number, writes, 0

    def write(self, text: str) -> int:
        self.tried += 1
        if self.tried > self.writes:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_optional_output_that_is_lost_ends_nothing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = Failing(number, 1)
    monkeypatch.setattr(sys, "stdout", lost)
    with output_streams():
        continue_without_output()
        console = Console()
        console.print("first")
        for _ in range(3):
            console.print("more")
            click.echo("more")
    assert lost.getvalue() == "first\n"
    assert lost.tried == 2


def test_required_output_ends_quietly_at_a_broken_pipe_else_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Failing(errno.EPIPE, 0))
    with output_streams(), pytest.raises(BrokenPipeError):  # click exits without a message
        click.echo("text")
    monkeypatch.setattr(sys, "stdout", Failing(errno.ENOSPC, 0))
    with output_streams(), pytest.raises(RunError, match=r"standard output cannot be written; got No space left"):
        click.echo("text")


def test_lost_file_is_replaced_so_that_python_can_flush_it_at_exit() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        output = Output(stream, "standard output")
        output.required = False
        output.write("x" * 10)
        output.flush()
        stream.flush()
        assert os.path.samestat(os.fstat(writer), os.stat(os.devnull))


def test_closed_output_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with output_streams():
        click.echo("text")
        Console().print("text")
        assert not sys.stdout.isatty()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_characters_that_the_encoding_lacks_are_escaped(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding))
    with output_streams():
        click.echo("é 三")
        Console(width=40).print(Table("é 三"))
    accent = "é" if encoding == "cp1252" else "\\xe9"
    text, *table = stream.getvalue().decode(encoding).splitlines()
    assert text == f"{accent} \\u4e09"
    assert any(f"{accent} \\u4e09" in line for line in table)
    assert all(line.isascii() for line in table if "-" in line)


def test_piped_table_is_as_wide_as_its_content_and_has_no_trailing_blanks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table("name", "text")
    table.add_row("a", "word " * 60)
    table.add_row("b", "")
    new_console().print(table)
    lines = capsys.readouterr().out.splitlines()
    assert any("word " * 59 in line for line in lines)
    assert all(line == line.rstrip() for line in lines)
    monkeypatch.setenv("COLUMNS", "60")
    new_console().print(table)
    assert {len(line) for line in capsys.readouterr().out.splitlines() if line} == {60}


def test_lines_break_between_words_in_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    path, command = "runs/" + "x" * 60, "  moezoo train " + "--set a=b " * 6
    text = f"{'word ' * 10}{path} end"
    shown, plain = (Console(file=io.StringIO(), width=40, force_terminal=terminal) for terminal in (True, False))
    for console in (shown, plain):
        print_lines(console, text, command)
    assert plain.file.getvalue() == f"{text}\n{command}\n"
    *lines, last = shown.file.getvalue().splitlines()
    assert (lines, last) == ([("word " * 8).rstrip(), "  word word", f"  {path}", "  end"], command)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "30")
    warn("DataError: the first five words of it", "note: short")
    assert stream.getvalue().splitlines() == ["DataError: the first five", "  words of it", "note: short"]


def test_progress_of_a_command_whose_output_is_a_file_is_a_line_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))

    def line(what: str, done: int, total: int | None, pace: progress.Pace) -> str:
        return f"{what}: {done} of {total}"

    for quiet, numbers in ((False, (3, 6, 9)), (True, ())):
        with show_progress(new_console(quiet=quiet), "...", line) as show:
            for done in range(10):
                show("loading", done, 9)
                now += 3.5
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.splitlines() == [f"loading: {number} of 9" for number in numbers]
