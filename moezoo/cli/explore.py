"""`moezoo explore`."""

from pathlib import Path

import click

from moezoo.cli.completion import PATH
from moezoo.cli.output import new_console, print_lines, warn
from moezoo.core.errors import DataError, counted


@click.command()
@click.argument("traces", metavar="[TRACE [TRACE2]]", type=PATH, nargs=-1)
@click.option("--out", "-o", metavar="PAGE", type=PATH, required=True, help="HTML file to write.")
@click.option(
    "--tokens",
    metavar="FIRST:LAST",
    help="Tokens to show, LAST not included. Default: the first 2,000; at most 20,000.",
)
@click.option("--demo", is_flag=True, help="Show the built-in example: fables through a small trained model.")
def explore(traces: tuple[Path, ...], out: Path, tokens: str | None, demo: bool) -> None:
    """Make a page that shows the routing of each token.

    TRACE is a file that `moezoo trace` wrote; two of the same tokens are shown side by side, with differences marked.
    The page is one HTML file that works without a network.
    """
    from moezoo.core.explorer.explore import explore as explorer_of
    from moezoo.core.explorer.page import chosen_tokens, demo_trace
    from moezoo.core.reports.text import bytes_text
    from moezoo.core.traces.trace_file import open_trace

    if demo == bool(traces) or len(traces) > 2:
        got = " ".join([*map(str, traces), *(["--demo"] if demo else [])]) or "nothing"
        raise DataError(
            f"explore takes one trace, two of the same tokens, or --demo; got {got:.200}. For example: moezoo explore "
            "trace.safetensors -o page.html."
        )
    opened = [demo_trace()] if demo else [open_trace(path) for path in traces]
    total = opened[0].num_tokens
    chosen = chosen_tokens(tokens, total)
    if len(chosen) < total and tokens is None:
        warn(
            f"note: the page has the first {len(chosen):,} of {total:,} tokens; --tokens FIRST:LAST chooses others, "
            "20,000 at most"
        )
    explorer_of(*opened, tokens=chosen).write(out)
    size = bytes_text(out.stat().st_size)
    print_lines(new_console(), f"{out}: {counted(len(chosen), 'token')}, {size}; open it in a browser")
