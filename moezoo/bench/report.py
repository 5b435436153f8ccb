"""Console report of benchmark results: a table per mode, and one of all shares of the limit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moezoo.bench.foreign_load import DISTURBED
from moezoo.bench.measure import Effort
from moezoo.bench.results import Ratio, Results, Row, ratios
from moezoo.core.progress import clock

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_BUSY = 0.5  # load per core before the benchmark
_TOO_LOW = (
    "(!) faster than the limit, also when both were measured again: the limit is too low here, and no share is known"
)


def heading(
    machine: Mapping[str, Any], load_before: Sequence[float], effort: Effort, expected_s: float, units: int
) -> "Table":
    """Return the part of the report that is known before anything is measured."""
    table = _facts()
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    table.add_row("machine", f"{machine['processor']}, {machine['cores']} cores, {memory}; {machine['system']}")
    busy = " - the machine is not idle: only ratios are reliable" if load_before[0] > _BUSY * machine["cores"] else ""
    table.add_row("load", f"{load_before[0]:g} (1-minute average){busy}")
    for name, value in machine["variables"].items():
        table.add_row(name, value)
    table.add_row("slices", f"{effort.slices} of about {effort.slice_seconds:g} s, interleaved; medians")
    table.add_row("time", f"about {clock(expected_s)} for {units} warm-ups, slices and starts; corrected as it goes")
    return table


def closing(results: Results) -> "Iterator[RenderableType]":
    """Yield the parts of the report that are known at the end: contenders, failures, and shares side by side."""
    table = _facts()
    table.add_row("load", f"{results.machine['load_after'][0]:g} afterwards")
    table.add_row("foreign load", _foreign_load(results.rows))
    for name, facts in results.contenders.items():
        table.add_row(name, "; ".join(f"{key}: {value}" for key, value in facts.items()))
    for name, why in results.left_out.items():
        table.add_row(name, f"[dim]skipped: {why}")
    for line in results.failed:
        table.add_row("[red]failed", line)
    if results.stopped is not None:
        table.add_row("[red]incomplete", "ended by a signal before everything was measured")
    yield table
    shared = [row for row in results.rows if row.share_of_limit is not None and row.mode != "experts"]
    if len({(row.mode, row.config, row.case) for row in shared}) > 1:
        yield _shares(shared)
    compared = [ratio for ratio in ratios(results.rows) if ratio.mode != "experts"]
    if compared:
        yield _relative_to_peers(compared)


def _foreign_load(rows: Sequence[Row]) -> str:
    """Summarize the CPU time that other processes took from the slices."""
    shares = [share for row in rows for share in row.foreign_load]
    if not shares:
        return "not known (needs /proc/stat and slices of 0.2 s)"
    disturbed = sum(row.num_disturbed for row in rows)
    text = f"at most {max(shares):.0%} of the cores in a slice"
    if not disturbed:
        return text
    return f"[yellow]{text}, above {DISTURBED:.0%} in {disturbed} of {len(shares)} slices: repeat it on an idle machine"


def _facts() -> "Table":
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _titled(title: str) -> "Table":
    """Return an empty table with as little as possible between its columns, for terminals of 80."""
    from rich import box
    from rich.table import Table

    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )


def table_of(rows: Sequence[Row], complete: bool) -> "Table":
    """Return a table of one mode and config: a row per contender and case, and the columns that have values."""
    columns: dict[str, Callable[[Row], str]] = {
        "case": lambda row: row.case,
        "contender": lambda row: row.contender,
        "share": lambda row: "> 1 (!)" if row.beats_limit else _number(row.share_of_limit, ".3f"),
        "relative": lambda row: _number(row.relative, ".2f", "x"),
        "tokens/s": lambda row: _number(row.tokens_per_second, ",.0f"),
        "time": lambda row: f"{1000 * row.seconds:,.2f} ms" if row.seconds < 1 else f"{row.seconds:,.2f} s",
        "spread": lambda row: f"{100 * (max(row.slices) - min(row.slices)) / row.seconds:.0f} %",
        "disturbed": lambda row: f"{row.num_disturbed} of {len(row.slices)}" if row.num_disturbed else "",
        "GFLOP/s": lambda row: _number(row.flops_per_second, ",.1f", scale=1e9),
        "GB/s": lambda row: _number(row.bytes_per_second, ",.2f", scale=1e9),
        "first": lambda row: _number(row.first_seconds, ".1f", " s"),
        "peak MiB": lambda row: _number(row.peak_memory_bytes, ",.0f", scale=2**20),
    }
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    shown = [name for name, values in cells.items() if any(values)]
    title = f"{rows[0].mode} {rows[0].config}" + ("" if complete else ", incomplete: ended by a signal")
    caption = _TOO_LOW if any(row.beats_limit for row in rows) else None
    table = _titled(title)
    table.caption, table.caption_justify = caption, "left"
    for name in shown:
        is_text = name in ("case", "contender")
        heading = name.replace("peak MiB", "peak\nMiB")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    previous = ""
    for index, row in enumerate(rows):
        if index and row.case != previous:
            table.add_section()
        values = [cells[name][index] for name in shown]
        table.add_row("" if row.case == previous else values[0], *values[1:])
        previous = row.case
    return table


def _shares(rows: Sequence[Row]) -> "Table":
    """Return a table of shares of the limit: a row per contender, a column per case, configs side by side."""
    configs = list(dict.fromkeys(row.config for row in rows))
    names = list(dict.fromkeys((row.mode, row.case) for row in rows))
    found = {(row.mode, row.case, row.config, row.contender): row.share_of_limit for row in rows}
    title = f"share of the limit, {' / '.join(configs)}"
    table = _titled(title)
    table.add_column("contender", no_wrap=True)
    for mode, case in names:
        table.add_column(case if case.startswith(mode) else f"{mode} {case}", justify="right")
    for contender in dict.fromkeys(row.contender for row in rows):
        cells = []
        for mode, case in names:
            shares = [found.get((mode, case, config, contender)) for config in configs]
            cells.append(
                " / ".join("> 1 (!)" if (share or 0) > 1 else _number(share, ".2f") or "-" for share in shares)
            )
        table.add_row(contender, *cells)
    return table


def _relative_to_peers(compared: Sequence[Ratio]) -> "Table":
    """Return a table of speeds relative to peers: a row per case, a column per backend and peer."""
    title = "speed relative to peers: median of the turns (range)"
    table = _titled(title)
    table.add_column("case")
    columns = list(dict.fromkeys((ratio.contender, ratio.peer) for ratio in compared))
    for contender, peer in columns:
        table.add_column(f"{contender} / {peer}", justify="right")
    cases = dict.fromkeys((ratio.config, ratio.mode, ratio.case) for ratio in compared)
    for config, mode, case in cases:
        cells = {
            (ratio.contender, ratio.peer): f"{ratio.median:.2f} ({ratio.lowest:.2f}-{ratio.highest:.2f})"
            for ratio in compared
            if (ratio.config, ratio.mode, ratio.case) == (config, mode, case)
        }
        label = case if case.startswith(mode) else f"{mode} {case}"
        table.add_row(f"{config} {label}", *(cells.get(column, "-") for column in columns))
    return table


def _number(value: float | None, form: str, unit: str = "", scale: float = 1.0) -> str:
    return "" if value is None else f"{value / scale:{form}}{unit}"
