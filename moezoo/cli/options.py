"""Options that several commands share, and the options of a process group."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import click

from moezoo.cli.completion import PATH, complete_backend, complete_model
from moezoo.core.distributed.process_group import ProcessGroup
from moezoo.core.errors import BackendError, DataError

backend_option = click.option(
    "--backend",
    metavar="jax|mlx",
    shell_complete=complete_backend,
    help="Backend to use. Default: $BACKEND, else mlx on Apple silicon, else jax.",
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Override a value of the config; repeatable."
)
mesh_option = click.option(
    "--mesh", metavar="AXIS=N,...|FILE", help="Device mesh: number of devices per axis, or a YAML file."
)
devices_option = click.option(
    "--devices", type=click.IntRange(1), metavar="N", help="Number of devices, for a mesh axis that is auto."
)
overcommit_option = click.option(
    "--allow-overcommit", is_flag=True, help="Try what needs more memory than is free, with a warning."
)
adapter_option = click.option(
    "--adapter",
    type=PATH,
    metavar="FOLDER",
    shell_complete=complete_model,
    help="Adapter for the model: a run, or a folder of mlx-lm or PEFT.",
)
replay_option = click.option(
    "--replay", type=PATH, metavar="TRACE", help="Force the routing of a trace (moezoo trace) of the same data."
)
template_option = click.option(
    "--set-template",
    "template",
    metavar="NAME=VALUE",
    multiple=True,
    help="Variable of the chat template, such as enable_thinking=false; repeatable.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def template_variables(texts: Sequence[str]) -> dict[str, Any]:
    """Return the variables of `--set-template`; values are YAML. Raises DataError."""
    import yaml

    variables = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            if not (equals and name.isidentifier()):
                raise ValueError
            variables[name] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError):
            raise DataError(
                f"--set-template is {text!r}; expected NAME=VALUE, e.g. --set-template enable_thinking=false."
            ) from None
    return variables


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of sampling to a command."""
    options = (
        click.option(
            "--temperature", type=float, help="Sampling temperature; 0 is greedy. Default: the model's, or 0.8."
        ),
        click.option("--top-k", type=int, help="Sample from the k most probable tokens."),
        click.option("--top-p", type=float, help="Sample from the fewest tokens whose probabilities sum to p."),
        click.option("--min-p", type=float, help="Drop tokens less probable than this fraction of the most probable."),
        click.option("--repetition-penalty", type=float, help="Penalty on tokens that already occur; 1 is off."),
        click.option("--seed", type=int, default=0, show_default=True, help="Random seed."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def group_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a process group to a command, which receives them as `group`, and `startup_s`."""
    defaults = ProcessGroup("auto")
    timeout: dict[str, Any] = {"type": click.IntRange(1), "show_default": True, "metavar": "SECONDS"}
    options = (
        click.option(
            "--coordinator",
            metavar="HOST:PORT|auto",
            help="Address of the first JAX process; auto: detect SLURM, Kubernetes, Open MPI or Cloud TPU.",
        ),
        click.option("--num-processes", type=click.IntRange(1), metavar="N", help="Number of processes."),
        click.option("--process-id", type=click.IntRange(0), metavar="I", help="Index of this process (from 0)."),
        click.option(
            "--startup-timeout",
            default=defaults.startup_s,
            help="Time to wait for all processes to connect.",
            **timeout,
        ),
        click.option(
            "--heartbeat-timeout",
            default=defaults.heartbeat_s,
            help="Time after which a silent process counts as dead.",
            **timeout,
        ),
        click.option(
            "--shutdown-timeout",
            default=defaults.shutdown_s,
            help="Time to wait for the other processes at the end.",
            **timeout,
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
        **others: Any,
    ) -> None:
        timeouts = (startup_timeout, heartbeat_timeout, shutdown_timeout)
        if coordinator is None and (num_processes, process_id) != (None, None):
            raise BackendError(
                "--num-processes and --process-id need --coordinator; got none. Add --coordinator HOST:PORT with the "
                "address of the first process."
            )
        group = None if coordinator is None else ProcessGroup(coordinator, num_processes, process_id, *timeouts)
        command(group=group, startup_s=startup_timeout, **others)

    for option in reversed(options):
        with_group = option(with_group)
    return with_group
