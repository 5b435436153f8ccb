"""Export of weights to safetensors files, in the original checkpoint's layout or in the family's default layout."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from moezoo.core.checkpoint.safetensors_file import write_stream
from moezoo.core.checkpoint.safetensors_header import encode_header, size_bytes
from moezoo.core.data.tokenizer_files import tokenizer_files
from moezoo.core.errors import CheckpointError, RunError
from moezoo.core.files import make_folder, remove_folder, rename_folder, write_atomically
from moezoo.core.huggingface.assembly import PIECE_BYTES, same_bits
from moezoo.core.huggingface.codes import written_codes
from moezoo.core.huggingface.export_tokenizer import ExportedTokenizer
from moezoo.core.huggingface.layout import CONFIG, HEADERS, MODELOPT, Layout, copy_small_files, entries_of
from moezoo.core.huggingface.ledger import FLOATS, first_rules, stored_dtype, wrapping
from moezoo.core.huggingface.mlx_config import with_mlx_spellings, without_quantization
from moezoo.core.huggingface.nonfinite import is_finite
from moezoo.core.huggingface.quantized_tensors import encode, numpy_dtype
from moezoo.core.huggingface.stored_rows import group_scales, stored_codes
from moezoo.core.huggingface.tensors import Placed
from moezoo.core.quantization.weight import QuantizedWeight, stored

Array = npt.NDArray[Any]

MAX_FILE_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
_CODES = {"U32": np.uint32, "I32": np.int32, "U8": np.uint8, "I8": np.int8, "F8_E4M3": ml_dtypes.float8_e4m3fn}


def export_checkpoint(
    parameters: Mapping[str, Array],
    layout: Layout,
    out: Path,
    tokenizer: ExportedTokenizer | None = None,
    *,
    trained: bool = False,
) -> list[str]:
    """Write parameters (by canonical name) to a checkpoint folder that transformers and moezoo can open.

    Files, names, order and dtypes are those of the layout, so unchanged weights give the same bytes. If values of
    quantized tensors changed and can no longer be encoded exactly, the family's default layout is written instead,
    without quantization, and a note says so. `tokenizer` replaces the checkpoint's tokenizer, whose files are left out.
    `trained`: the folder is another model than the layout's, and its config.json gets the spellings of mlx-lm too.

    Returns one-line notes for the user. Raises RunError if the folder exists and is not empty, or cannot be written;
    nothing of it remains then. Raises CheckpointError if a value overflows the stored dtype.
    """
    return into_new_folder(out, lambda folder: _write(parameters, layout, folder, tokenizer, trained))


def into_new_folder(out: Path, write: Callable[[Path], list[str]]) -> list[str]:
    """Create a folder atomically, filled by `write`. Raises RunError if it exists and is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and is not an empty folder; expected a new or empty folder. Choose another one.")
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():
        remove_folder(partial)
    make_folder(partial)
    try:
        notes = write(partial)
        if out.exists():
            out.rmdir()
        rename_folder(partial, out)
    except BaseException:
        remove_folder(partial)
        raise
    return notes


def _write(
    parameters: Mapping[str, Array], layout: Layout, folder: Path, tokenizer: ExportedTokenizer | None, trained: bool
) -> list[str]:
    try:
        for name in layout.readable:  # those that have changed are known before anything is written
            _codes(name, parameters, layout)
    except CheckpointError:
        return _write_plain(parameters, layout, folder, tokenizer)
    write_small_files(layout.path, folder, tokenizer, set())
    read = layout.description
    config = with_mlx_spellings(read.family, read.fields, read.spec) if trained else read.fields.raw
    if config != read.fields.raw:
        write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.write(folder)
    for name, header in layout.headers.items():
        write_stream(folder / name, header, _tensors(header, parameters, layout))
    return []


def write_small_files(path: Path, folder: Path, tokenizer: ExportedTokenizer | None, without: set[str]) -> None:
    """Copy the non-tensor files of a checkpoint, except those of its tokenizer if another one replaces it."""
    replaced = () if tokenizer is None else tokenizer_files(path)
    copy_small_files(path, folder, {HEADERS, *replaced, *without})


