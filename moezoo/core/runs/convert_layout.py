"""Conversion of a run or a checkpoint to mlx-lm's layout, quantized or in floats, and back to transformers' layout."""

from dataclasses import dataclass
from pathlib import Path

from moezoo.core.data.load_tokenizer import tokenizer_notes
from moezoo.core.data.tokenizers import TokenIds
from moezoo.core.errors import SpecError
from moezoo.core.files import emptied_on_error
from moezoo.core.huggingface.checkpoint import open_checkpoint
from moezoo.core.huggingface.export import into_new_folder
from moezoo.core.huggingface.export_as import describe_as_family
from moezoo.core.huggingface.export_layout import (
    LayoutName,
    Target,
    low_router_note,
    make_target,
    storage_note,
    write_target,
)
from moezoo.core.huggingface.export_tokenizer import ExportedTokenizer, exported_tokenizer, is_own
from moezoo.core.huggingface.layout import Description, Layout
from moezoo.core.huggingface.nonfinite import nonfinite_warning
from moezoo.core.huggingface.recipe import Recipe
from moezoo.core.parameters import parameter_table
from moezoo.core.progress import Progress
from moezoo.core.runs.convert import Conversion, convert
from moezoo.core.runs.convert_adapter import merged
from moezoo.core.runs.open import OpenedModel, open_model


@dataclass(frozen=True)
class _Source:
    """A model to write: its description, the dtype of each parameter's floats, and its tokenizer, if not in `files`."""

    description: Description
    dtypes: dict[str, str]
    files: Path | None
    tokenizer: ExportedTokenizer | None


def convert_layout(
    path: str | Path,
    out: Path,
    *,
    layout: LayoutName | None = None,
    recipe: Recipe | None = None,
    dequantize: bool = False,
    merge: bool = False,
    adapter: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Conversion:
    """Write a run or a checkpoint as a folder in a layout.

    Args:
        path: a run folder, or a Hugging Face folder or hub id in either layout.
        out: a new or empty folder.
        layout: None: mlx with a recipe, else that of the checkpoint.
        recipe: formats to quantize modules in; None: floats.
        dequantize: the checkpoint is quantized, and floats are written; `merge` without a recipe implies it.
        merge, adapter: merge an adapter into its base; as in `open_model`.
        on_progress: progress callback, in tensors.

    Raises what `open_model` raises. Raises SpecError: options that contradict each other or the checkpoint; mlx-lm does
    not have the family. Raises RunError: `out` is not empty. After an error `out` is as it was.
    """
    opened = merged(open_model(path, adapter=adapter)) if merge else open_model(path)
    quantized = opened.checkpoint is not None and bool(opened.checkpoint.layout.readable)
    dequantize |= merge and quantized and recipe is None
    if dequantize != (quantized and recipe is None):
        raise SpecError(
            f"{path} is quantized. Add --dequantize to write floats, or --quantize to quantize it again."
            if quantized and recipe is None
            else f"--dequantize writes a quantized checkpoint in floats; got {path}, "
            f"{'with --quantize' if recipe else 'which has floats'}. Leave out --dequantize."
        )
    if recipe is not None and layout == "transformers":
        raise SpecError("--quantize writes mlx-lm's layout; got --layout transformers. Leave out --layout.")
    source = _source(opened)
    description = source.description
    if layout is None:
        layout = "mlx" if recipe is not None or description.rules != description.family.tensors else "transformers"
    target = make_target(description, source.dtypes, layout, recipe)

    def write(folder: Path) -> list[str]:
        write_target(
            target,
            opened.weights,
            description.spec,
            folder,
            files=source.files,
            tokenizer=source.tokenizer,
            on_progress=on_progress,
        )
        return []

    with emptied_on_error(out):
        into_new_folder(out, write)
    again = ["the checkpoint was quantized already; quantizing its values again adds to the error"]
    notes = [*opened.problems, *_notes(opened, target), *(again if recipe is not None and quantized else ())]
    return Conversion(layout, open_checkpoint(out).ledger, notes, opened.step)


def convert_merged(
    path: str | Path,
    out: Path,
    *,
    layout: LayoutName | None = None,
    recipe: Recipe | None = None,
    adapter: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Conversion:
    """Write a model with its adapter merged as a Hugging Face checkpoint, in the layout of its base.

    A quantized base is written in floats, or quantized again with a recipe. Arguments and errors as in
    `convert_layout`.
    """
    opened = merged(open_model(path, adapter=adapter))
    quantized = opened.checkpoint is not None and bool(opened.checkpoint.layout.readable)
    if quantized or layout is not None or recipe is not None:
        return convert_layout(
            path, out, layout=layout, recipe=recipe, merge=True, adapter=adapter, on_progress=on_progress
        )
    return convert(path, out, on_progress, merge=True, adapter=adapter)


def _source(opened: OpenedModel) -> _Source:
    layout, tokenizer = opened.layout, opened.tokenizer
    if layout is not None:
        own = exported_tokenizer(tokenizer) if is_own(tokenizer, layout) else None
        return _Source(layout.description, _dtypes(layout), layout.path, own)
    config = opened.config
    length = config.model.max_length or config.training.sequence_length
    description = describe_as_family(config.model, length, str(opened.path))
    names = [row.name for row in parameter_table(description.spec)]
    return _Source(description, dict.fromkeys(names, "F32"), None, exported_tokenizer(tokenizer))


def _dtypes(layout: Layout) -> dict[str, str]:
    """Return the dtype of each parameter's floats: of codes that of their scales, but of FP8 and MXFP4 BF16."""

    def dtype(name: str) -> str:
        tensor = layout.readable.get(name)
        if tensor is None:
            return layout.tensors[name].dtype
        is_affine = tensor.format is not None and tensor.format.has_biases
        return layout.tensors[tensor.stored[1]].dtype if is_affine else "BF16"

    found = {ours: {dtype(source.name) for source in sources} for ours, sources in layout.ledger.sources.items()}
    return {ours: next(iter(kinds)) if len(kinds) == 1 else "F32" for ours, kinds in found.items()}


def _notes(opened: OpenedModel, target: Target) -> list[str]:
    notes = []
    if target.formats:
        notes += [storage_note(target), *low_router_note(target)]
    if target.undivided:
        names = ", ".join(target.undivided[:5]) + (", ..." if len(target.undivided) > 5 else "")
        notes.append(
            f"{len(target.undivided)} modules stay in floats, because groups do not divide their rows: {names}"
        )
    layout = opened.layout
    kept = [] if layout is None else [entry.name for entry in layout.ledger.entries if entry.status == "kept"]
    if kept:
        notes.append(f"{len(kept)} tensors without a place in this layout were left out: {', '.join(kept[:5])}")
    if opened.checkpoint is not None:
        warning = nonfinite_warning(list(opened.checkpoint.weights.nonfinite), str(opened.path))
        notes += [warning] if warning else []
    if layout is None and isinstance(opened.tokenizer, TokenIds):
        return [*notes, "no tokenizer was written, since the run used token ids only"]
    return notes + tokenizer_notes(opened.tokenizer)
