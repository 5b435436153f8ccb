"""Every tensor of the files is mapped, kept verbatim, or refused; none is dropped silently."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from moezoo.core.errors import CheckpointError
from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.tensors import Fused, Placed, places
from moezoo.core.parameters import parameter_table
from moezoo.core.spec import ModelSpec

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Names of a text model's tensors alone, and inside the wrappers of multimodal models, the first that fits.
_WRAPPERS: tuple[Mapping[str, str], ...] = (
    {},
    {"model.": "model.language_model."},
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
)

Status = Literal["mapped", "copy", "codes", "scales", "kept"]


class Readable(NamedTuple):
    """A tensor as numbers: what quantized codes and their scales stand for, or a stored tensor as it is.

    `stored`: the names of what it is read from, the main one first.
    """

    dtype: str
    shape: tuple[int, ...]
    stored: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor of the files, and what becomes of it: our parameters that it holds, or why it is kept."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    status: Status
    ours: tuple[str, ...] = ()


class Source(NamedTuple):
    """Where a parameter, or one expert's share of it, stands: a placed rule, and which of its parts."""

    placed: Placed
    place: int
    name: str  # of the tensor in the files


@dataclass(frozen=True)
class Ledger:
    """What becomes of every tensor, and where every parameter comes from.

    Fields:
        entries: one for each tensor, in the files' order.
        sources: by canonical name, what the parameter is put together from.
        placed: by the name of a tensor that holds parameters, which and how.
        copies: second copies that must equal their parameter.
    """

    entries: tuple[Entry, ...]
    sources: Mapping[str, tuple[Source, ...]]
    placed: Mapping[str, Placed]
    copies: tuple[Source, ...] = field(default=())

    def counts(self) -> dict[str, int]:
        """How many tensors of each status."""
        return dict(Counter(entry.status for entry in self.entries))


def make_ledger(
    family: Family,
    spec: ModelSpec,
    readable: Mapping[str, Readable],
    stored: Mapping[str, tuple[str, str, tuple[int, ...]]],
    where: str,
) -> Ledger:
    """Match the files' tensors (`stored`: file, dtype, shape) with the family's name table and the spec's parameters.

    Raises CheckpointError: a tensor that nothing explains, a parameter that no tensor gives or two do, another shape
    or dtype than the spec's.
    """
    shapes = {row.name: row.shape for row in parameter_table(spec)}
    num_layers = len(spec.all_layers)
    wrap = wrapping(family, readable)
    sources: dict[str, list[Source]] = {}
    copies: list[Source] = []
    holders: dict[str, Placed] = {}
    copied: set[str] = set()
    for rule in family.tensors:
        for placed in places(rule, shapes, num_layers):
            name = wrap(placed.name)
            if name not in readable:
                continue
            _check(name, placed, readable[name], stored, where)
            if rule.copy:
                if name not in holders:
                    copies.append(Source(placed, 0, name))
                    copied.add(name)
                    holders[name] = placed
                continue
            holders[name] = placed
            for place, (ours, _, _) in enumerate(placed.parts):
                sources.setdefault(ours, []).append(Source(placed, place, name))
    _check_cover(shapes, sources, where)
    entries = []
    unknown = []
    part_of = {part: name for name, tensor in readable.items() for part in tensor.stored[1:] if name in holders}
    for name, (file, dtype, shape) in stored.items():
        if name in holders:
            status: Status = "copy" if name in copied else "codes" if len(readable[name].stored) > 1 else "mapped"
            entries.append(Entry(name, file, dtype, shape, status, holders[name].ours))
        elif name in part_of:
            entries.append(Entry(name, file, dtype, shape, "scales", holders[part_of[name]].ours))
        elif _is_kept(family, name, wrap, num_layers):
            entries.append(Entry(name, file, dtype, shape, "kept"))
        else:
            unknown.append(f"{name} {dtype} {list(shape)} in {file}")
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise CheckpointError(
            f"{where} has {len(unknown)} tensors that {family.name} has no place for: {'; '.join(unknown[:5])}{more}. "
            "Nothing is dropped silently: check that config.json belongs to these files."
        )
    gathered = {name: tuple(found) for name, found in sources.items()}
    return Ledger(tuple(entries), gathered, holders, tuple(copies))