def _tensors(header: bytes, parameters: Mapping[str, Array], layout: Layout) -> Iterator[tuple[str, Array]]:
    kept = set(layout.kept_names())
    own = {tensor.stored[0]: name for name, tensor in layout.readable.items()}
    for name, entry in entries_of(header):
        if name in kept:
            yield name, layout.read(name)
        elif name in own:
            yield name, _codes(own[name], parameters, layout)
        else:
            placed = layout.ledger.placed[name]
            original = layout.read(name) if placed.rule.kept else None  # the scores' bias of another modality
            yield name, _assembled(name, placed, parameters, numpy_dtype(entry["dtype"]), original)


def _assembled(
    name: str,
    placed: Placed,
    parameters: Mapping[str, Array],
    dtype: np.dtype[Any],
    original: Array | None = None,
) -> Array:
    """Assemble a checkpoint tensor from our parameters; what is not ours is that of the original, or 0."""
    array = np.zeros(placed.shape, dtype) if placed.rule.kept else np.empty(placed.shape, dtype)
    if original is not None:
        array[...] = original
    for place, (ours, expert, _) in enumerate(placed.parts):
        value = parameters[ours]
        if expert is not None:
            value = value[(slice(None),) * placed.expert_axis(place) + (expert,)]
        placed.put(array, place, _cast(value, dtype, ours, name))
    return array


