"""The explorer's page: one or two routing traces in an HTML file that needs no network.

Writing: writings/explorer.md.
"""

import html
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.core.errors import DataError
from moezoo.core.explorer.columns import Column, integers, packed, reals
from moezoo.core.traces.trace import RoutingTrace, TraceInfo, TraceRows
from moezoo.core.traces.trace_file import open_trace

DEFAULT_TOKENS = 2_000
"""Tokens of a page if none are chosen: below 3 MB at 32 layers, 64 experts and top-8."""
MAX_TOKENS = 20_000
"""Tokens of a page: each is an element of the browser's document."""
_FINE_WEIGHTS = 600_000  # assignments up to which weights have 16 bits instead of 8

_ASSETS = resources.files("moezoo.core.explorer") / "assets"
_SCRIPTS = ("data.js", "text.js", "panels.js", "explorer.js")


def explorer_page(traces: Sequence[RoutingTrace], tokens: range) -> str:
    """Return the page of one trace, or of two side by side.

    Args:
        traces: one trace, or two that `check_comparable` accepts.
        tokens: the tokens that the page shows, by their positions in the trace.
    """
    title = "Routing of " + " and ".join(_names(traces))
    content = packed(*_content(traces, tokens, title))
    page = _asset("explorer.html")
    # Trap: what is filled in comes last, and once each, since texts of the user could contain a marker.
    parts = {
        "/*style*/": _asset("explorer.css"),
        "/*script*/": "".join(map(_asset, _SCRIPTS)),
        "<!--title-->": html.escape(title),
        "<!--data-->": content,
    }
    for marker, part in parts.items():
        before, after = page.split(marker)
        page = before + part + after
    return page


def check_comparable(first: RoutingTrace, second: RoutingTrace) -> None:
    """Check that two traces can stand side by side: the same layers and tokens. Raises DataError."""
    remedy = "Record both with the same --data and --max-tokens."
    if first.info.layers != second.info.layers:
        raise DataError(
            f"{second.where} has routing of the layers {list(second.info.layers)!s:.80}; expected those of "
            f"{first.where}, {list(first.info.layers)!s:.80}. Compare traces of one model."
        )
    if first.num_tokens != second.num_tokens:
        raise DataError(
            f"{second.where} has {second.num_tokens:,} tokens; expected the {first.num_tokens:,} of {first.where}. "
            f"{remedy}"
        )
    if not (first.has("token") and second.has("token")):
        return
    differs = np.flatnonzero(first.column("token") != second.column("token"))
    if len(differs):
        place = int(differs[0])
        theirs, ours = (int(trace.column("token", place, place + 1)[0]) for trace in (second, first))
        raise DataError(
            f"{second.where} has token {theirs} at position {place:,}; expected {ours}, as in {first.where}. {remedy}"
        )


def chosen_tokens(text: str | None, total: int) -> range:
    """Return the positions that FIRST:LAST chooses (as a slice: LAST is not included); the first 2,000 without a text.

    Raises DataError: not two positions in order, none of the trace's tokens, or more than a page takes.
    """
    if text is None:
        return range(min(total, DEFAULT_TOKENS))
    first, colon, last = text.partition(":")
    try:
        chosen = range(total)[slice(int(first or 0), int(last) if last else None)]
    except ValueError:
        chosen = range(0)
    if not colon or not chosen:
        raise DataError(
            f"--tokens chooses tokens of the trace's {total:,} as FIRST:LAST; got {text!r:.40}. For example: --tokens "
            f"0:{min(total, DEFAULT_TOKENS)}."
        )
    if len(chosen) > MAX_TOKENS:
        raise DataError(
            f"--tokens {text:.40} chooses {len(chosen):,} tokens; a page takes at most {MAX_TOKENS:,}. Make a page for "
            "each part."
        )
    return chosen


def demo_trace() -> RoutingTrace:
    """Return the built-in example: three fables through a small model that was trained on fables."""
    with resources.as_file(_ASSETS / "demo.safetensors") as path:
        return open_trace(path)


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _content(traces: Sequence[RoutingTrace], tokens: range, title: str) -> tuple[dict[str, Any], list[Column]]:
    """Return the page's data: a header, and the columns that follow it."""
    rows = [trace.rows(tokens.start, tokens.stop) for trace in traces]
    with_tokens = next((index for index, row in enumerate(rows) if row.token is not None), None)
    if with_tokens is None:
        texts, text_N = [f"#{token} " for token in tokens], np.arange(len(tokens))
    else:
        token_U, text_N = np.unique(rows[with_tokens].columns["token"], return_inverse=True)
        texts = [traces[with_tokens].text(token) for token in token_U.tolist()]
    first = rows[0]
    columns = [integers("text", text_N)]
    columns += [
        integers(name, first.columns[name]) for name in ("document", "domain", "generated") if name in first.columns
    ]
    bits = 16 if sum(row.expert.size for row in rows) <= _FINE_WEIGHTS else 8
    for index, row in enumerate(rows):
        columns += _routing_columns(row, index, bits)
    experts = np.max([trace.info.num_experts for trace in traces], axis=0)
    header = {
        "title": title,
        "first": tokens.start,
        "tokens": len(tokens),
        "total": traces[0].num_tokens,
        "layers": list(traces[0].info.layers),
        "experts": experts.tolist(),
        "domains": list(traces[0].info.domains),
        "texts": texts,
        "traces": [
            {"name": name, "topK": trace.top_k, "facts": _facts(trace.info)}
            for name, trace in zip(_names(traces), traces, strict=True)
        ],
    }
    return header, columns


def _routing_columns(rows: TraceRows, index: int, bits: int) -> list[Column]:
    """Return the columns of a trace: [L, K, N] and [L, N], which compress better than the tokens' order."""
    columns = [integers("expert", rows.expert.transpose(1, 2, 0), index)]
    if rows.weight is not None:
        columns.append(reals("weight", rows.weight.transpose(1, 2, 0), index, bits=bits, power=2))
    if rows.dropped is not None and rows.dropped.any():
        columns.append(integers("dropped", rows.dropped.transpose(1, 2, 0), index))
    if rows.margin is not None:  # near ties are what matters: 0.2 % of the value from 1e-6 on
        columns.append(reals("margin", rows.margin.T, index, bits=16, power=4))
    if rows.runner_up is not None:
        columns.append(integers("runner_up", rows.runner_up.T, index))
    if rows.loss is not None:
        columns.append(reals("loss", rows.loss, index, bits=16, power=2))
    return columns


def _names(traces: Sequence[RoutingTrace]) -> list[str]:
    """Return a name for each trace: its file's, with the folder where two are alike."""
    paths = [Path(trace.where) for trace in traces]
    names = [path.stem for path in paths]
    return names if len(set(names)) == len(names) else [str(path.with_suffix("")) for path in paths]


def _facts(info: TraceInfo) -> list[str]:
    """Return what a reader should know about the origin of a trace."""
    routed = "routed as in generation" if info.inference else None
    other = None if info.written_by == "moezoo" else f"written by {info.written_by}"
    return [fact for fact in (info.model, info.backend, info.compute, routed, other) if fact]
