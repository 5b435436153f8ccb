"""`moezoo plot`."""

from pathlib import Path

import click

from moezoo.cli.completion import PATH, complete_model
from moezoo.cli.options import json_option
from moezoo.cli.output import print_report, warn
from moezoo.core.errors import RunError


@click.command("plot")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=PATH, shell_complete=complete_model)
@click.option(
    "--out", default=Path("plot.png"), show_default=True, type=PATH, metavar="FILE.png", help="Picture to write."
)
@json_option
def plot(runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Plot runs over each other, and list the config fields in which they differ.

    The picture has losses with validation, each weighted loss term, expert load, MaxVio, entropy of the load, dropped
    assignments and tokens/s. Runs may still be training.
    """
    from moezoo.core.reports.run_table import read_runs
    from moezoo.core.reports.runs_picture import draw_runs

    if out.suffix.lower() != ".png":
        raise RunError(
            f"--out is no PNG; got {str(out)!r}; expected a file name that ends in .png. Choose such a name."
        )
    report = read_runs(runs)
    warn(*report.problems)
    draw_runs(report, out)
    print_report(report, report.page, as_json)
    warn(f"picture: {out}")
