"""A checkpoint on one page: what its config.json says and was understood to say, and what becomes of its tensors."""

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

_LENGTH = 4096  # tokens, for operations and cache, unless the model takes fewer
_WORDS = {
    "mapped": "mapped to parameters",
    "copy": "second copies",
    "codes": "codes of quantized parameters",
    "scales": "scales",
    "kept": "kept verbatim",
}


def checkpoint_description(folder: Path) -> dict[str, Any]:
    """The page as plain data, from config.json and, where files are there, their headers; no tensor is read.

    `config.understood` are the fields that made the model what it is, `config.no_effect` those that change no number;
    any other would have been refused. `files` and `ledger` are None where the folder has no weights.

    Raises SpecError or CheckpointError.
    """
    weights_are_here = any(folder.glob("*.safetensors"))
    checkpoint = open_checkpoint(folder) if weights_are_here else None
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
    """The page of `moezoo describe`. `where` is its title."""
    from rich.console import Group
    from rich.text import Text

    known = checkpoint_description(folder)
    config, files = known["config"], known["files"]
    lines = [
        f"understood in config.json: {_names(config['understood'])}",
        f"without effect on any number: {_names(config['no_effect'])}",
        *(f"note: {note}" for note in config["notes"]),
    ]
    if files is None:
        lines.append("weights: none in this folder; the page is from config.json alone")
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
        lines.append("tokenizer: none in this folder; prompt it by --tokens")
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
    words.append(f"ends at token {', '.join(map(str, ends))}" if ends else "no end token named")
    words += [f"{name} is not done here" for name in known["not_done"]]
    return ", ".join(words)


def _names(names: list[str], shown: int = 30) -> str:
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return (", ".join(names[:shown]) or "none") + more


def _amount(number: int, word: str) -> str:
    return f"{count(number) if number >= 10_000 else number} {word}{'' if number == 1 else 's'}"
