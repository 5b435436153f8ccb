"""`moezoo convert`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moezoo.cli.completion import PATH, complete_model
from moezoo.cli.options import json_option
from moezoo.cli.output import print_json, warn
from moezoo.core.errors import SpecError

if TYPE_CHECKING:
    from moezoo.core.huggingface.adapters.naming import AdapterLayout
    from moezoo.core.huggingface.export_layout import LayoutName
    from moezoo.core.huggingface.recipe import WritableMode
    from moezoo.core.progress import Progress
    from moezoo.core.runs.convert import Conversion


@click.command("convert")
@click.argument("path", metavar="PATH", type=PATH, shell_complete=complete_model)
@click.argument("out", metavar="OUT", type=PATH)
@click.option(
    "--whole", is_flag=True, help="Copy a run, its newest checkpoint merged into unsharded safetensors files."
)
@click.option("--quantize", metavar="4bit", help="Quantize: write codes of 2, 3, 4, 5, 6 or 8 bits for mlx-lm.")
@click.option(
    "--mode", type=click.Choice(["affine", "mxfp4", "mxfp8", "nvfp4"]), help="Kind of codes. Default: affine."
)
@click.option("--group-size", type=click.IntRange(1), metavar="64", help="Numbers that share a scale.")
@click.option("--router", metavar="8bit|float", help="Width of routers. Default: 8bit, or as in the recipe.")
@click.option("--recipe", metavar="NAME|FILE", help="Widths by role, layer or module: mixed_3_6, or a YAML file.")
@click.option("--dequantize", is_flag=True, help="Write a quantized checkpoint in floats.")
@click.option("--layout", type=click.Choice(["mlx", "transformers"]), help="Names and transforms of tensors in OUT.")
@click.option(
    "--adapter",
    metavar="mlx|peft|peft-fused|vllm|FOLDER",
    help="Write the adapter of a run for mlx-lm, PEFT or vLLM; with --merge, the adapter to merge into PATH.",
)
@click.option("--merge", is_flag=True, help="Write a whole checkpoint, with the adapter merged into its base.")
@click.option("--push", metavar="ORG/NAME", help="Upload OUT to the hub: to a private repository, if it is new.")
@click.option("--public", is_flag=True, help="With --push: to a public repository.")
@json_option
def convert_command(
    path: Path,
    out: Path,
    whole: bool,
    quantize: str | None,
    mode: "WritableMode | None",
    group_size: int | None,
    router: str | None,
    recipe: str | None,
    dequantize: bool,
    layout: "LayoutName | None",
    adapter: str | None,
    merge: bool,
    push: str | None,
    public: bool,
    as_json: bool,
) -> None:
    """Convert between Hugging Face checkpoints and run folders, or quantize.

    PATH is a run folder, a Hugging Face folder or a hub id; OUT is a new folder in the other format. Every tensor is
    accounted for; unchanged weights are converted back bit for bit. With --quantize, --dequantize or --layout, OUT is a
    checkpoint for mlx-lm, or for transformers; MLX is not needed. With --adapter, OUT is the folder of an adapter; with
    --merge, a checkpoint with it. A model trained here gets a model card, README.md.
    """
    from moezoo.core.huggingface.adapters.naming import adapter_layout
    from moezoo.core.huggingface.recipe import recipe_of_options
    from moezoo.core.runs.convert import convert
    from moezoo.core.runs.convert_layout import convert_layout, convert_merged
    from moezoo.core.runs.run_folder import is_run

    widths = recipe_of_options(quantize, mode, group_size, router, recipe)
    in_layout = widths is not None or dequantize or layout is not None
    if whole and in_layout:
        raise SpecError("--whole copies a run; got --quantize, --dequantize or --layout too. Leave one out.")
    writes_run = whole or not (in_layout or merge or adapter is not None or is_run(path))
    finish = _card_and_push(push, public, writes_run)
    if whole:
        _consolidate(path, out, as_json)
        return
    if adapter is not None and not merge:
        _write_adapter(path, out, adapter_layout(adapter), in_layout, as_json, finish)
        return
    merging = Path(adapter) if adapter is not None else None
    if merge:
        result = convert_merged(path, out, layout=layout, recipe=widths, adapter=merging, on_progress=_show_progress())
    elif in_layout:
        result = convert_layout(
            path, out, layout=layout, recipe=widths, dequantize=dequantize, on_progress=_show_progress()
        )
    else:
        result = convert(path, out, _show_progress())
    _report(result, out, None if writes_run else finish(merging or path, out, step=result.step), as_json)


def _report(result: "Conversion", out: Path, url: str | None, as_json: bool) -> None:
    from moezoo.core.huggingface.ledger import ledger_text

    if as_json:
        entries = [{**vars(entry), "shape": list(entry.shape)} for entry in result.ledger.entries]
        print_json({"format": result.format, "tensors": entries, "notes": result.notes, "pushed": url})
        return
    click.echo(ledger_text(result.ledger))
    warn(*result.notes)
    counts = ", ".join(f"{count} {status}" for status, count in result.ledger.counts().items())
    click.echo(f"{counts}; none dropped. Written as {result.format}: {out}")
    _echo_address(url)


def _card_and_push(push: str | None, public: bool, writes_run: bool) -> Callable[..., str | None]:
    """Check --push, and return a function that gives an export its card, uploads it, and returns its address if it is.

    Its arguments are those of `write_model_card`.
    """
    from moezoo.core.huggingface.push import check_push
    from moezoo.core.huggingface.push import push as upload
    from moezoo.core.reports.model_card import write_model_card

    if public and push is None:
        raise SpecError("--public is for --push, which is not there. Add --push ORG/NAME.")
    if push is not None and writes_run:
        raise SpecError("--push uploads a checkpoint or an adapter, and OUT is a run folder. Convert the run first.")
    if push is not None:
        check_push(push)

    def finish(path: Path, out: Path, **options: Any) -> str | None:
        write_model_card(path, out, name=push, **options)
        return None if push is None else upload(out, push, public=public)

    return finish


def _echo_address(url: str | None) -> None:
    if url is not None:
        click.echo(f"uploaded: {url}")


def _write_adapter(
    path: Path, out: Path, layout: "AdapterLayout", in_layout: bool, as_json: bool, finish: Callable[..., str | None]
) -> None:
    from moezoo.core.runs.convert_adapter import convert_adapter

    if in_layout:
        raise SpecError("--adapter writes an adapter; got --quantize, --dequantize or --layout too. Leave one out.")
    notes = convert_adapter(path, out, layout)
    url = finish(path, out, adapter=layout)
    if as_json:
        print_json({"format": layout, "notes": notes, "pushed": url})
        return
    warn(*notes)
    click.echo(f"adapter in the layout of {layout}: {out}")
    _echo_address(url)


def _consolidate(path: Path, out: Path, as_json: bool) -> None:
    from moezoo.core.runs.save import consolidate

    step, notes = consolidate(path, out)
    if as_json:
        print_json({"format": "moezoo", "step": step, "notes": notes})
        return
    warn(*notes)
    click.echo(f"step {step}, weights and moments in unsharded files: {out}")


def _show_progress() -> "Progress":
    """Return a callback that shows progress and the remaining time in a terminal."""
    from moezoo.core.progress import Pace

    pace, interactive = Pace(), sys.stderr.isatty()

    def show(what: str, done: int, total: int | None) -> None:
        if interactive:
            unit = "parameters" if what == "converting" else "tensors"
            line = f"\r{what}: {done}/{total} {unit}, eta {pace.eta(done, total)} "
            click.echo(line, nl=done == total, err=True)

    return show