def assembled_pieces(
    name: str, placed: Placed, parameters: Mapping[str, Array], dtype: np.dtype[Any]
) -> Iterator[tuple[slice, Array]]:
    """Yield a checkpoint tensor in pieces of its rows, of about 16 MiB or one row; at once if parts share rows."""
    leading = [placed.leading(place) for place in range(len(placed.parts))]
    values = [parameters[ours] for ours, _, _ in placed.parts]
    if placed.rule.per_expert or any(found is None for found in leading):
        yield slice(None), _assembled(name, placed, parameters, dtype)
        return
    letters = [found for found in leading if found is not None]
    letter, inner, axis = letters[0]
    count = values[0].shape[axis]
    step = max(1, PIECE_BYTES * count // max(1, math.prod(placed.shape) * dtype.itemsize))
    for start in range(0, count, step):
        stop = min(start + step, count)
        piece = np.empty(((stop - start) * inner, *placed.shape[1:]), dtype)
        for place, (value, (_, _, axis)) in enumerate(zip(values, letters, strict=True)):
            part = value[(slice(None),) * axis + (slice(start, stop),)]
            placed.resized(letter, stop - start).put(piece, place, _cast(part, dtype, placed.ours[place], name))
        yield slice(start * inner, stop * inner), piece


def _cast(value: Array, dtype: np.dtype[Any], ours: str, name: str) -> Array:
    with np.errstate(over="ignore"):
        cast = value.astype(dtype, copy=False)
    if cast.dtype != value.dtype and is_finite(value) and not is_finite(cast):
        raise CheckpointError(
            f"{ours} has values that overflow {dtype}, the dtype of {name}. Train with smaller weights, or "
            "export to a checkpoint with a wider dtype."
        )
    return cast


def _codes(name: str, parameters: Mapping[str, Array], layout: Layout) -> Array:
    """Return the codes of a tensor. Raises CheckpointError if its values or scales have changed."""
    tensor = layout.readable[name]
    weights = [stored(parameters, ours) for ours in layout.ledger.placed[name].ours]
    coded = [weight for weight in weights if isinstance(weight, QuantizedWeight) and weight.format == tensor.format]
    if len(coded) == len(weights):
        return _kept_codes(name, coded, layout)
    value = _assembled(name, layout.ledger.placed[name], parameters, numpy_dtype(tensor.dtype))
    if any(parameters[ours].dtype != value.dtype for ours in layout.ledger.placed[name].ours):
        _check_exact(name, layout.ledger.placed[name], parameters, value)
    kept = layout.read(tensor.stored[0]) if tensor.stored[0] in layout.stored else None
    return encode(tensor, value, [layout.read(part) for part in tensor.stored[1:]], kept)


def _kept_codes(name: str, weights: Sequence[QuantizedWeight], layout: Layout) -> Array:
    """Return the codes of a tensor whose parameters are codes still, with the scales and biases of the layout."""
    tensor = layout.readable[name]
    original = layout.tensors[tensor.stored[0]]
    codes, *beside = written_codes(layout.ledger.placed[name], weights)
    kept = group_scales(tensor, [layout.read(part) for part in tensor.stored[1:]])
    if not all(same_bits(one, other) for one, other in zip(kept, beside, strict=True)):
        raise CheckpointError(f"{tensor.stored[1]} has changed.")
    return stored_codes(tensor, codes, np.dtype(_CODES[original.dtype]), original.shape)


def _check_exact(name: str, placed: Placed, parameters: Mapping[str, Array], value: Array) -> None:
    """Raise if a wider parameter was rounded when cast to the dtype that is encoded."""
    wide = _assembled(name, placed, parameters, np.dtype(np.float32))
    if not np.array_equal(wide, value.astype(np.float32), equal_nan=True):
        raise CheckpointError(f"{name} has changed and cannot be encoded exactly.")


def _write_plain(
    parameters: Mapping[str, Array], layout: Layout, folder: Path, tokenizer: ExportedTokenizer | None
) -> list[str]:
    """Write the family's default layout, or mlx-lm's if it is that one, without quantization, for weights that the
    codes cannot represent."""
    description = layout.description
    wrap = wrapping(description.family, {**layout.tensors, **layout.readable})
    placed = {wrap(name): rule for name, rule in first_rules(description.rules, description.spec).items()}
    placed = {name: layout.ledger.placed.get(name, rule) for name, rule in placed.items()}
    forms = {name: (stored_dtype(rule, "BF16"), rule.shape) for name, rule in placed.items()}
    for name, tensor in layout.tensors.items():
        if name in forms and tensor.dtype in FLOATS:
            forms[name] = (tensor.dtype, tensor.shape)
    config = with_mlx_spellings(description.family, description.fields, description.spec)
    write_atomically(folder / CONFIG, json.dumps(without_quantization(config), indent=2) + "\n")
    write_small_files(layout.path, folder, tokenizer, {CONFIG, INDEX, MODELOPT})
    if tokenizer is not None:
        tokenizer.write(folder)
    kept = {entry.name: layout.read for entry in layout.ledger.entries if entry.status == "kept"}
    kept |= {name: layout.read for name in layout.partly_kept if name in placed}
    forms |= {name: (layout.tensors[name].dtype, layout.tensors[name].shape) for name in kept}
    write_own_layout(parameters, placed, forms, kept, folder)
    return ["quantized weights have changed, so they and config.json were written without quantization"]


def write_own_layout(
    parameters: Mapping[str, Array],
    placed: Mapping[str, Placed],
    forms: Mapping[str, tuple[str, tuple[int, ...]]],
    kept: Mapping[str, Callable[[str], Array]],
    folder: Path,
) -> None:
    """Write sharded safetensors files; `forms`: dtype and shape by tensor name; `kept`: tensors copied verbatim, or as
    far as `placed` does not have them."""

    def array(name: str) -> Array:
        if name not in placed:
            return kept[name](name)
        original = kept[name](name) if name in kept else None
        return _assembled(name, placed[name], parameters, numpy_dtype(forms[name][0]), original)

    shards = shards_of({name: size_bytes(*form) for name, form in forms.items()})
    for file_name, names in shards.items():
        header = encode_header({name: forms[name] for name in names}, {"format": "pt"})
        write_stream(folder / file_name, header, ((name, array(name)) for name in names))
    if len(shards) > 1:
        write_index(folder, {name: (file, forms[name]) for file, names in shards.items() for name in names}, {})


def write_index(
    folder: Path, tensors: Mapping[str, tuple[str, tuple[str, tuple[int, ...]]]], metadata: Mapping[str, int]
) -> None:
    """Write the index of tensors: the file, dtype and shape of each."""
    sizes = {"total_size": sum(size_bytes(*form) for _, form in tensors.values())}
    where = {name: file for name, (file, _) in sorted(tensors.items())}
    write_atomically(
        folder / INDEX, json.dumps({"metadata": sizes | dict(metadata), "weight_map": where}, indent=2) + "\n"
    )


def shards_of(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Assign names to files of at most MAX_FILE_BYTES each, by their bytes."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(sizes):
        if groups[-1] and size + sizes[name] > MAX_FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += sizes[name]
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": names for number, names in enumerate(groups, 1)}
