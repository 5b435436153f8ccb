"""Ledger of a checkpoint: every tensor of the files is mapped, kept verbatim, or rejected; none is dropped silently."""

import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from moezoo.core.errors import CheckpointError, counted
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.tensors import Fused, Placed, places
from moezoo.core.parameters import parameter_table
from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.spec import ModelSpec

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
INTEGERS = {"I64": "int64", "I32": "int32"}
"""Integer dtypes of safetensors that a table of experts by token id may have."""

# Prefixes of a text model's tensor names: alone, and in the wrappers of multimodal models; the first match is used.
_WRAPPERS: tuple[Mapping[str, str], ...] = (
    {},
    {"model.": "model.language_model."},
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    {"model.": "thinker.model.", "lm_head.": "thinker.lm_head."},
)

Status = Literal["mapped", "copy", "codes", "scales", "biases", "kept"]
# Scales of activations, which stay floats here.
_ACTIVATIONS = (
    *("*.input_scale", "*.activation_scale", "*.input_scale_ub", "*.k_scale", "*.v_scale"),
    *("*.input_global_scale", "*.input_zero_point", "*.qscale_act"),
)

Packing = Literal[
    "words", "blocks", "fp8", "bytes", "signed", "zero points", "divided", "multiplied", "gptq", "gptq v2", "awq"
]
"""How a file stores codes and what is beside them: see moezoo.core.huggingface.stored_rows."""


class Readable(NamedTuple):
    """A tensor as it is read: decoded from quantized codes, scales and biases, or plain.

    `stored`: names of the stored tensors that it is read from, the tensor or its codes first, then scales and biases,
    or what these follow from. `format`: of the codes. `reordered`: groups are of inputs in any order, which the last
    stored tensor has.
    """

    dtype: str
    shape: tuple[int, ...]
    stored: tuple[str, ...]
    format: QuantizationFormat | None = None
    packing: Packing = "words"
    reordered: bool = False


@dataclass(frozen=True)
class Entry:
    """A tensor of the files, its status, and the names of the parameters it contains."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    status: Status
    ours: tuple[str, ...] = ()


class Source(NamedTuple):
    """Source of a parameter, or of one expert's slice of it: a placed rule and the index of its part."""

    placed: Placed
    place: int
    name: str  # name of the tensor in the files


@dataclass(frozen=True)
class Ledger:
    """The tensor mapping of a checkpoint: the status of every tensor and the sources of every parameter.

    Fields:
        entries: one per tensor, in file order.
        sources: by canonical name, the tensors from which the parameter is assembled.
        placed: by name of a mapped tensor, the rule that maps it.
        copies: duplicate tensors that must equal their parameter.
    """

    entries: tuple[Entry, ...]
    sources: Mapping[str, tuple[Source, ...]]
    placed: Mapping[str, Placed]
    copies: tuple[Source, ...] = field(default=())

    def counts(self) -> dict[str, int]:
        """Return the number of tensors of each status."""
        return dict(Counter(entry.status for entry in self.entries))


def make_ledger(
    family: Family,
    rules: Sequence[Fused],
    spec: ModelSpec,
    readable: Mapping[str, Readable],
    stored: Mapping[str, tuple[str, str, tuple[int, ...]]],
    where: str,
) -> Ledger:
    """Match the files' tensors (`stored`: file, dtype, shape) with rules of the family and the spec's parameters.

    Raises CheckpointError for an unknown tensor, for a parameter with no or several sources, and for a shape or dtype
    that does not match the spec.
    """
    shapes = {row.name: row.shape for row in parameter_table(spec)}
    num_layers = len(spec.all_layers)
    wrap = wrapping(family, readable)
    sources: dict[str, list[Source]] = {}
    copies: list[Source] = []
    holders: dict[str, Placed] = {}
    copied: set[str] = set()
    for name, placed in _found(rules, shapes, num_layers, wrap, readable).items():
        _check(name, placed, readable[name], stored, where)
        holders[name] = placed
        if placed.rule.copy:
            copies.append(Source(placed, 0, name))
            copied.add(name)
            continue
        for place, (ours, _, _) in enumerate(placed.parts):
            sources.setdefault(ours, []).append(Source(placed, place, name))
    _check_cover(shapes, sources, lambda: first_rules(rules, spec), wrap, where)
    entries = _entries(family, readable, stored, holders, copied, where, num_layers)
    gathered = {name: tuple(found) for name, found in sources.items()}
    return Ledger(entries, gathered, holders, tuple(copies))


