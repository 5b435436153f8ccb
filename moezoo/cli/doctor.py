"""`moezoo doctor`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moezoo.cli.completion import PATH, complete_model
from moezoo.cli.options import backend_option, json_option
from moezoo.cli.output import new_console, print_json, print_lines, show_progress
from moezoo.core.errors import MoezooError
from moezoo.core.progress import Pace

if TYPE_CHECKING:
    from moezoo.core.backend import Backend
    from moezoo.core.doctor.finding import Diagnosis

_WINDOWS, _LENGTH = 16, 256


@click.command("doctor")
@click.argument("path", metavar="PATH", type=PATH, shell_complete=complete_model)
@click.option("--quick", is_flag=True, help="Read configs, metrics and headers only, no tensors.")
@click.option("--forward", is_flag=True, help="Also load the model and run it on some tokens.")
@backend_option
@json_option
def doctor(path: Path, quick: bool, forward: bool, backend: str | None, as_json: bool) -> None:
    """Find out what is wrong with a run or a checkpoint.

    PATH is a run folder, the folder of one of its checkpoints, or a Hugging Face folder or hub id. Without --forward,
    no model is built. The exit status is 0 if nothing is found, and 1 otherwise.
    """
    from moezoo.core.doctor.environment import environment
    from moezoo.core.doctor.examine import examine

    console = new_console(to_errors=as_json)
    with show_progress(console, "reading ...", _line) as show:
        found = examine(path, quick=quick, on_progress=show)
    if forward:
        _forward(path, backend, found)
    loaded = _loaded(backend, found)
    found.environment = environment("none" if loaded is None else loaded.name, {} if loaded is None else loaded.facts())
    if as_json:
        print_json(found.to_json())
    else:
        print_lines(console, *found.lines())
    if not found.is_healthy:
        raise click.exceptions.Exit(1)


def _line(what: str, done: int, total: int | None, pace: Pace) -> str:
    return f"{what}: {done:,} of {total or 0:,}, eta {pace.eta(done, total)}"


def _loaded(name: str | None, found: "Diagnosis") -> "Backend | None":
    """Return the backend; one that cannot be loaded is a finding, unless it was asked for."""
    from moezoo.backends import load_backend
    from moezoo.core.doctor.finding import Finding

    try:
        return load_backend(name, for_training=False)
    except MoezooError as error:
        if name is not None:
            raise
        why = "Models cannot be trained or run here."
        found.add(
            "backend", [Finding("fault", "backend", str(error), "this machine", why, "Install one of the extras.")]
        )
        return None


def _forward(path: Path, backend: str | None, found: "Diagnosis") -> None:
    """Add findings of a forward pass over a run's validation data, or over random tokens."""
    import numpy as np

    from moezoo.api import load_model
    from moezoo.cli.data import prepare_with_progress
    from moezoo.core.data.evaluation_windows import evaluation_batches
    from moezoo.core.doctor.forward_pass import RANDOM, forward_findings
    from moezoo.core.runs.run_folder import is_run

    loaded = load_model(path, backend)
    spec, training = loaded.config.model, loaded.config.training
    if is_run(path):
        console = new_console(to_errors=True)
        prepared = prepare_with_progress(console, loaded.config, str(path), loaded.tokenizer, quiet=True)
        _, batches = evaluation_batches(
            prepared.validation,
            loaded.tokenizer,
            spec.num_logits,
            sequence_length=training.sequence_length,
            batch_size=_WINDOWS,
            max_windows=_WINDOWS,
            first_token=loaded.first_token,
        )
        tokens, data = next(batches).inputs, "the run's validation data"
    else:
        shape = (_WINDOWS, min(_LENGTH, training.sequence_length))
        tokens, data = np.random.default_rng(0).integers(0, spec.num_logits, shape).astype(np.int32), RANDOM
    found.add("forward pass", list(forward_findings(spec, loaded.model, tokens, data)))
