"""The page of `moezoo describe` for a Hugging Face checkpoint: the parsed config and the tensor mapping."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezoo.core.generation.config import GenerationConfig, read_generation_config
from moezoo.core.huggingface.checkpoint import HuggingFaceCheckpoint, describe_checkpoint, open_checkpoint
from moezoo.core.huggingface.ledger import LedgerRow, ledger_rows
from moezoo.core.huggingface.nonfinite import nonfinite_warning
from moezoo.core.reports.model_page import ModelDescription, model_description, model_tables
from moezoo.core.reports.storage import (
    Context,
    Storage,
    cache_words,
    context_in,
    float32_bytes,
    storage_of,
    storage_table,
)
from moezoo.core.reports.text import bytes_text, count

if TYPE_CHECKING:
    from rich.console import RenderableType

_LENGTH = 4096  # tokens, for FLOPs and KV cache, unless the model's maximum is smaller
_STATUS_LABELS = {
    "mapped": "mapped to parameters",
    "copy": "duplicates",
    "codes": "codes of quantized parameters",
    "scales": "scales",
    "biases": "biases of quantized groups",
    "kept": "kept verbatim",
}


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a checkpoint.

    Fields:
        files: number of files.
        tensors, bytes: number of tensors and their bytes, by dtype.
    """

    files: int
    tensors: Mapping[str, int]
    bytes: Mapping[str, int]

    @property
    def num_tensors(self) -> int:
        """Number of tensors of all dtypes."""
        return sum(self.tensors.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.bytes.values())

    def to_json(self) -> dict[str, Any]:
        """Return the files as plain data."""
        return {
            "files": self.files,
            "tensors": self.num_tensors,
            "bytes": self.total_bytes,
            "dtypes": {
                dtype: {"tensors": number, "bytes": self.bytes[dtype]} for dtype, number in self.tensors.items()
            },
        }