def _found(
    rules: Iterable[Fused],
    shapes: Mapping[str, tuple[int, ...]],
    num_layers: int,
    wrap: Callable[[str], str],
    readable: Mapping[str, Readable],
) -> dict[str, Placed]:
    """Return the rule of each tensor of the files that has one; of several, the first that has the tensor's shape."""
    found: dict[str, Placed] = {}
    for rule in rules:
        for placed in places(rule, shapes, num_layers):
            name = wrap(placed.name)
            if name in readable and (name not in found or found[name].shape != readable[name].shape == placed.shape):
                found[name] = placed
    return found


def _entries(
    family: Family,
    readable: Mapping[str, Readable],
    stored: Mapping[str, tuple[str, str, tuple[int, ...]]],
    holders: Mapping[str, Placed],
    copied: Container[str],
    where: str,
    num_layers: int,
) -> tuple[Entry, ...]:
    """Return an entry per tensor of the files. Raises CheckpointError if one is unknown."""
    wrap = wrapping(family, readable)
    entries = []
    unknown = []
    part_of: dict[str, tuple[str, Status]] = {}
    for own in holders:
        first, *beside = readable[own].stored
        has_biases = readable[own].format is not None and len(beside) > 1 and readable[own].packing == "words"
        part_of[first] = (own, "copy" if own in copied else "codes" if beside else "mapped")
        part_of |= {part: (own, "biases" if has_biases and place else "scales") for place, part in enumerate(beside)}
    for name, (file, dtype, shape) in stored.items():
        if name in part_of:
            codes, status = part_of[name]
            entries.append(Entry(name, file, dtype, shape, status, holders[codes].ours))
        elif _is_kept(family, name, wrap, num_layers):
            entries.append(Entry(name, file, dtype, shape, "kept"))
        else:
            unknown.append(f"{name} {dtype} {list(shape)} in {file}")
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise CheckpointError(
            f"{where} has {counted(len(unknown), 'tensor')} unknown for {family.name}: {'; '.join(unknown[:5])}{more}. "
            "No tensor is dropped silently: check that config.json belongs to these files."
        )
    return tuple(entries)


def first_rules(rules: Iterable[Fused], spec: ModelSpec) -> dict[str, Placed]:
    """Return the tensors of a layout by name, from the first of these rules for each parameter."""
    shapes = {row.name: row.shape for row in parameter_table(spec)}
    rule_of: dict[str, Fused] = {}
    found: dict[str, Placed] = {}
    for rule in rules:
        for placed in places(rule, shapes, len(spec.all_layers)):
            # A rule with one tensor per expert is placed once per expert, with the same parameter each time.
            if not rule.copy and all(rule_of.setdefault(ours, rule) is rule for ours in placed.ours):
                found[placed.name] = placed
    return found


def wrapping(family: Family, names: Container[str]) -> Callable[[str], str]:
    """Return a function that maps names of the tensor mapping to those in the files, by the name of the embedding."""
    embedding = family.tensors[0]

    def wrapped(name: str, prefixes: Mapping[str, str]) -> str:
        for prefix, other in prefixes.items():
            if name.startswith(prefix):
                return other + name[len(prefix) :]
        return name

    prefixes = next((each for each in _WRAPPERS if wrapped(embedding.theirs, each) in names), {})
    return lambda name: wrapped(name, prefixes)


def _check(
    name: str,
    placed: Placed,
    tensor: Readable,
    stored: Mapping[str, tuple[str, str, tuple[int, ...]]],
    where: str,
) -> None:
    file = stored[tensor.stored[0]][0]
    if math.prod(tensor.shape) != math.prod(placed.shape) or tensor.shape != placed.shape:
        raise CheckpointError(
            f"{where}: {name} in {file} has shape {list(tensor.shape)}; expected "
            f"{list(placed.shape)} from config.json. Use the config.json that belongs to these files."
        )
    if is_table(placed) and tensor.dtype not in INTEGERS:
        raise CheckpointError(
            f"{where}: {name} in {file} is {tensor.dtype}; expected {' or '.join(INTEGERS)}, the ids of experts. "
            "Fetch the checkpoint again."
        )
    if not is_table(placed) and tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{where}: {name} in {file} is {tensor.dtype}; expected {', '.join(FLOATS)}, or a "
            "supported quantization declared in config.json (FP8, MXFP4, compressed-tensors, mlx-lm's, ...)."
        )


