"""Output of commands: the console, JSON or a page, and warnings."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class Report(Protocol):
    """The result of a command, as a typed object."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        ...


def new_console(width: int = 100, *, quiet: bool = False) -> "Console":
    """Return the console for standard output; outside of a terminal it is `width` columns wide."""
    from rich.console import Console

    return Console(quiet=quiet) if sys.stdout.isatty() else Console(width=width, quiet=quiet)


def print_lines(console: "Console", *lines: str) -> None:
    """Print lines verbatim: no markup, no highlighting, no line breaks."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


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
    """Print warnings, notes and assumptions to standard error, one per line."""
    for warning in warnings:
        click.echo(warning, err=True)


def warn_assumed(assumed: str | None) -> None:
    """Print an assumption about the vocabulary to standard error, if there is one."""
    if assumed:
        warn(f"assumed: {assumed}")
