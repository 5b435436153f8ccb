"""The command line. Each command imports what it needs when it runs, so that `moezoo --help` is quick."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moezoo.cli_options import (
    backend_option,
    devices_option,
    group_options,
    json_option,
    mesh_option,
    set_option,
)
from moezoo.core.distributed.process_group import ProcessGroup, end
from moezoo.core.errors import DataError, MoezooError, RunError, SpecError

if TYPE_CHECKING:
    from rich.console import Console

    from moezoo.core.config.run_config import Config
    from moezoo.core.data.prepare import PreparedData
    from moezoo.core.data.tokenizers import Tokenizer


class _Commands(click.Group):
    """Prints our errors in one line, in the order in which commands are used."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MoezooError as error:
            for line in str(error).splitlines():
                click.echo(f"{type(error).__name__}: {line}", err=True)
            end(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            end(130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="moezoo")
def main() -> None:
    """Mixture-of-experts language models: one spec, on JAX and on MLX, proven equal."""


@main.command()
@click.argument("config_path", metavar="CONFIG", type=Path)
@backend_option
@click.option("--out", type=Path, metavar="RUN", help="Run folder. Default: runs/<config name>.")
@set_option
@mesh_option
@click.option("--resume", is_flag=True, help="Go on with the run in the run folder.")
@group_options
def train(
    config_path: Path,
    backend: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    mesh: str | None,
    resume: bool,
    group: ProcessGroup | None,
) -> None:
    """Train a model from a YAML config.

    With --coordinator as one of several JAX processes, all of which are given the same command.
    """
    from moezoo.backends import load_backend
    from moezoo.core.config.mesh_option import load_mesh
    from moezoo.core.config.run_config import load_config
    from moezoo.core.config.vocabulary import with_vocab_size
    from moezoo.core.console import ConsoleReporter
    from moezoo.core.data.tokenizers import load_tokenizer
    from moezoo.core.distributed.processes import first_then_others
    from moezoo.core.reports.model_page import header
    from moezoo.core.reports.run_picture import draw_run
    from moezoo.core.runs.init_from import check_start, initial_tokenizer, load_resolved_config
    from moezoo.core.runs.run_folder import create_run, is_run, open_run
    from moezoo.core.training.evaluation import describe_evaluation
    from moezoo.core.training.loop import train as run_training

    path = out or Path("runs") / config_path.stem
    begun = load_config(path / "config.yaml") if resume and is_run(path) else None
    config = load_resolved_config(config_path, overrides, begun=begun)
    if mesh is not None:
        config = config.model_copy(update={"mesh": load_mesh(mesh)})
    realized = load_backend(backend, config.mesh, group)
    is_first = realized.processes.is_first
    console = _console(quiet=not is_first)
    known = initial_tokenizer(config) if begun is None else load_tokenizer(path)
    data = first_then_others(realized, lambda: _prepare(console, config, str(config_path), known))
    config = with_vocab_size(config, data.tokenizer.vocab_size, str(config_path))
    if begun is None:
        check_start(config)
    run = first_then_others(
        realized,
        lambda: create_run(path, config, data.tokenizer, resume=resume) if is_first else open_run(path),
    )
    console.print(header(config, {"backend": realized.name, **realized.facts(), "run": str(path)}))
    for row in data.summary:
        console.print(
            f"{row.source}: {row.train_tokens:,} training and {row.validation_tokens:,} validation tokens",
            highlight=False,
        )
    result = run_training(config, data, realized, run, reporter=ConsoleReporter(console))
    realized.leave()
    if not is_first:
        return
    optimum = result.evaluation.optimum if result.evaluation else None
    draw_run(run.metrics_path, run.picture_path, optimum.entropy_rate if optimum else None)
    if result.evaluation is None:
        console.print(
            f"stopped and saved after step {result.step} of {config.training.steps}. Go on with:\n"
            f"  {_again(config_path, backend, out, overrides, mesh)}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
        return
    console.print(describe_evaluation(result.evaluation), highlight=False, soft_wrap=True, markup=False)
    console.print(f"run folder: {path}  (picture: {run.picture_path})", highlight=False, soft_wrap=True, markup=False)


@main.command("launch", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--nproc", type=click.IntRange(1), required=True, metavar="N", help="How many processes.")
@click.argument("words", metavar="COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
def launch_command(nproc: int, words: tuple[str, ...]) -> None:
    """Run `train` as N processes on this machine, each with a part of every batch.

    For example: moezoo launch --nproc 2 train CONFIG --backend mlx, or --backend jax --mesh data=auto. When one
    process ends with an error, all do.
    """
    from moezoo.backends import default_backend
    from moezoo.core.distributed.launch import launch

    if words[0] != "train":
        raise RunError(f"launch runs `train`, which alone divides its work; got {words[0]!r}. Run that by itself.")
    given = [
        word.partition("=")[2] or following
        for word, following in zip(words, [*words[1:], ""], strict=True)
        if word.partition("=")[0] == "--backend"
    ]
    launch(nproc, words, given[-1] if given else default_backend())


@main.command()
@click.argument("path", metavar="PATH", type=Path)
@click.option("--prompt", "prompts", metavar="TEXT", multiple=True, help="The text to continue. Repeat it for several.")
@click.option("--chat", is_flag=True, help="The prompt is a message; answer it, by the tokenizer's chat template.")
@click.option("--tokens", metavar="ID,ID,...", help="Token ids to continue, instead of a text; prints ids.")
@backend_option
@click.option("--compute", metavar="float32|bfloat16", help="Dtype of activations. Default: the model's own.")
@click.option("--max-length", type=click.IntRange(1), help="Tokens in all, where a rotation depends on it (longrope).")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Default: what PATH says, else 256.")
@click.option("--temperature", type=float, help="0 is greedy. Default: what PATH says, else 0.8.")
@click.option("--top-k", type=int, help="Keep the k most probable tokens.")
@click.option("--top-p", type=float, help="Keep the fewest tokens that hold this probability.")
@click.option("--min-p", type=float, help="Keep tokens at least this fraction as probable as the best.")
@click.option("--repetition-penalty", type=float, help="Above 1: tokens that are already there are less likely.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Continue so many times at once.")
def generate(
    path: Path,
    prompts: tuple[str, ...],
    chat: bool,
    tokens: str | None,
    backend: str | None,
    compute: str | None,
    max_length: int | None,
    max_new_tokens: int | None,
    samples: int,
    **options: Any,
) -> None:
    """Continue prompts with a model: a run folder, a Hugging Face folder or hub id.

    A Hugging Face model samples as its generation_config.json says, unless an option says otherwise.
    """
    import numpy as np

    from moezoo.api import load_model
    from moezoo.core.generation.config import GenerationConfig
    from moezoo.core.generation.loop import Continuation

    GenerationConfig().options(**options)  # refuse bad options before anything is loaded
    if bool(prompts) == (tokens is not None) or (chat and not prompts):
        raise DataError(
            "generate needs a prompt; expected --prompt TEXT, with or without --chat, or --tokens ID,ID,..."
        )
    given = None if tokens is None else _token_ids(tokens)
    model = load_model(path, backend, compute, max_length)
    for problem in model.problems:
        click.echo(problem, err=True)
    for name in model.generation.unknown:
        click.echo(f"{model.generation.where}: {name} is not known, and has no effect", err=True)
    if given is None:
        rows = [model.encode_prompt(prompt, chat=chat) for prompt in prompts for _ in range(samples)]
        texts = ["" if chat else prompt for prompt in prompts for _ in range(samples)]
    else:
        rows, texts = [np.array(given)] * samples, [",".join(map(str, given))] * samples
    if any(row.size == 0 for row in rows):
        raise DataError("--prompt is empty; expected at least one token to continue. Give some text.")
    said = [Continuation(model.tokenizer if given is None else None, row, model.generation.end_tokens) for row in rows]

    def show(column: Any) -> None:
        for index, token in enumerate(column):
            piece = said[index].add(int(token))
            texts[index] += piece
            if len(rows) == 1:
                click.echo(piece, nl=False)

    if len(rows) == 1:
        click.echo(texts[0], nl=False)
    if options["temperature"] is None and model.generation.temperature is None:
        options["temperature"] = 0.8
    new_tokens = model.generation.new_tokens(max_new_tokens, max(len(row) for row in rows), 256)
    model.generate(rows, max_new_tokens=new_tokens, on_tokens=show, **options)
    endings = [one.finish() for one in said]
    if len(rows) == 1:
        click.echo(endings[0])
        return
    for index, (text, ending) in enumerate(zip(texts, endings, strict=True)):
        click.echo(f"--- sample {index + 1}\n{text}{ending}")


@main.command("eval")
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

    console = _console()
    if data is None and not is_run(path):
        raise DataError(f"{path} is no run folder, whose data is known; expected --data FILE, a text or token ids.")
    model = load_model(path, backend)
    for problem in model.problems:
        click.echo(problem, err=True)
    with console.status("evaluating ...") as status:

        def show(done: int, total: int) -> None:
            status.update(f"evaluating: {done:,} of {total:,} windows")

        if data is not None:
            result = evaluate_file(
                model, data, sequence_length=sequence_length, batch_size=batch_size, on_progress=show
            )
        else:
            config = model.config
            prepared = _prepare(console, config, str(path), model.tokenizer, quiet=True)
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


@main.command()
@click.argument("path", metavar="PATH", type=Path)
@set_option
@mesh_option
@devices_option
@json_option
def describe(path: Path, overrides: tuple[str, ...], mesh: str | None, devices: int | None, as_json: bool) -> None:
    """A model on one page: layers, parameters, FLOPs, memory.

    PATH is a YAML config, a run folder, or a Hugging Face folder or hub id, of which config.json is enough: then also
    what was understood of it, and what becomes of every tensor. With --mesh: where each parameter lies on so many
    devices instead, and how many bytes of it one of them has.
    """
    import json

    from moezoo.core.config.mesh_option import load_mesh
    from moezoo.core.config.vocabulary import spec_with_vocab_size
    from moezoo.core.reports.mesh_page import mesh_description, mesh_page
    from moezoo.core.reports.model_page import describe as page
    from moezoo.core.reports.model_page import description
    from moezoo.core.runs.init_from import load_resolved_config
    from moezoo.core.runs.open import checkpoint_folder, describe_model, is_config
    from moezoo.core.runs.run_folder import is_run

    if mesh is None and devices is not None:
        raise SpecError(f"--devices {devices} says how many a mesh has; got no --mesh. Add --mesh data=auto, say.")
    if mesh is not None:
        known_config = is_config(path) or is_run(path)
        config = (
            load_resolved_config(path if is_config(path) else path / "config.yaml", overrides) if known_config else None
        )
        spec, assumed = (describe_model(path)[0], None) if config is None else spec_with_vocab_size(config)
        if assumed:
            click.echo(f"assumed: {assumed}", err=True)
        lying = mesh_description(spec, load_mesh(mesh), devices)
        shown = lying if as_json else mesh_page(lying)
    elif is_config(path) or is_run(path):
        config = load_resolved_config(path if is_config(path) else path / "config.yaml", overrides)
        shown = description(config) if as_json else page(config, str(path))
    else:
        from moezoo.core.reports.checkpoint_page import checkpoint_description, checkpoint_page

        if overrides:
            raise SpecError(f"--set overrides values of a YAML config; got {path}; expected one, or no --set.")
        folder = checkpoint_folder(path, weights=False)
        shown = checkpoint_description(folder) if as_json else checkpoint_page(folder, str(path))
    if as_json:
        click.echo(json.dumps(shown, indent=2))
    else:
        _console().print(shown)


@main.command("plan")
@click.argument("config_path", metavar="CONFIG", type=Path)
@set_option
@mesh_option
@devices_option
@click.option("--memory", metavar="80GiB", help="Of a device: does the step fit?")
@click.option("--formula", is_flag=True, help="Compile nothing.")
@click.option("--topology", metavar="v5e:16x16", help="TPU chips to compile for, where libtpu is installed.")
@json_option
def plan_command(
    config_path: Path,
    overrides: tuple[str, ...],
    mesh: str | None,
    devices: int | None,
    memory: str | None,
    formula: bool,
    topology: str | None,
    as_json: bool,
) -> None:
    """A training step on devices that are not there: memory, operations, and what travels.

    By formula, beside what XLA makes of the step: on this mesh if it has 256 devices or fewer, else on a smaller one
    with the same axes. Deep models are compiled in part. No weights are made. With --topology, beside the memory that
    the compiler for TPUs gives it.
    """
    import json

    from moezoo.backends import load_planner
    from moezoo.core.config.mesh_option import load_mesh
    from moezoo.core.config.vocabulary import spec_with_vocab_size
    from moezoo.core.cost.make_plan import make_plan
    from moezoo.core.reports.plan_page import plan_page
    from moezoo.core.reports.text import memory_bytes
    from moezoo.core.runs.init_from import load_resolved_config

    config = load_resolved_config(config_path, overrides)
    spec, assumed = spec_with_vocab_size(config)
    config = config.model_copy(update={"model": spec, "mesh": config.mesh if mesh is None else load_mesh(mesh)})
    limit = None if memory is None else memory_bytes(memory)
    planner = None if formula and topology is None else load_planner()
    known = make_plan(config, devices, limit, planner=planner, topology=topology)
    if assumed:
        click.echo(f"assumed: {assumed}", err=True)
    if as_json:
        click.echo(json.dumps(known, indent=2))
    else:
        _console().print(plan_page(known, str(config_path)))


@main.command()
@click.argument("path", metavar="PATH", type=Path)
@json_option
@click.option("--all", "show_all", is_flag=True, help="Show every gradient.")
def parity(path: Path, as_json: bool, show_all: bool) -> None:
    """Compare reference, JAX and MLX on the same weights and tokens. Exit status 1 beyond tolerance.

    PATH is a YAML config (initial weights), a run folder, or a Hugging Face folder or hub id.
    """
    import moezoo

    report = moezoo.parity(path)
    if as_json:
        click.echo(report.to_json())
    else:
        _console().print(report.table(show_all=show_all))
    if not report.passed:
        sys.exit(1)


@main.command("convert")
@click.argument("path", metavar="PATH", type=Path)
@click.argument("out", metavar="OUT", type=Path)
@click.option("--whole", is_flag=True, help="A run into a run: its newest checkpoint in whole safetensors files.")
@json_option
def convert_command(path: Path, out: Path, whole: bool, as_json: bool) -> None:
    """Turn a Hugging Face checkpoint into a run folder, or a run into a Hugging Face checkpoint.

    Every tensor is accounted for; unchanged weights come back bit for bit.
    """
    import json
    import time

    from moezoo.core.huggingface.ledger import ledger_text
    from moezoo.core.runs.convert import convert
    from moezoo.core.runs.save import copy_whole

    if whole:
        step, notes = copy_whole(path, out)
        if as_json:
            click.echo(json.dumps({"format": "moezoo", "step": step, "notes": notes}, indent=2))
            return
        for note in notes:
            click.echo(note, err=True)
        click.echo(f"step {step}, weights and moments in whole files: {out}")
        return
    started = time.monotonic()
    interactive = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        eta = (time.monotonic() - started) / done * (total - done)
        if interactive:
            click.echo(f"\r{done}/{total} parameters, eta {eta:.0f} s ", nl=done == total, err=True)

    result = convert(path, out, show)
    if as_json:
        entries = [{**vars(entry), "shape": list(entry.shape)} for entry in result.ledger.entries]
        click.echo(json.dumps({"format": result.format, "tensors": entries, "notes": result.notes}, indent=2))
        return
    click.echo(ledger_text(result.ledger))
    for note in result.notes:
        click.echo(note, err=True)
    counts = ", ".join(f"{count} {status}" for status, count in result.ledger.counts().items())
    click.echo(f"{counts}; none dropped. Written as {result.format}: {out}")


@main.command()
@click.argument("folder", metavar="[CONFIGS]", type=Path, default=Path("configs/tiny"))
@json_option
@click.option("--list", "only_list", is_flag=True, help="Leave the parity checks out.")
@click.option("--out", type=Path, metavar="FILE", help="Write the table as Markdown too.")
def zoo(folder: Path, as_json: bool, only_list: bool, out: Path | None) -> None:
    """Every part: its source, a config that shows it, and whether all realizations agree."""
    import time

    import moezoo
    from moezoo.core.files import write_atomically
    from moezoo.core.parity.zoo import zoo as make_zoo

    started = time.monotonic()

    def show(done: int, total: int, name: str) -> None:
        if not only_list:
            eta = f"eta {(time.monotonic() - started) / done * (total - done):.0f} s" if done else "eta unknown"
            click.echo(f"{done + 1}/{total}  {eta}  {name}", err=True)

    table = make_zoo(folder, None if only_list else moezoo.parity, show)
    if out is not None:
        write_atomically(out, table.markdown())
    if as_json:
        click.echo(table.to_json())
    else:
        _console().print(table.table())
    if table.passed is False:
        failed = ", ".join(config.name for config in table.configs if config.passed is False)
        click.echo(f"shown by no config: {', '.join(table.missing) or 'none'}; differ: {failed or 'none'}", err=True)
        sys.exit(1)


@main.command()
def schema() -> None:
    """JSON Schema of a config, for editors that complete YAML."""
    import json

    from moezoo.core.config.run_config import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@main.command("bench")
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
    console = errors if as_json else _console(width=120)
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


@main.command()
@click.argument("name", required=False)
@click.option("--file", type=Path, help="A copy that you already have; its checksum is verified.")
def data(name: str | None, file: Path | None) -> None:
    """Bring a dataset to this machine, verified; without NAME, list them."""
    from moezoo.core.data.datasets import fetch, list_recipes

    if name is None:
        for recipe in list_recipes():
            click.echo(f"{recipe.name:20} {recipe.characters:>10,} characters  {recipe.licence:28} {recipe.title}")
        return
    click.echo(fetch(name, file))


def _token_ids(text: str) -> list[int]:
    pieces = text.replace(",", " ").split()
    if not pieces or not all(piece.isascii() and piece.isdigit() for piece in pieces):
        raise DataError(f"--tokens is {text!r}; expected token ids, e.g. --tokens 1,2,3.")
    return [int(piece) for piece in pieces]


def _console(width: int = 100, *, quiet: bool = False) -> "Console":
    from rich.console import Console

    return Console(quiet=quiet) if sys.stdout.isatty() else Console(width=width, quiet=quiet)


def _prepare(
    console: "Console", config: "Config", where: str, tokenizer: "Tokenizer | None", *, quiet: bool = False
) -> "PreparedData":
    from moezoo.core.data.prepare import prepare_data

    if quiet:
        return prepare_data(config.data, config.training.sequence_length, where=where, tokenizer=tokenizer)
    with console.status("preparing data ...") as status:

        def show(what: str, done: int, total: int | None) -> None:
            status.update(f"{what}: {done / 1e6:,.0f} MB" + (f" of {total / 1e6:,.0f} MB" if total else ""))

        return prepare_data(
            config.data, config.training.sequence_length, where=where, tokenizer=tokenizer, on_progress=show
        )


def _again(
    config_path: Path, backend: str | None, out: Path | None, overrides: tuple[str, ...], mesh: str | None
) -> str:
    """The command that resumes."""
    import shlex

    words = ["moezoo", "train", str(config_path)]
    words += ["--backend", backend] if backend else []
    words += ["--out", str(out)] if out else []
    for override in overrides:
        words += ["--set", override]
    words += ["--mesh", mesh] if mesh else []
    return shlex.join([*words, "--resume"])