def is_table(placed: Placed) -> bool:
    """Return True for a table of experts by token id, which files have as integers."""
    return placed.ours[0].endswith(".hash_table")


def stored_dtype(placed: Placed, floats: str) -> str:
    """Return the dtype of a tensor in files whose floats have that dtype."""
    return "I64" if is_table(placed) else floats


def _check_cover(
    shapes: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, list[Source]],
    named: Callable[[], Mapping[str, Placed]],
    wrap: Callable[[str], str],
    where: str,
) -> None:
    """Raise unless every parameter has exactly one source. `named`: returns tensors that would have them, by name."""
    missing: dict[str, tuple[int | None, str]] = {}  # an absent expert, and words, by parameter
    for name, shape in shapes.items():
        found = sources.get(name, [])
        experts = Counter(source.placed.parts[source.place][1] for source in found)
        repeated = [expert for expert, count in experts.items() if count > 1]
        if repeated or (None in experts and len(experts) > 1):
            names = ", ".join(source.name for source in found[:4])
            raise CheckpointError(f"{where} has {name} more than once: {names}. Use files of one layout.")
        if not found:
            missing[name] = None, f"{name} {list(shape)}"
        elif None not in experts:
            # One tensor per expert: the rule was placed for each of them, so their number is the size of axis e.
            expected = found[0].placed.expert_count
            if len(experts) != expected:
                absent = [expert for expert in range(expected) if expert not in experts]
                shown = ", ".join(map(str, absent[:8])) + (" ..." if absent[8:] else "")
                missing[name] = absent[0], f"{name} of experts {shown}"
    if missing:
        theirs = {(ours, expert): wrap(each) for each, rule in named().items() for ours, expert, _ in rule.parts}
        shown = "; ".join(
            f"{words} (in {theirs.get((name, expert), theirs.get((name, 0)))})"
            for name, (expert, words) in list(missing.items())[:5]
        )
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(
            f"{where} is missing {counted(len(missing), 'parameter')} of the model in config.json: {shown}{more}. "
            "Fetch all files of the checkpoint, or use the config.json that belongs to them."
        )


def _is_kept(family: Family, name: str, wrap: Callable[[str], str], num_layers: int) -> bool:
    if any(fnmatchcase(name, pattern) or fnmatchcase(name, wrap(pattern)) for pattern in (*family.kept, *_ACTIVATIONS)):
        return True
    layer = re.match(re.escape(wrap("model.layers.")) + r"(\d+)\.", name)
    return family.later_layers_kept and layer is not None and int(layer[1]) >= num_layers


@dataclass(frozen=True)
class LedgerRow:
    """Tensors that differ only in layer and expert index, which `*` replaces in names."""

    theirs: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    status: str
    ours: tuple[str, ...]


def ledger_rows(ledger: Ledger) -> list[LedgerRow]:
    """Return the ledger with equal tensors of all layers and experts grouped in one row."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in ledger.entries:
        theirs, ours = _pattern(entry.name), tuple(_pattern(name) for name in entry.ours)
        groups.setdefault((theirs, entry.dtype, entry.shape, entry.status, ours), []).append(entry)
    return [
        LedgerRow(theirs, dtype, shape, len(entries), status, ours)
        for (theirs, dtype, shape, status, ours), entries in groups.items()
    ]


def ledger_text(ledger: Ledger) -> str:
    """Return the ledger as text, one line per row: status, dtype and shape, count, tensor name, parameters."""
    rows = [
        (row.status, f"{row.dtype} {list(row.shape)}", f"{row.count}x", row.theirs, ", ".join(row.ours))
        for row in ledger_rows(ledger)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{status:<{widths[0]}}  {stored:<{widths[1]}}  {count:>{widths[2]}}  {theirs}{' -> ' if ours else ''}{ours}"
        for status, stored, count, theirs, ours in rows
    )


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
