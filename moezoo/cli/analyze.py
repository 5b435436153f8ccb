"""`moezoo analyze`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moezoo.cli.completion import PATH
from moezoo.cli.options import json_option
from moezoo.cli.output import new_console, print_json, show_progress, warn
from moezoo.core.errors import DataError, SpecError, nearest
from moezoo.core.progress import Pace

if TYPE_CHECKING:
    from moezoo.core.analysis.expert_cache import CacheResult, ExpertSizes, PolicyName
    from moezoo.core.progress import Progress
    from moezoo.core.traces.trace import RoutingTrace

_LINKS_GB = (7.88, 15.8, 31.5, 63.0)  # PCIe 4.0 x4, 5.0 x4, 4.0 x16, 5.0 x16: writings/measures.md


@click.command()
@click.argument("traces", metavar="TRACE...", type=PATH, nargs=-1, required=True)
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Measure the first N tokens. Default: all.")
@click.option("--cache", "caches", multiple=True, metavar="8GiB", help="Simulate a cache of experts; repeatable.")
@click.option(
    "--policy", default="lru,lfu,static,best", show_default=True, metavar="LIST", help="Policies of the cache."
)
@click.option("--shared", is_flag=True, help="One cache for all layers. Default: an equal part for each layer.")
@click.option("--model", metavar="PATH", help="Model whose experts are cached. Default: the trace's model.")
@click.option("--expert-bytes", metavar="12MB", help="Bytes of an expert, instead of those of the model.")
@click.option(
    "--bandwidth",
    "bandwidths",
    multiple=True,
    metavar="7GB/s",
    help="Bandwidth of loading experts; repeatable. Default: PCIe 4.0 x4, 5.0 x4, 4.0 x16 and 5.0 x16.",
)
@json_option
@click.option("--csv", "csv_folder", type=PATH, metavar="FOLDER", help="Write tables, which have all values.")
@click.option("--pictures", type=PATH, metavar="FOLDER", help="Write pictures.")
def analyze(
    traces: tuple[Path, ...],
    max_tokens: int | None,
    caches: tuple[str, ...],
    policy: str,
    shared: bool,
    model: str | None,
    expert_bytes: str | None,
    bandwidths: tuple[str, ...],
    as_json: bool,
    csv_folder: Path | None,
    pictures: Path | None,
) -> None:
    """Measure routing traces: load, specialization, co-activation, caches.

    TRACE is a file of `moezoo trace`. Several are those of a run's checkpoints, in the order of training and over the
    same text: then the saturation of the router is measured too, and the tables are of the last one.
    """
    from moezoo.core.analysis.analyze import analyze as analyze_traces
    from moezoo.core.analysis.chosen import first_tokens
    from moezoo.core.reports.analysis_page import analysis_page
    from moezoo.core.reports.analysis_pictures import draw_analysis
    from moezoo.core.reports.analysis_tables import write_tables
    from moezoo.core.reports.text import memory_bytes
    from moezoo.core.traces.trace_file import open_trace

    opened = [first_tokens(open_trace(path), max_tokens) for path in traces]
    policies = _policies(policy)
    cache_bytes = [memory_bytes(text, "--cache") for text in caches]
    rates = [_bandwidth(text) for text in bandwidths] or [1e9 * rate for rate in _LINKS_GB]
    sizes = _expert_sizes(opened[-1], model, expert_bytes) if cache_bytes else None
    console = new_console()
    with show_progress(console, "measuring ...", _line) as show:
        analysis = analyze_traces(opened, show)
        results = [] if sizes is None else _simulated(opened[-1], sizes, cache_bytes, policies, shared, show)
    written = [] if csv_folder is None else write_tables(csv_folder, analysis, results)
    written += [] if pictures is None else draw_analysis(pictures, analysis, results, sizes)
    if as_json:
        print_json({**analysis.to_json(), "cache": [_cache_json(result, rates) for result in results]})
    else:
        console.print(analysis_page(analysis, results, sizes, rates))
    warn(*(f"wrote {path}" for path in written))


def _line(what: str, done: int, total: int | None, pace: Pace) -> str:
    return f"{what}: {done:,} of {total or 0:,} tokens, eta {pace.eta(done, total)}"


def _policies(text: str) -> "list[PolicyName]":
    from moezoo.core.analysis.expert_cache import POLICIES

    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in POLICIES:
            raise SpecError(f"--policy has {name!r}; expected some of {', '.join(POLICIES)}{nearest(name, POLICIES)}.")
    return [name for name in POLICIES if name in names]


def _bandwidth(text: str) -> float:
    """Return bytes per second. Raises SpecError."""
    from moezoo.core.reports.text import memory_bytes

    found = re.fullmatch(r"(.*)/s", text)
    rate = memory_bytes(found[1], "--bandwidth") if found else 0
    if rate == 0:
        raise SpecError(f"--bandwidth is {text!r}; expected a number, a unit and /s, e.g. 7GB/s.")
    return rate


def _expert_sizes(trace: "RoutingTrace", model: str | None, expert_bytes: str | None) -> "ExpertSizes":
    """Return the sizes of the experts: those given, or those of the model."""
    from moezoo.core.analysis.expert_cache import ExpertSizes, sizes_of
    from moezoo.core.reports.text import memory_bytes
    from moezoo.core.runs.open import open_model

    if expert_bytes is not None:
        size = memory_bytes(expert_bytes, "--expert-bytes")
        if size == 0:
            raise SpecError(f"--expert-bytes is {expert_bytes!r}; expected more than 0, e.g. 12MB.")
        return ExpertSizes((size,) * trace.num_layers, trace.info.num_experts)
    path = model or trace.info.model
    if path is None:
        raise DataError(
            f"{trace.where} does not name its model, and --cache needs the size of its experts; expected --model PATH "
            "or --expert-bytes SIZE."
        )
    opened = open_model(path)
    warn(*opened.problems)
    num_experts = {layer: moe.num_experts for layer, moe in opened.config.model.moes}
    return sizes_of(opened.parameter_bytes, trace.info.layers, num_experts)


def _simulated(
    trace: "RoutingTrace",
    sizes: "ExpertSizes",
    cache_bytes: Sequence[int],
    policies: "Sequence[PolicyName]",
    shared: bool,
    show: "Progress",
) -> "list[CacheResult]":
    from moezoo.core.analysis.expert_cache import simulate_cache

    return [
        simulate_cache(trace, sizes, size, policy, is_shared=shared, on_progress=show)
        for size in cache_bytes
        for policy in policies
    ]


def _cache_json(result: "CacheResult", rates: Sequence[float]) -> dict[str, object]:
    speeds = {f"{rate:.0f}": result.tokens_per_second(rate) if result.loaded_bytes else None for rate in rates}
    return {
        **vars(result),
        "hit_rate": result.hit_rate,
        "bytes_per_token": result.bytes_per_token,
        "tokens_per_second_by_bandwidth": speeds,
    }
