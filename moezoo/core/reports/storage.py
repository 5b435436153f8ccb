"""Storage of a checkpoint's weights: formats, bits per weight and bytes by role; the context that fits in memory."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moezoo.core.cost.memory import cache_bytes, largest_context
from moezoo.core.errors import counted
from moezoo.core.huggingface.checkpoint import HuggingFaceCheckpoint
from moezoo.core.huggingface.export_layout import role_of
from moezoo.core.huggingface.ledger import FLOATS
from moezoo.core.huggingface.recipe import ROLES
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.precision import STORED_DTYPES
from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.reports.text import bytes_text, new_table
from moezoo.core.spec import ModelSpec

if TYPE_CHECKING:
    from rich.table import Table

PROCESS_BYTES = 300_000_000
"""Memory of a process besides weights and KV cache: libraries and the arrays of a step."""

_FLOAT32_BYTES = 4
_SAFE_ROUTER_BITS = 8


@dataclass(frozen=True)
class RoleStorage:
    """Weights of a role: their formats or dtypes, number, and bytes in the files and in memory."""

    formats: tuple[str, ...]
    numbers: int
    file_bytes: int
    memory_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits in the files per number, scales and biases included."""
        return 8 * self.file_bytes / self.numbers

    def to_json(self) -> dict[str, Any]:
        """Return the storage as plain data."""
        return {
            "formats": list(self.formats),
            "parameters": self.numbers,
            "bits_per_weight": self.bits_per_weight,
            "file_bytes": self.file_bytes,
            "memory_bytes": self.memory_bytes,
        }


@dataclass(frozen=True)
class Storage:
    """Weights by role, with warnings on formats that harm the model or cost memory."""

    by_role: Mapping[str, RoleStorage]
    warnings: tuple[str, ...]

    @property
    def total(self) -> RoleStorage:
        """Sum of all roles."""
        each = self.by_role.values()
        sums = (sum(getattr(role, name) for role in each) for name in ("numbers", "file_bytes", "memory_bytes"))
        return RoleStorage((), *sums)

    def to_json(self) -> dict[str, Any]:
        """Return the storage as plain data."""
        roles = {name: role.to_json() for name, role in self.by_role.items()}
        return {"total": self.total.to_json(), "by_role": roles, "warnings": list(self.warnings)}


@dataclass(frozen=True)
class Context:
    """Context that fits in memory beside the weights.

    Fields:
        memory_bytes: of the machine.
        weight_bytes: of the weights in memory.
        tokens: largest length of one sequence; None: unlimited, since no layer caches all tokens.
        is_maximum: it is the model's maximum length.
    """

    memory_bytes: int
    weight_bytes: int
    tokens: int | None
    is_maximum: bool

    def to_json(self) -> dict[str, Any]:
        """Return the context as plain data."""
        return {"memory_bytes": self.memory_bytes, "weight_bytes": self.weight_bytes, "largest_context": self.tokens}

    def words(self) -> str:
        """Return a line for the page."""
        line = f"{bytes_text(self.memory_bytes)} of memory: weights {bytes_text(self.weight_bytes)}, "
        line += f"{bytes_text(PROCESS_BYTES)} for the process; "
        if self.tokens is None:
            return line + "context of any length"
        if self.tokens == 0:
            return line + "too little for the KV cache of one token"
        return line + f"context of {self.tokens:,} tokens" + (", the model's maximum" if self.is_maximum else "")


def context_in(memory_bytes: int, weight_bytes: int, spec: ModelSpec, longest: int | None) -> Context:
    """Return the largest context in this memory; `longest`: the model's maximum length, if it has one."""
    free = memory_bytes - weight_bytes - PROCESS_BYTES
    tokens = largest_context(spec, free) if free > 0 else 0
    is_maximum = longest is not None and (tokens is None or tokens >= longest)
    return Context(memory_bytes, weight_bytes, longest if is_maximum else tokens, is_maximum)


def float32_bytes(spec: ModelSpec) -> int:
    """Return the bytes of all parameters in float32."""
    return _FLOAT32_BYTES * sum(row.size for row in parameter_table(spec))


