"""Output of commands: the streams, the console, JSON or a page, and warnings."""

import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TextIO, cast

import click

from moezoo.core.errors import RunError
from moezoo.core.progress import Pace, Progress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_NATURAL_WIDTH = 10_000  # columns, more than any table has


class Output(io.TextIOBase):
    """Standard output or error of a command: it escapes characters that the stream's encoding lacks.

    Args:
        stream: the stream, None if it is closed.
        name: of the stream, for errors.

    Fields:
        required: whether the command ends when the stream cannot be written: quietly after a broken pipe (`| head`),
            else with a RunError. If False, what is written after that is lost.
    """

    def __init__(self, stream: TextIO | None, name: str):
        self._stream, self._name = stream, name
        self.required, self._lost = True, stream is None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    # Trap: click replaces an ASCII stream that has a `buffer` by one in UTF-8.
    encoding = property(lambda self: getattr(self._stream, "encoding", None) or "utf-8")
    errors = property(lambda self: getattr(self._stream, "errors", None))

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # click tries b"", then ""
            raise TypeError(f"{self._name} takes text")
        if self._stream is not None and not self._lost and text:
            try:
                self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None and not self._lost:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation(f"{self._name} is closed")
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def _lose(self, error: OSError) -> None:
        self._lost = True
        with suppress(io.UnsupportedOperation):  # a stream without a file
            own, nowhere = self.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, own)  # what the stream still holds goes there: Python writes it at exit, and would fail
            os.close(nowhere)
        if self.required and error.errno == errno.EPIPE:
            raise error
        if self.required:
            raise RunError(
                f"{self._name} cannot be written; got {error.strerror}; expected a terminal, pipe or file with free "
                "space. Write it elsewhere."
            ) from None


@contextmanager
def output_streams() -> Iterator[None]:
    """Replace standard output and error by `Output` in a block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output(before[0], "standard output"), Output(before[1], "standard error")
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def continue_without_output() -> None:
    """Let the command go on when its terminal closes, its pipe breaks, or the disk of its log is full."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Output):
            stream.required = False


class Report(Protocol):
    """The result of a command, as a typed object."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        ...


class _WithoutTrailingBlanks(io.TextIOBase):
    """A stream that drops the blanks with which tables fill their lines."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    encoding = property(lambda self: self._stream.encoding)

    def write(self, text: str) -> int:
        self._stream.write(re.sub(r" +(?=\n)", "", text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def new_console(*, quiet: bool = False, to_errors: bool = False) -> "Console":
    """Return the console for standard output, or for standard error.

    Outside of a terminal tables are as wide as their content, unless the environment variable COLUMNS limits them.
    """
    from rich.console import Console

    stream = sys.stderr if to_errors else sys.stdout
    if stream.isatty():
        return Console(quiet=quiet, stderr=to_errors)
    width = None if "COLUMNS" in os.environ else _NATURAL_WIDTH
    return Console(file=cast(TextIO, _WithoutTrailingBlanks(stream)), width=width, quiet=quiet)


@contextmanager
def show_progress(
    console: "Console", text: str, line: "Callable[[str, int, int | None, Pace], str]"
) -> Iterator[Progress]:
    """Yield a progress callback for work whose result is printed on a console.

    It updates a status line if the console is a terminal, else one on standard error, or prints a line there every 10 s
    if that is no terminal either.

    Args:
        console: where the result is printed.
        text: status before the first call.
        line: text of a call; its last argument is the clock of what is worked on.
    """
    shown = console if console.is_terminal else new_console(to_errors=True, quiet=console.quiet)
    spinner = "dots" if shown.encoding.startswith("utf") else "line"
    paces: dict[str, Pace] = {}
    lines = Pace()
    with shown.status(text, spinner=spinner) as status:

        def show(what: str, done: int, total: int | None) -> None:
            shown_line = line(what, done, total, paces.setdefault(what, Pace(done)))
            status.update(shown_line)
            if not shown.is_terminal and lines.is_due(1):
                print_lines(shown, shown_line)

        yield show


def print_lines(console: "Console", *lines: str) -> None:
    """Print lines without markup and highlighting; in a terminal they break between words.

    A line that begins with two blanks, such as a command to copy, stays whole.
    """
    for line in lines:
        shown = _broken(line, console.width) if console.is_terminal else line
        console.print(shown, highlight=False, soft_wrap=True, markup=False)


def _broken(text: str, width: int) -> str:
    """Return lines that break between words, further ones indented; a long word, such as a path, stays whole."""
    import textwrap

    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": "  "}
    lines = text.split("\n")
    return "\n".join(line if line.startswith("  ") else textwrap.fill(line, width, **options) for line in lines)


def _columns(stream: TextIO) -> int | None:
    """Return the width of a terminal; None for another stream."""
    if not stream.isatty():
        return None
    given = os.environ.get("COLUMNS", "")
    with suppress(OSError, ValueError):
        return int(given) if given else os.get_terminal_size(stream.fileno()).columns or None
    return None


def print_report(report: Report, page: "Callable[[], RenderableType]", as_json: bool) -> None:
    """Print a report as JSON, or as the page that `page` renders."""
    if as_json:
        print_json(report.to_json())
    else:
        new_console().print(page())


def print_json(values: dict[str, Any]) -> None:
    """Print plain data as indented JSON."""
    import json

    click.echo(json.dumps(values, indent=2))


def warn(*warnings: str) -> None:
    """Print errors, warnings, notes and assumptions to standard error, one per line; in a terminal they break."""
    width = _columns(sys.stderr)
    for warning in warnings:
        click.echo(warning if width is None else _broken(warning, width), err=True)


def warn_assumed(assumed: str | None) -> None:
    """Print an assumption about the vocabulary to standard error, if there is one."""
    if assumed:
        warn(f"assumed: {assumed}")
