"""`moezoo parity` and `moezoo zoo`."""

import sys
from pathlib import Path

import click

from moezoo.cli.completion import PATH, complete_config_or_model
from moezoo.cli.options import adapter_option, json_option, replay_option
from moezoo.cli.output import new_console, warn


@click.command()
@click.argument("path", metavar="PATH", type=PATH, shell_complete=complete_config_or_model)
@replay_option
@adapter_option
@json_option
@click.option("--all", "show_all", is_flag=True, help="Show all gradients.")
def parity(path: Path, replay: Path | None, adapter: Path | None, as_json: bool, show_all: bool) -> None:
    """Compare reference, JAX and MLX on the same weights and tokens.

    PATH is a YAML config (initial weights), a run folder, or a Hugging Face folder or hub id. The exit status is 1 if a
    difference exceeds its tolerance.
    """
    import moezoo
    from moezoo.core.traces.trace_file import open_trace

    trace = None if replay is None else open_trace(replay)
    report = moezoo.parity(path, adapter=adapter, replay=trace)
    if as_json:
        click.echo(report.to_json())
    else:
        new_console().print(report.table(show_all=show_all))
    if not report.passed:
        sys.exit(1)


@click.command()
@click.argument("folder", metavar="[CONFIGS]", type=PATH, required=False)
@json_option
@click.option("--list", "only_list", is_flag=True, help="List only, without parity checks.")
@click.option("--out", type=PATH, metavar="FILE", help="Also write the table to a Markdown file.")
def zoo(folder: Path | None, as_json: bool, only_list: bool, out: Path | None) -> None:
    """List all model parts with source, example config and parity.

    CONFIGS is a folder of YAML configs; by default, the tiny ones that ship with moezoo. The exit status is 1 if a part
    has no config or a parity check fails.
    """
    import moezoo
    from moezoo.core.config.shipped import SHIPPED
    from moezoo.core.files import write_atomically
    from moezoo.core.parity.zoo import zoo as make_zoo
    from moezoo.core.progress import Pace

    pace = Pace()

    def show(what: str, done: int, total: int | None) -> None:
        if not only_list:
            click.echo(f"{done + 1}/{total}  eta {pace.eta(done, total)}  {what}", err=True)

    table = make_zoo(folder or SHIPPED / "tiny", None if only_list else moezoo.parity, show)
    if out is not None:
        write_atomically(out, table.markdown())
    if as_json:
        click.echo(table.to_json())
    else:
        new_console().print(table.table())
    if table.passed is False:
        failed = ", ".join(config.name for config in table.configs if config.passed is False)
        warn(f"parts without a config: {', '.join(table.missing) or 'none'}; parity failures: {failed or 'none'}")
        sys.exit(1)
