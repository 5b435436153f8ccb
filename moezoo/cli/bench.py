"""`moezoo bench`."""

import sys
from pathlib import Path

import click

from moezoo.cli.options import json_option, new_console


@click.command("bench")
@click.argument("mode", required=False, metavar="[train|layer|decode|startup|experts]")
@click.option("--backend", "backends", metavar="jax,mlx", help="Default: those that are installed.")
@click.option("--config", "configs", metavar="S,M,FILE", default="S", show_default=True, help="Models to time.")
@click.option("--peers", metavar="NAME,...", help="Others to time: names, none, all. Default: installed and not slow.")
@click.option("--slices", type=click.IntRange(1), default=5, show_default=True, help="Turns of each contender.")
@click.option("--slice-seconds", type=click.FloatRange(0), default=1.0, show_default=True, help="Length of a turn.")
@click.option("--smoke", is_flag=True, help="Everything once, on a tiny model: does it work?")
@click.option("--out", type=Path, metavar="FILE", help="Picture of the sweep. Default: runs/expert_sweep.png.")
@json_option
def bench_command(
    mode: str | None,
    backends: str | None,
    configs: str,
    peers: str | None,
    slices: int,
    slice_seconds: float,
    smoke: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """How fast training, one mixture, decoding and starting are, as a share of what the machine allows.

    Without a mode, all of them. `experts`: the same active operations with 4 to 128 experts. Others (transformers with
    PyTorch, mlx-lm) take part where they are installed. With --json the tables go to standard error.
    """
    import json

    from rich.console import Console

    from moezoo.bench.contenders import chosen
    from moezoo.bench.measure import Effort
    from moezoo.bench.modes import MODES, bench, known_mode, named_configs
    from moezoo.bench.report import report
    from moezoo.bench.sweep_picture import draw_sweep

    modes = MODES if mode is None else (known_mode(mode),)
    entries, left_out = chosen(backends, peers)
    models = {} if smoke else named_configs(configs)
    errors = Console(stderr=True)
    with errors.status("starting ...") as status:
        results = bench(modes, models, entries, left_out, Effort(slices, slice_seconds), status.update, smoke=smoke)
    console = errors if as_json else new_console(width=120)
    for piece in report(results):
        console.print(piece, highlight=False)
    if "experts" in modes:
        picture = out or Path("runs/expert_sweep.png")
        draw_sweep(results.rows, picture)
        console.print(f"picture: {picture}", highlight=False, soft_wrap=True, markup=False)
    if as_json:
        click.echo(json.dumps(results.to_json(), indent=2))
    if results.failed:
        sys.exit(1)
