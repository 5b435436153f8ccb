"""`moezoo eval`."""

from pathlib import Path

import click

from moezoo.cli.data import prepare_with_progress
from moezoo.cli.options import backend_option, json_option, new_console
from moezoo.core.errors import DataError


@click.command("eval")
@click.argument("path", metavar="PATH", type=Path)
@click.option(
    "--data", metavar="FILE", help="A text, JSON lines, or token ids (.npy, .bin). Default: a run's own data."
)
@click.option("--sequence-length", type=click.IntRange(1), help="Default: that of the run, else 512.")
@click.option("--batch-size", type=click.IntRange(1), help="Windows at once.")
@backend_option
@json_option
def evaluate(
    path: Path,
    data: str | None,
    sequence_length: int | None,
    batch_size: int | None,
    backend: str | None,
    as_json: bool,
) -> None:
    """Loss, bits per byte and routing statistics of a model on held-out data.

    PATH is a run folder, or a Hugging Face folder or hub id with --data.
    """
    import json

    from moezoo.api import evaluate_file, load_model
    from moezoo.core.runs.run_folder import is_run
    from moezoo.core.training.evaluation import describe_evaluation, describe_routing, known_grammar
    from moezoo.core.training.evaluation import evaluate as run_evaluation

    console = new_console()
    if data is None and not is_run(path):
        raise DataError(f"{path} is no run folder, whose data is known; expected --data FILE, a text or token ids.")
    model = load_model(path, backend)
    for problem in model.problems:
        click.echo(problem, err=True)
    with console.status("evaluating ...") as status:

        def show(what: str, done: int, total: int | None) -> None:
            status.update(f"{what}: {done:,} of {total or 0:,} windows")

        if data is not None:
            result = evaluate_file(
                model, data, sequence_length=sequence_length, batch_size=batch_size, on_progress=show
            )
        else:
            config = model.config
            prepared = prepare_with_progress(console, config, str(path), model.tokenizer, quiet=True)
            result = run_evaluation(
                model.model,
                prepared.validation,
                model.tokenizer,
                sequence_length=sequence_length or config.training.sequence_length,
                batch_size=batch_size or config.training.batch_size,
                grammar=known_grammar(config.data),
                on_progress=show,
            )
    if as_json:
        click.echo(json.dumps({"path": str(path), "data": data, "step": model.step, **result.to_dict()}, indent=2))
        return
    what = f"step {model.step}" if data is None else data
    for line in (f"{what}: {describe_evaluation(result)}", *describe_routing(result)):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
