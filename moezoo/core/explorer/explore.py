"""The explorer's page from Python: shown in a notebook, or written to a file."""

import html
from pathlib import Path

from moezoo.core.explorer.page import check_comparable, chosen_tokens, explorer_page
from moezoo.core.files import write_atomically
from moezoo.core.traces.trace import RoutingTrace
from moezoo.core.traces.trace_file import open_trace

_FRAME = '<iframe srcdoc="{page}" title="Routing explorer" style="width: 100%; height: 720px; border: 0"></iframe>'


class Explorer:
    """The explorer's page of one or two traces. A notebook shows it in a frame, which needs no network.

    Attributes:
        html: the page.
        num_tokens: number of tokens that it shows.
    """

    def __init__(self, html: str, num_tokens: int):
        self.html, self.num_tokens = html, num_tokens

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.num_tokens:,} tokens; write(PAGE) makes a file for a browser>"

    def _repr_html_(self) -> str:
        return _FRAME.format(page=html.escape(self.html))

    def write(self, path: str | Path) -> Path:
        """Write the page to a file, and return its path."""
        write_atomically(Path(path), self.html)
        return Path(path)


def explore(*traces: RoutingTrace | str | Path, tokens: range | None = None) -> Explorer:
    """Make the explorer's page of one trace, or of two side by side: the implementation of `moezoo.explore`."""
    opened = [trace if isinstance(trace, RoutingTrace) else open_trace(Path(trace)) for trace in traces]
    if len(opened) == 2:
        check_comparable(*opened)
    shown = chosen_tokens(None, opened[0].num_tokens) if tokens is None else tokens
    return Explorer(explorer_page(opened, shown), len(shown))
