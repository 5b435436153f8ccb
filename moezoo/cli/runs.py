"""`moezoo runs`."""

from pathlib import Path

import click

from moezoo.cli.completion import PATH
from moezoo.cli.options import json_option
from moezoo.cli.output import print_report, warn


@click.command("runs")
@click.argument("folder", default="runs", type=PATH)
@json_option
def runs_command(folder: Path, as_json: bool) -> None:
    """List the runs below FOLDER (default: runs), the last updated first.

    A run is running, finished, stopped (also by a kill), or damaged. --json adds the command, version, devices and data
    of the last process that trained it.
    """
    from moezoo.core.reports.run_list import list_runs

    report = list_runs(folder)
    warn(*report.problems)
    print_report(report, report.page, as_json)