def first_rules(family: Family, spec: ModelSpec) -> dict[str, Placed]:
    """The tensors of a layout of the family's own, by name: the first rule for each parameter."""
    shapes = {row.name: row.shape for row in parameter_table(spec)}
    given: dict[str, Fused] = {}
    found: dict[str, Placed] = {}
    for rule in family.tensors:
        for placed in places(rule, shapes, len(spec.all_layers)):
            # A rule with one tensor an expert is placed once for each of them, and gives the parameter each time.
            if not rule.copy and all(given.setdefault(ours, rule) is rule for ours in placed.ours):
                found[placed.name] = placed
    return found


def wrapping(family: Family, readable: Mapping[str, Readable]) -> Callable[[str], str]:
    """How names of the name table are spelled in these files, told by that of its first tensor, the embedding."""
    embedding = family.tensors[0]

    def wrapped(name: str, prefixes: Mapping[str, str]) -> str:
        for prefix, other in prefixes.items():
            if name.startswith(prefix):
                return other + name[len(prefix) :]
        return name

    prefixes = next((each for each in _WRAPPERS if wrapped(embedding.theirs, each) in readable), {})
    return lambda name: wrapped(name, prefixes)


def _check(
    name: str,
    placed: Placed,
    tensor: Readable,
    stored: Mapping[str, tuple[str, str, tuple[int, ...]]],
    where: str,
) -> None:
    if math.prod(tensor.shape) != math.prod(placed.shape) or tensor.shape != placed.shape:
        raise CheckpointError(
            f"{where}: {name} in {stored[name][0]} is {list(tensor.shape)}; config.json asks for "
            f"{list(placed.shape)}. Use the config.json that belongs to these files."
        )
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{where}: {name} in {stored[name][0]} is {tensor.dtype}; expected {', '.join(FLOATS)}, or a quantization "
            "that its config.json names and moezoo knows (FP8 in blocks, MXFP4)."
        )


def _check_cover(shapes: Mapping[str, tuple[int, ...]], sources: Mapping[str, list[Source]], where: str) -> None:
    """Every parameter comes from somewhere, and from one place only."""
    missing = []
    for name, shape in shapes.items():
        found = sources.get(name, [])
        experts = Counter(source.placed.parts[source.place][1] for source in found)
        twice = [expert for expert, count in experts.items() if count > 1]
        if twice or (None in experts and len(experts) > 1):
            names = ", ".join(source.name for source in found[:4])
            raise CheckpointError(f"{where} holds {name} more than once: {names}. Use files of one layout.")
        if not found:
            missing.append(f"{name} {list(shape)}")
        elif None not in experts:
            # One tensor an expert: the rule was placed for each of them, so their number is that of axis e.
            expected = found[0].placed.expert_count
            if len(experts) != expected:
                absent = [str(expert) for expert in range(expected) if expert not in experts]
                missing.append(f"{name} of experts {', '.join(absent[:8])}{' ...' if len(absent) > 8 else ''}")
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(
            f"{where} lacks {len(missing)} parameters of the model that config.json describes: "
            f"{'; '.join(missing[:5])}{more}. Fetch all of its files."
        )


def _is_kept(family: Family, name: str, wrap: Callable[[str], str], num_layers: int) -> bool:
    if any(fnmatchcase(name, pattern) or fnmatchcase(name, wrap(pattern)) for pattern in family.kept):
        return True
    layer = re.match(re.escape(wrap("model.layers.")) + r"(\d+)\.", name)
    return family.later_layers_kept and layer is not None and int(layer[1]) >= num_layers


@dataclass(frozen=True)
class LedgerRow:
    """Tensors that differ in layer and expert only: `*` stands for a number."""

    theirs: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    status: str
    ours: tuple[str, ...]


def ledger_rows(ledger: Ledger) -> list[LedgerRow]:
    """The ledger, equal tensors of many layers and experts in one row."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in ledger.entries:
        theirs, ours = _pattern(entry.name), tuple(_pattern(name) for name in entry.ours)
        groups.setdefault((theirs, entry.dtype, entry.shape, entry.status, ours), []).append(entry)
    return [
        LedgerRow(theirs, dtype, shape, len(entries), status, ours)
        for (theirs, dtype, shape, status, ours), entries in groups.items()
    ]


def ledger_text(ledger: Ledger) -> str:
    """The ledger for a person, a line for each row: what becomes of it, how it is stored, how often, its name, ours."""
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
