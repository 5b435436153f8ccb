"""Options that several commands have, and those of a process that is one of several."""

import sys
from typing import TYPE_CHECKING, Any

import click

from moezoo.core.distributed.process_group import ProcessGroup

if TYPE_CHECKING:
    from rich.console import Console


import functools
from collections.abc import Callable

from moezoo.core.errors import BackendError

backend_option = click.option(
    "--backend", metavar="jax|mlx", help="Default: $BACKEND, else mlx on Apple silicon, else jax."
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Override a value of the config."
)
mesh_option = click.option(
    "--mesh", metavar="AXIS=N,...|FILE", help="Devices along each axis, or a YAML file that says so."
)
devices_option = click.option("--devices", type=click.IntRange(1), metavar="N", help="How many there are.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def group_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of a process that is one of several, as one argument `group`."""
    seconds = click.IntRange(1)
    given = ProcessGroup("auto")
    options = (
        click.option("--coordinator", metavar="HOST:PORT|auto", help="The first process; auto: as the cluster says."),
        click.option("--num-processes", type=click.IntRange(1), metavar="N", help="How many there are."),
        click.option("--process-id", type=click.IntRange(0), metavar="I", help="Which this is, from 0."),
        click.option("--startup-timeout", type=seconds, default=given.startup_s, show_default=True, metavar="SECONDS"),
        click.option(
            "--heartbeat-timeout",
            type=seconds,
            default=given.heartbeat_s,
            show_default=True,
            metavar="SECONDS",
            help="After so long a silent process counts as dead.",
        ),
        click.option(
            "--shutdown-timeout", type=seconds, default=given.shutdown_s, show_default=True, metavar="SECONDS"
        ),
    )

    @functools.wraps(command)
    def with_group(
        coordinator: str | None,
        num_processes: int | None,
        process_id: int | None,
        startup_timeout: int,
        heartbeat_timeout: int,
        shutdown_timeout: int,
        **given: Any,
    ) -> None:
        timeouts = (startup_timeout, heartbeat_timeout, shutdown_timeout)
        if coordinator is None and (num_processes, process_id) != (None, None):
            raise BackendError("--num-processes and --process-id need --coordinator HOST:PORT, of the first process.")
        group = None if coordinator is None else ProcessGroup(coordinator, num_processes, process_id, *timeouts)
        command(group=group, **given)

    for option in reversed(options):
        with_group = option(with_group)
    return with_group


def new_console(width: int = 100, *, quiet: bool = False) -> "Console":
    from rich.console import Console

    return Console(quiet=quiet) if sys.stdout.isatty() else Console(width=width, quiet=quiet)
