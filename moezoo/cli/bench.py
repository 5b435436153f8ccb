"""`moezoo bench`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moezoo.cli.completion import PATH, complete_mode
from moezoo.cli.options import json_option
from moezoo.cli.output import new_console, print_json, print_lines, show_progress
from moezoo.core.progress import Pace, clock

if TYPE_CHECKING:
    from moezoo.bench.contenders import Entry
    from moezoo.bench.results import Mode


@click.command("bench")
@click.argument("mode", required=False, metavar="[train|layer|decode|startup|experts]", shell_complete=complete_mode)
@click.option("--backend", "backends", metavar="jax,mlx", help="Backends to benchmark. Default: all installed ones.")
@click.option(
    "--config",
    "configs",
    metavar="S,M,CONFIG",
    default="S",
    show_default=True,
    help="Models: S, M, or any configs.",
)
@click.option(
    "--peers",
    metavar="NAME,...",
    help="Other libraries: names, none or all. Default: installed ones that are not slow.",
)
@click.option("--quantize", metavar="4bit", help="Decode with weights in codes of 2, 3, 4, 5, 6 or 8 bits.")
@click.option("--slices", type=click.IntRange(1), default=5, show_default=True, help="Time slices per contender.")
@click.option(
    "--slice-seconds", type=click.FloatRange(0), default=1.0, show_default=True, help="Length of a time slice."
)
@click.option("--smoke", is_flag=True, help="Smoke test: run everything once on a tiny model.")
@click.option("--out", type=PATH, metavar="FILE", help="Plot of the experts sweep. Default: runs/expert_sweep.png.")
@json_option
def bench_command(
    mode: str | None,
    backends: str | None,
    configs: str,
    peers: str | None,
    quantize: str | None,
    slices: int,
    slice_seconds: float,
    smoke: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Benchmark training, one MoE layer, decoding and startup.

    Speeds are also shown as a share of the hardware limit. Without a mode, all modes run. `experts` is a sweep from 4
    to 128 experts with equal active FLOPs. Other libraries (transformers with PyTorch, mlx-lm) are compared if they
    are installed. With --json, the tables go to standard error.
    """
    from moezoo.bench.contenders import select_contenders
    from moezoo.bench.duration import Duration
    from moezoo.bench.machine import load, machine
    from moezoo.bench.measure import Effort
    from moezoo.bench.modes import MODES, SMOKE, bench, known_mode, named_configs, planned, shorter_in_codes
    from moezoo.bench.report import closing, heading, table_of
    from moezoo.bench.results import Row
    from moezoo.bench.sweep_picture import draw_sweep

    modes = MODES if mode is None else (known_mode(mode),)
    bits = _bits(quantize, modes)
    entries, skipped = select_contenders(backends, peers)
    if bits:
        skipped |= shorter_in_codes() | _without_codes(entries)
    models = {} if smoke else named_configs(configs)
    effort = SMOKE if smoke else Effort(slices, slice_seconds)
    console = new_console(to_errors=as_json)

    def show_rows(rows: list[Row], complete: bool) -> None:
        if rows:
            console.print(table_of(rows, complete), highlight=False)

    parts = planned(modes, models, entries, effort, smoke=smoke, bits=bits)
    units = [seconds for part in parts for seconds in part.seconds]
    duration = Duration(units)
    console.print(heading(machine(), load(), effort, duration.expected, len(units)), highlight=False)

    def line(what: str, done: int, total: int | None, pace: Pace) -> str:
        return f"{what} ({done} of {total} done, eta {clock(duration.left(done))})"

    with show_progress(console, "starting ...", line) as show:
        results = bench(modes, models, entries, skipped, effort, show, show_rows, smoke=smoke, bits=bits)
    for piece in closing(results):
        console.print(piece, highlight=False)
    if "experts" in modes and results.stopped is None:
        picture = out or Path("runs/expert_sweep.png")
        draw_sweep(results.rows, picture)
        print_lines(console, f"picture: {picture}")
    if as_json:
        print_json(results.to_json())
    if results.stopped is not None or results.failed:
        sys.exit(results.stopped or 1)


def _without_codes(entries: "dict[str, Entry]") -> dict[str, str]:
    """Remove the contenders that do not open mlx-lm's codes; return each with the reason."""
    removed = [name for name in entries if name.startswith("transformers")]
    for name in removed:
        del entries[name]
    return dict.fromkeys(removed, "does not open mlx-lm's codes")


def _bits(quantize: str | None, modes: "Sequence[Mode]") -> int:
    from moezoo.core.errors import SpecError
    from moezoo.core.huggingface.recipe import recipe_of_options

    if quantize is None:
        return 0
    if tuple(modes) != ("decode",):
        got = f"mode {modes[0]}" if len(modes) == 1 else "all modes"
        raise SpecError(f"--quantize is for decoding; got {got}. Use `moezoo bench decode --quantize {quantize}`.")
    recipe = recipe_of_options(quantize, None, None, None, None)
    assert recipe is not None
    return recipe.bits
