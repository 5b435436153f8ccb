"""`moezoo convert`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moezoo.cli.options import json_option
from moezoo.cli.output import print_json, warn
from moezoo.core.errors import SpecError

if TYPE_CHECKING:
    from moezoo.core.huggingface.adapters.naming import AdapterLayout
    from moezoo.core.huggingface.export_layout import LayoutName
    from moezoo.core.huggingface.recipe import WritableMode
    from moezoo.core.progress import Progress


@click.command("convert")
@click.argument("path", metavar="PATH", type=Path)
@click.argument("out", metavar="OUT", type=Path)
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
    as_json: bool,
) -> None:
    """Convert between Hugging Face checkpoints and run folders, or quantize.

    PATH is a run folder, a Hugging Face folder or a hub id; OUT is a new folder in the other format. Every tensor is
    accounted for; unchanged weights are converted back bit for bit. With --quantize, --dequantize or --layout, OUT is a
    checkpoint for mlx-lm, or for transformers; MLX is not needed. With --adapter, OUT is the folder of an adapter; with
    --merge, a checkpoint with it.
    """
    from moezoo.core.huggingface.adapters.naming import adapter_layout
    from moezoo.core.huggingface.ledger import ledger_text
    from moezoo.core.huggingface.recipe import recipe_of_options
    from moezoo.core.runs.convert import convert
    from moezoo.core.runs.convert_layout import convert_layout, convert_merged

    widths = recipe_of_options(quantize, mode, group_size, router, recipe)
    in_layout = widths is not None or dequantize or layout is not None
    if whole:
        if in_layout:
            raise SpecError("--whole copies a run; got --quantize, --dequantize or --layout too. Leave one out.")
        _consolidate(path, out, as_json)
        return
    if adapter is not None and not merge:
        _write_adapter(path, out, adapter_layout(adapter), in_layout, as_json)
        return
    if merge:
        merging = None if adapter is None else Path(adapter)
        result = convert_merged(path, out, layout=layout, recipe=widths, adapter=merging, on_progress=_show_progress())
    elif in_layout:
        result = convert_layout(
            path, out, layout=layout, recipe=widths, dequantize=dequantize, on_progress=_show_progress()
        )
    else:
        result = convert(path, out, _show_progress())
    if as_json:
        entries = [{**vars(entry), "shape": list(entry.shape)} for entry in result.ledger.entries]
        print_json({"format": result.format, "tensors": entries, "notes": result.notes})
        return
    click.echo(ledger_text(result.ledger))
    warn(*result.notes)
    counts = ", ".join(f"{count} {status}" for status, count in result.ledger.counts().items())
    click.echo(f"{counts}; none dropped. Written as {result.format}: {out}")


def _write_adapter(path: Path, out: Path, layout: "AdapterLayout", in_layout: bool, as_json: bool) -> None:
    from moezoo.core.runs.convert_adapter import convert_adapter

    if in_layout:
        raise SpecError("--adapter writes an adapter; got --quantize, --dequantize or --layout too. Leave one out.")
    notes = convert_adapter(path, out, layout)
    if as_json:
        print_json({"format": layout, "notes": notes})
        return
    warn(*notes)
    click.echo(f"adapter in the layout of {layout}: {out}")


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
