"""`moezoo eval`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moezoo.cli.completion import PATH, complete_file, complete_model
from moezoo.cli.data import prepare_with_progress
from moezoo.cli.options import adapter_option, backend_option, json_option, overcommit_option, replay_option
from moezoo.cli.output import new_console, print_json, print_lines, show_progress, warn
from moezoo.core.errors import DataError
from moezoo.core.progress import Pace

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from moezoo.api import LoadedModel
    from moezoo.core.backend import Model
    from moezoo.core.data.grammar.grammar import Grammar
    from moezoo.core.data.prepare import AnySplit
    from moezoo.core.data.tokenizers import Tokenizer
    from moezoo.core.interventions.changes import Changes
    from moezoo.core.interventions.masks import Mode
    from moezoo.core.progress import Progress
    from moezoo.core.spec import ModelSpec
    from moezoo.core.traces.replay import Replay
    from moezoo.core.training.evaluation import Evaluation

Result = TypeVar("Result")


@click.command("eval")
@click.argument("path", metavar="PATH", type=PATH, shell_complete=complete_model)
@click.option(
    "--data",
    metavar="FILE",
    shell_complete=complete_file,
    help="Text, JSON lines, or token ids (.npy, .bin). Default: the run's data.",
)
@click.option("--sequence-length", type=click.IntRange(1), help="Sequence length. Default: the run's, or 512.")
@click.option("--batch-size", type=click.IntRange(1), help="Batch size. Default: the run's, less for large logits.")
@click.option("--windows", type=click.IntRange(1), metavar="N", help="Score N windows, spread evenly. Default: all.")
@click.option(
    "--without",
    multiple=True,
    metavar="EXPERTS",
    help='Do without experts: "layers[3].experts[5,7]"; also ranges 0-3, *, and several names separated by ;.',
)
@click.option(
    "--mode",
    type=click.Choice(["silence", "reroute"]),
    help="Without an expert: its weight is 0 (silence, the default), or others are chosen instead (reroute).",
)
@click.option("--importance", is_flag=True, help="Loss without each expert in turn: of --without, or of all.")
@click.option("--top-k", type=click.IntRange(1), metavar="K", help="Experts per token. Default: the model's own.")
@replay_option
@adapter_option
@backend_option
@overcommit_option
@json_option
def evaluate(
    path: Path,
    data: str | None,
    sequence_length: int | None,
    batch_size: int | None,
    windows: int | None,
    without: tuple[str, ...],
    mode: "Mode | None",
    importance: bool,
    top_k: int | None,
    replay: Path | None,
    adapter: Path | None,
    backend: str | None,
    allow_overcommit: bool,
    as_json: bool,
) -> None:
    """Evaluate loss, bits per byte and expert load on held-out data.

    PATH is a run folder, or one of its checkpoints; with --data also a Hugging Face folder or hub id.
    """
    from moezoo.api import evaluate_file, load_model
    from moezoo.core.interventions.changes import change_values, describe_change
    from moezoo.core.interventions.importance import describe_importance, importance_values
    from moezoo.core.runs.run_folder import is_run
    from moezoo.core.training.evaluation import describe_evaluation, describe_routing, known_grammar

    console = new_console()
    if data is None and not is_run(path):
        raise DataError(f"{path} is not a run folder, so it has no data; expected --data FILE, a text or token ids.")
    if mode is not None and not (without or importance):
        raise DataError(f"--mode {mode} has no experts to apply to; expected --without or --importance. Add one.")
    if replay is not None and (without or importance):
        raise DataError("--replay forces the experts that --without and --importance leave out. Use one of them.")
    model = load_model(path, backend, adapter=adapter, top_k=top_k, allow_overcommit=allow_overcommit)
    warn(*model.problems)
    grammar = known_grammar(model.config.data) if data is None else None
    measure = _measure(model.model.spec, without, mode or "silence", importance, grammar, _replay(model, replay, data))
    sizes = {"sequence_length": sequence_length, "batch_size": batch_size, "max_windows": windows}
    with show_progress(console, "evaluating ...", _windows_line) as show:
        if data is not None:
            result, changes = evaluate_file(model, data, measure, **sizes, on_progress=show, on_message=warn)
        else:
            result, changes = _measured_on_run(console, path, model, measure, **sizes, on_progress=show)
    if not math.isfinite(result.validation_loss):
        raise DataError(
            f"the loss on {data or 'the data of the run'} is {result.validation_loss}: {path} computes NaN or "
            f"infinity; expected a number. `moezoo doctor {path} --forward` finds where it starts."
        )
    if as_json:
        values = {"path": str(path), "data": data, "step": model.step, **result.to_dict()}
        if changes is not None:
            values |= {"importance": importance_values(changes)} if importance else {"without": change_values(changes)}
        print_json(values)
        return
    what = (f"step {model.step}" if data is None else data) + ("" if top_k is None else f", top_k {top_k}")
    print_lines(console, f"{what}: {describe_evaluation(result)}", *describe_routing(result))
    if changes is not None:
        print_lines(console, *(describe_importance(changes) if importance else [describe_change(changes)]))


def _measure(
    spec: "ModelSpec",
    without: tuple[str, ...],
    mode: "Mode",
    importance: bool,
    grammar: "Grammar | None",
    replay: "Replay | None",
) -> "Callable[..., tuple[Evaluation, Changes | None]]":
    """Return a function that evaluates a model: without experts, or with all of them and without each in turn."""
    from moezoo.core.interventions.changes import loss_changes
    from moezoo.core.interventions.experts import EVERY_EXPERT, parse_experts
    from moezoo.core.interventions.importance import each_expert, ranked
    from moezoo.core.interventions.masks import expert_masks
    from moezoo.core.training.evaluation import evaluate

    experts = parse_experts(spec, without or [EVERY_EXPERT]) if without or importance else {}
    masks = expert_masks(spec, experts, mode) if without and not importance else None
    sets = each_expert(experts) if importance else [experts] if without else []

    def measure(
        model: "Model", split: "AnySplit", tokenizer: "Tokenizer", **options: Any
    ) -> "tuple[Evaluation, Changes | None]":
        result = evaluate(model, split, tokenizer, **options, grammar=grammar, without=masks, replay=replay)
        if not sets:
            return result, None
        changes = loss_changes(model, split, tokenizer, sets, **options, mode=mode)
        return result, ranked(changes) if importance else changes

    return measure


def _replay(model: "LoadedModel", path: Path | None, data: str | None) -> "Replay | None":
    """Open a trace to replay: of a file the domain of its name, or the only one; of a run's data all in order."""
    from moezoo.core.traces.replay import Replay
    from moezoo.core.traces.trace_data import named_file
    from moezoo.core.traces.trace_file import open_trace

    names = None if data is None else [named_file(data)[0]]
    return None if path is None else Replay(open_trace(path), model.model.spec, names)


def _windows_line(what: str, done: int, total: int | None, pace: Pace) -> str:
    return f"{what}: {done:,} of {total or 0:,} windows, eta {pace.eta(done, total)}"


def _measured_on_run(
    console: "Console",
    path: Path,
    model: "LoadedModel",
    measure: "Callable[..., Result]",
    *,
    sequence_length: int | None,
    batch_size: int | None,
    max_windows: int | None,
    on_progress: "Progress",
) -> "Result":
    """Measure a run on its own validation data."""
    from moezoo.core.runs.run_data import changed_data
    from moezoo.core.runs.run_folder import run_of

    config = model.config
    prepared = prepare_with_progress(console, config, str(path), model.tokenizer, quiet=True)
    warn(*changed_data(run_of(path), prepared.summary))
    length, batch = sequence_length or config.training.sequence_length, batch_size or config.training.batch_size
    model.check_scoring(prepared.validation.num_tokens, batch, length)
    return measure(
        model.model,
        prepared.validation,
        model.tokenizer,
        sequence_length=length,
        batch_size=batch,
        max_windows=max_windows,
        on_progress=on_progress,
    )