def storage_of(checkpoint: HuggingFaceCheckpoint) -> Storage:
    """Return the storage of a checkpoint's weights; no tensor is read."""
    rows = {row.name: row for row in parameter_table(checkpoint.spec)}
    roles = {name: role_of(name, row.role) for name, row in rows.items()}
    file_bytes: Counter[str] = Counter()
    for entry in checkpoint.ledger.entries:
        if entry.ours and entry.status != "copy":
            file_bytes[roles[entry.ours[0]]] += checkpoint.folder.size_bytes(entry.name)
    memory_bytes = _memory_bytes(checkpoint)
    found = {}
    for role in (*ROLES, "norms"):
        names = [name for name in rows if roles[name] == role]
        if names:
            formats = sorted({_words(stored) for name in names for stored in _stored(checkpoint, name)})
            numbers = sum(rows[name].size for name in names)
            memory = sum(memory_bytes[name] for name in names)
            found[role] = RoleStorage(tuple(formats), numbers, file_bytes[role], memory)
    return Storage(found, tuple(_warnings(checkpoint, memory_bytes)))


def _stored(checkpoint: HuggingFaceCheckpoint, name: str) -> Iterator[QuantizationFormat | str]:
    """Yield the format or dtype of each tensor of a parameter."""
    for source in checkpoint.ledger.sources[name]:
        tensor = checkpoint.layout.readable.get(source.name)
        yield checkpoint.folder.tensors[source.name].dtype if tensor is None or tensor.format is None else tensor.format


def _words(stored: QuantizationFormat | str) -> str:
    return FLOATS.get(stored, stored) if isinstance(stored, str) else str(stored)


def _memory_bytes(checkpoint: HuggingFaceCheckpoint) -> dict[str, int]:
    """Return the bytes of each parameter in memory, in codes if it can stay in them."""
    dtypes, weights = checkpoint.weights.dtypes, checkpoint.weights
    found = {}
    for name, shape in weights.shapes.items():
        codes = weights.stored_bytes(name)
        itemsize = dtypes[name].itemsize if dtypes[name].name in STORED_DTYPES else _FLOAT32_BYTES
        found[name] = math.prod(shape) * itemsize if codes is None else codes
    return found


def _warnings(checkpoint: HuggingFaceCheckpoint, memory_bytes: Mapping[str, int]) -> Iterator[str]:
    if not checkpoint.layout.readable:
        return
    rows = parameter_table(checkpoint.spec)
    bits = [
        stored.bits
        for row in rows
        if row.role == "router"
        for stored in _stored(checkpoint, row.name)
        if isinstance(stored, QuantizationFormat)
    ]
    if bits and min(bits) < _SAFE_ROUTER_BITS:
        yield (
            f"the router has {min(bits)} bits, which changes the experts that are chosen; "
            "quantize it with --router 8bit, which costs almost nothing"
        )
    experts = [row for row in rows if row.role == "routed experts" and len(row.shape) == 3]
    floats = [row for row in experts if any(isinstance(stored, str) for stored in _stored(checkpoint, row.name))]
    if floats:
        size = sum(memory_bytes[row.name] for row in floats)
        yield (
            f"{counted(len(floats), 'parameter')} of routed experts in floats ({bytes_text(size)}): a "
            f"group does not divide the rows, or they were left so: {floats[0].name} {list(floats[0].shape)}, ..."
        )
    yield from checkpoint.weights.decoded_notes()


def storage_table(storage: Storage) -> "Table":
    """Return the table of the page."""
    table = new_table("weights", "stored as", "bits per weight", "in files", "in memory", right=range(2, 5))
    for place, (name, role) in enumerate(storage.by_role.items()):
        table.add_row(name, "; ".join(role.formats), *_cells(role), end_section=place + 1 == len(storage.by_role))
    table.add_row("total", "", *_cells(storage.total), style="bold")
    return table


def _cells(role: RoleStorage) -> tuple[str, str, str]:
    return f"{role.bits_per_weight:.2f}", bytes_text(role.file_bytes), bytes_text(role.memory_bytes)


def cache_words(spec: ModelSpec) -> str:
    """Return the size of the KV cache of 1,000 tokens as a line."""
    return f"KV cache: {bytes_text(cache_bytes(spec, 1000))} per 1,000 tokens of a sequence"
