"""One-page description of a checkpoint: the parsed config and the tensor mapping."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo.core.generation.config import read_generation_config
from moezoo.core.huggingface.checkpoint import HuggingFaceCheckpoint, describe_checkpoint, open_checkpoint
from moezoo.core.huggingface.ledger import ledger_rows
from moezoo.core.reports.model_page import model_description, model_tables
from moezoo.core.reports.text import bytes_text, count

if TYPE_CHECKING:
    from rich.console import RenderableType

_LENGTH = 4096  # tokens, for FLOPs and KV cache, unless the model's maximum is smaller
_WORDS = {
    "mapped": "mapped to parameters",
    "copy": "duplicates",
    "codes": "codes of quantized parameters",
    "scales": "scales",
    "kept": "kept verbatim",
}


def checkpoint_description(folder: Path) -> dict[str, Any]:
    """Return the page as plain data, from config.json and the headers of weight files, if any; no tensor is read.

    `config.understood` lists the fields that were parsed, `config.no_effect` those that do not affect the computation;
    any other field would have been rejected. `files` and `ledger` are None if the folder has no weights.

    Raises SpecError or CheckpointError.
    """
    has_weights = any(folder.glob("*.safetensors"))
    checkpoint = open_checkpoint(folder) if has_weights else None
    description = checkpoint.description if checkpoint else describe_checkpoint(folder)
    fields, spec = description.fields, description.spec
    longest = [spec.max_length, fields.raw.get("max_position_embeddings")]
    generation = read_generation_config(folder, fields.raw)
    return {
        "family": description.family.name,
        "config": {
            "understood": fields.understood,
            "no_effect": fields.no_effect,
            "notes": list(description.notes),
        },
        **model_description(spec, min([_LENGTH, *(length for length in longest if isinstance(length, int))])),
        "files": None if checkpoint is None else _files(checkpoint),
        "ledger": None if checkpoint is None else _ledger(checkpoint),
        "tokenizer": (folder / "tokenizer.json").is_file(),
        "generation": {
            "temperature": generation.temperature,
            "top_k": generation.top_k,
            "top_p": generation.top_p,
            "min_p": generation.min_p,
            "repetition_penalty": generation.repetition_penalty,
            "end_tokens": list(generation.end_tokens),
            "not_done": [*generation.not_done, *generation.not_done_in_sampling],
            "unknown": list(generation.unknown),
        },
    }


def checkpoint_page(folder: Path, where: str) -> "RenderableType":
    """Return the page that `moezoo describe` prints, with title `where`."""
    from rich.console import Group
    from rich.text import Text

    known = checkpoint_description(folder)
    config, files = known["config"], known["files"]
    lines = [
        f"parsed from config.json: {_names(config['understood'])}",
        f"no effect on the computation: {_names(config['no_effect'])}",
        *(f"note: {note}" for note in config["notes"]),
    ]
    if files is None:
        lines.append("weights: none in this folder; described from config.json alone")
    else:
        dtypes = ", ".join(f"{name} {bytes_text(row['bytes'])}" for name, row in files["dtypes"].items())
        lines.append(f"weights: {bytes_text(files['bytes'])} in {_amount(files['files'], 'file')} ({dtypes})")
        statuses = ", ".join(f"{number:,} {_WORDS[status]}" for status, number in known["ledger"]["counts"].items())
        lines.append(f"ledger: {_amount(files['tensors'], 'tensor')}: {statuses}")
        if known["ledger"]["kept"]:
            kept = [f"{row['count']} x {row['name']}" for row in known["ledger"]["kept"]]
            lines.append(f"kept verbatim: {_names(kept)}")
    lines.append(f"generation: {_generation(known['generation'])}")
    if not known["tokenizer"]:
        lines.append("tokenizer: none in this folder; pass prompts as --tokens")
    tables = model_tables(known, f"{where} ({known['family']})")
    return Group(*tables, *(Text(line, "dim") for line in lines))


def _files(checkpoint: HuggingFaceCheckpoint) -> dict[str, Any]:
    tensors, sizes = Counter[str](), Counter[str]()
    for name, tensor in checkpoint.folder.tensors.items():
        tensors[tensor.dtype] += 1
        sizes[tensor.dtype] += checkpoint.folder.size_bytes(name)
    return {
        "files": len(checkpoint.folder.headers),
        "tensors": sum(tensors.values()),
        "bytes": sum(sizes.values()),
        "dtypes": {dtype: {"tensors": tensors[dtype], "bytes": sizes[dtype]} for dtype in sorted(tensors)},
    }


def _ledger(checkpoint: HuggingFaceCheckpoint) -> dict[str, Any]:
    return {
        "counts": checkpoint.ledger.counts(),
        "kept": [
            {"name": row.theirs, "count": row.count, "dtype": row.dtype, "shape": list(row.shape)}
            for row in ledger_rows(checkpoint.ledger)
            if row.status == "kept"
        ],
    }


def _generation(known: dict[str, Any]) -> str:
    filters = ("top_k", "top_p", "min_p", "repetition_penalty")
    words = ["greedy" if known["temperature"] == 0 else f"temperature {known['temperature']:g}"]
    words += [f"{name} {known[name]:g}" for name in filters if known[name] is not None]
    ends = known["end_tokens"]
    words.append(f"ends at token {', '.join(map(str, ends))}" if ends else "no end token")
    words += [f"{name} is not supported" for name in known["not_done"]]
    return ", ".join(words)


def _names(names: list[str], shown: int = 30) -> str:
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return (", ".join(names[:shown]) or "none") + more


def _amount(number: int, word: str) -> str:
    return f"{count(number) if number >= 10_000 else number} {word}{'' if number == 1 else 's'}"