@dataclass(frozen=True)
class LedgerSummary:
    """The tensor mapping in numbers.

    Fields:
        counts: number of tensors by status.
        kept: tensors that are kept verbatim, grouped over layers and experts.
    """

    counts: Mapping[str, int]
    kept: tuple[LedgerRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain data."""
        return {
            "counts": dict(self.counts),
            "kept": [
                {"name": row.theirs, "count": row.count, "dtype": row.dtype, "shape": list(row.shape)}
                for row in self.kept
            ],
        }


@dataclass(frozen=True)
class CheckpointDescription:
    """A checkpoint, from config.json and the headers of weight files, if any.

    Fields:
        family: name of the model family.
        parsed: fields of config.json that were parsed.
        no_effect: fields that do not affect the computation; any other field would have been rejected.
        notes: remarks of the family on this config.
        model: layers, parameters and cost.
        files, ledger, storage: None if the folder has no weights.
        context: the context that fits in a given memory, if one was given.
        has_tokenizer: True if the folder has a tokenizer.json.
        generation: defaults for sampling.
    """

    family: str
    parsed: tuple[str, ...]
    no_effect: tuple[str, ...]
    notes: tuple[str, ...]
    model: ModelDescription
    files: WeightFiles | None
    ledger: LedgerSummary | None
    storage: Storage | None
    context: Context | None
    has_tokenizer: bool
    generation: GenerationConfig

    def to_json(self) -> dict[str, Any]:
        """Return the description as plain data."""
        generation = self.generation
        return {
            "family": self.family,
            "config": {
                "understood": list(self.parsed),
                "no_effect": list(self.no_effect),
                "notes": list(self.notes),
            },
            **self.model.to_json(),
            "files": None if self.files is None else self.files.to_json(),
            "ledger": None if self.ledger is None else self.ledger.to_json(),
            "storage": None if self.storage is None else self.storage.to_json(),
            "context": None if self.context is None else self.context.to_json(),
            "tokenizer": self.has_tokenizer,
            "generation": {
                "temperature": generation.temperature,
                "top_k": generation.top_k,
                "top_p": generation.top_p,
                "min_p": generation.min_p,
                "repetition_penalty": generation.repetition_penalty,
                "end_tokens": list(generation.end_tokens),
                "not_done": [*generation.unsupported, *generation.unsupported_in_sampling],
                "invalid": list(generation.invalid.values()),
                "unknown": list(generation.unknown),
            },
        }


def checkpoint_description(folder: Path, memory_bytes: int | None = None) -> CheckpointDescription:
    """Return the description of a checkpoint folder; of its tensors only scales are read, whether one is damaged.

    `memory_bytes`: memory that weights and KV cache shall fit in.

    Raises SpecError or CheckpointError.
    """
    has_weights = any(folder.glob("*.safetensors"))
    checkpoint = open_checkpoint(folder) if has_weights else None
    description = checkpoint.description if checkpoint else describe_checkpoint(folder)
    fields, spec = description.fields, description.spec
    warning = None if checkpoint is None else nonfinite_warning(checkpoint.damaged_scales(), str(folder))
    positions = fields.raw.get("max_position_embeddings")
    longest = [length for length in (spec.max_length, positions) if isinstance(length, int)]
    storage = None if checkpoint is None else storage_of(checkpoint)
    weight_bytes = float32_bytes(spec) if storage is None else storage.total.memory_bytes
    return CheckpointDescription(
        family=description.family.name,
        parsed=tuple(fields.understood),
        no_effect=tuple(fields.no_effect),
        notes=(*description.notes, *([] if warning is None else [warning])),
        model=model_description(spec, min([_LENGTH, *longest])),
        files=None if checkpoint is None else _weight_files(checkpoint),
        ledger=None if checkpoint is None else _ledger_summary(checkpoint),
        storage=storage,
        context=None
        if memory_bytes is None
        else context_in(memory_bytes, weight_bytes, spec, min(longest, default=None)),
        has_tokenizer=(folder / "tokenizer.json").is_file(),
        generation=read_generation_config(folder, fields.raw),
    )


def _weight_files(checkpoint: HuggingFaceCheckpoint) -> WeightFiles:
    tensors, sizes = Counter[str](), Counter[str]()
    for name, tensor in checkpoint.folder.tensors.items():
        tensors[tensor.dtype] += 1
        sizes[tensor.dtype] += checkpoint.folder.size_bytes(name)
    dtypes = sorted(tensors)
    return WeightFiles(
        len(checkpoint.folder.headers),
        {dtype: tensors[dtype] for dtype in dtypes},
        {dtype: sizes[dtype] for dtype in dtypes},
    )


def _ledger_summary(checkpoint: HuggingFaceCheckpoint) -> LedgerSummary:
    kept = tuple(row for row in ledger_rows(checkpoint.ledger) if row.status == "kept")
    return LedgerSummary(checkpoint.ledger.counts(), kept)


# --- the page --------------------------------------------------------------------------------------------------------


def checkpoint_page(known: CheckpointDescription, where: str) -> "RenderableType":
    """Return the page of `moezoo describe` for a checkpoint, with title `where`."""
    from rich.console import Group
    from rich.text import Text

    lines = [
        f"parsed from config.json: {_names(known.parsed)}",
        f"no effect on the computation: {_names(known.no_effect)}",
        *(f"note: {note}" for note in known.notes),
        *_weight_lines(known.files, known.ledger),
        f"generation: {_generation(known.generation)}",
    ]
    lines.append(cache_words(known.model.spec))
    if known.context is not None:
        lines.append(known.context.words())
    if not known.has_tokenizer:
        lines.append("tokenizer: none in this folder; pass prompts as --tokens")
    tables = model_tables(known.model, f"{where} ({known.family})")
    warnings = () if known.storage is None else known.storage.warnings
    if known.storage is not None:
        tables.append(storage_table(known.storage))
    return Group(
        *tables, *(Text(f"warning: {line}", "yellow") for line in warnings), *(Text(line, "dim") for line in lines)
    )


def _weight_lines(files: WeightFiles | None, ledger: LedgerSummary | None) -> list[str]:
    if files is None or ledger is None:
        return ["weights: none in this folder; described from config.json alone"]
    dtypes = ", ".join(f"{dtype} {bytes_text(size)}" for dtype, size in files.bytes.items())
    statuses = ", ".join(f"{number:,} {_STATUS_LABELS[status]}" for status, number in ledger.counts.items())
    lines = [
        f"weights: {bytes_text(files.total_bytes)} in {_amount(files.files, 'file')} ({dtypes})",
        f"ledger: {_amount(files.num_tensors, 'tensor')}: {statuses}",
    ]
    if ledger.kept:
        lines.append(f"kept verbatim: {_names([f'{row.count} x {row.theirs}' for row in ledger.kept])}")
    return lines


def _generation(known: GenerationConfig) -> str:
    filters = {
        "top_k": known.top_k,
        "top_p": known.top_p,
        "min_p": known.min_p,
        "repetition_penalty": known.repetition_penalty,
    }
    words = [f"temperature {known.temperature:g}" if known.temperature else "greedy"]
    words += [f"{name} {value:g}" for name, value in filters.items() if value is not None]
    ends = ", ".join(map(str, known.end_tokens))
    words.append(f"ends at token {ends}" if ends else "no end token")
    words += [f"{name} is not supported" for name in (*known.unsupported, *known.unsupported_in_sampling)]
    words += [f"{problem} is invalid" for problem in known.invalid.values()]
    return ", ".join(words)


def _names(names: Sequence[str], shown: int = 30) -> str:
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return (", ".join(names[:shown]) or "none") + more


def _amount(number: int, word: str) -> str:
    return f"{count(number) if number >= 10_000 else number} {word}{'' if number == 1 else 's'}"
