"""The report of `moezoo plan`: what a step costs each device by formula, and what XLA makes of it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moezoo.core.config.run_config import Config
from moezoo.core.cost.memory import flops_per_token
from moezoo.core.cost.step_plan import Collective, CompiledStep, device_plan
from moezoo.core.distributed.mesh import BATCH_AXES, MeshAxis
from moezoo.core.errors import SpecError
from moezoo.core.reports.model_page import bytes_text, count

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def memory_bytes(text: str) -> int:
    """Bytes of `80GiB`. Raises SpecError for what is no number with a unit."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]i?B)", text)
    if found is None or found[2] not in _UNITS:
        raise SpecError(f"--memory is {text!r}; expected a number and a unit, one of {', '.join(_UNITS)}, e.g. 80GiB.")
    return int(float(found[1]) * _UNITS[found[2]])


def plan_description(
    config: Config,
    lengths: Mapping[MeshAxis, int],
    memory: int | None = None,
    compiled: tuple[Config, Mapping[MeshAxis, int], CompiledStep] | None = None,
) -> dict[str, Any]:
    """A plan as plain data for `--json`: bytes and operations of one device and one step, unless a name says otherwise.

    Args:
        config: whose model has a vocabulary.
        lengths: devices along each axis of its mesh.
        memory: bytes that a device has, if it is asked whether the step fits.
        compiled: what was compiled, for which mesh, and what came of it.
    """
    training, plan = config.training, device_plan(config, lengths)
    devices = math.prod(lengths.values())
    of_token = flops_per_token(config.model, training.sequence_length, training=True).total
    sequences = training.batch_size // training.gradient_accumulation // math.prod(lengths[axis] for axis in BATCH_AXES)
    return {
        "mesh": dict(lengths),
        "devices": devices,
        "exchange": config.mesh.exchange,
        "micro_batches": training.gradient_accumulation,
        "sequences": sequences,
        "sequence_length": training.sequence_length,
        "flops_per_token": of_token,
        "flops": of_token * training.batch_size * training.sequence_length // devices,
        "memory_bytes": {"total": plan.memory_total, **plan.memory},
        "memory_limit_bytes": memory,
        "fits": None if memory is None else plan.memory_total <= memory,
        "collectives": [
            {
                "purpose": own.purpose,
                "kind": own.kind,
                "axes": list(own.axes),
                "devices": own.devices,
                "arrays": own.count,
                "payload_bytes": own.payload,
                "sent_bytes": own.sent,
            }
            for own in plan.collectives
        ],
        "sent_bytes": plan.sent,
        "compiled": None if compiled is None else _compared(*compiled),
        "extrapolated": compiled is None or dict(compiled[1]) != dict(lengths),
    }


def _compared(config: Config, lengths: Mapping[MeshAxis, int], step: CompiledStep) -> dict[str, Any]:
    """A compiled step beside the formulas for it, which count numbers as XLA on the CPU sends them: float32."""
    plan = device_plan(config, lengths, float_bytes=4)
    formula, program = _by_axes(plan.collectives), _by_axes(step.collectives)
    memory = plan.memory
    return {
        "mesh": dict(lengths),
        "devices": math.prod(lengths.values()),
        "layers": list(step.layers),
        "all_layers": len(config.model.all_layers),
        "collectives": [
            {
                "kind": kind,
                "axes": list(axes),
                "formula": dict(zip(("arrays", "bytes"), formula.get((kind, axes), (0, 0)), strict=True)),
                "program": dict(zip(("arrays", "bytes"), program.get((kind, axes), (0, 0)), strict=True)),
            }
            for kind, axes in dict.fromkeys([*formula, *program])
        ],
        "argument_bytes": {
            "formula": memory["parameters"] + memory["moments"] + memory["state"],
            "program": step.arguments,
        },
        "temporary_bytes": step.temporary,
    }


def _by_axes(
    collectives: Sequence[Collective],
) -> dict[tuple[str, tuple[MeshAxis, ...]], tuple[int, int]]:
    """How many arrays, and their bytes, of each kind and along each of the axes."""
    found: dict[tuple[str, tuple[MeshAxis, ...]], tuple[int, int]] = {}
    for own in collectives:
        arrays, size = found.get((own.kind, own.axes), (0, 0))
        found[own.kind, own.axes] = (arrays + own.count, size + own.payload)
    return found


# --- the page --------------------------------------------------------------------------------------------------------


def plan_page(known: Mapping[str, Any], where: str) -> "RenderableType":
    """The page of `moezoo plan`, of what `plan_description` knows. `where` is its title."""
    from rich.console import Group
    from rich.text import Text

    named = _mesh_in_words(known["mesh"])
    sequences, parts = known["sequences"], known["micro_batches"]
    title = Text.assemble(
        (where, "bold"),
        f"\non {named}: {known['devices']:,} {_plural('device', known['devices'])}, each with {sequences} "
        f"{_plural('sequence', sequences)} of {known['sequence_length']:,} tokens at once, {parts} "
        f"{_plural('time', parts)} a step\n{count(known['flops_per_token'], 'FLOPs')} per token, forward and backward; "
        f"{count(known['flops'], 'FLOPs')} a device and step",
    )
    pieces: list[RenderableType] = [title, _memory_table(known)]
    if known["collectives"]:
        pieces.append(_collective_table(known))
    pieces.append(Text(_basis(known), "yellow" if known["extrapolated"] else "dim"))
    if known["compiled"] is not None:
        pieces.append(_compared_table(known["compiled"]))
    if "chip" in known:
        chip = known["chip"]
        held, more = (bytes_text(chip[name]) for name in ("argument_bytes", "temporary_bytes"))
        pieces.append(
            Text(f"a chip of {chip['topology']}, by the compiler for TPUs: {held} that stay, {more} that come and go")
        )
    return Group(*pieces)


def _basis(known: Mapping[str, Any]) -> str:
    compiled = known["compiled"]
    if compiled is None:
        return "all by formula; nothing was compiled"
    by = f"by formula, held against XLA's program for {compiled['devices']} simulated devices"
    return f"extrapolated {by}" if known["extrapolated"] else by


def _memory_table(known: Mapping[str, Any]) -> "Table":
    table = _table("memory of a device", "", "share")
    memory = known["memory_bytes"]
    rows = [(name, size) for name, size in memory.items() if name != "total" and size]
    for place, (name, size) in enumerate(rows):
        table.add_row(name, bytes_text(size), f"{size / memory['total']:.1%}", end_section=place + 1 == len(rows))
    table.add_row("total", bytes_text(memory["total"]), "", style="bold")
    if known["fits"] is not None:
        verdict = "fits" if known["fits"] else "does not fit"
        style = "green" if known["fits"] else "red"
        table.add_row(f"{verdict} into {bytes_text(known['memory_limit_bytes'])}", "", "", style=style)
    return table


def _collective_table(known: Mapping[str, Any]) -> "Table":
    table = _table("travels in a step", "as", "along", "arrays", "bytes", "a device sends", right=(3, 4, 5))
    for own in known["collectives"]:
        along = _along(own["axes"], known["mesh"])
        sizes = bytes_text(own["payload_bytes"]), bytes_text(own["sent_bytes"])
        table.add_row(own["purpose"], own["kind"], along, f"{own['arrays']:,}", *sizes)
    table.add_section()
    table.add_row("total", "", "", "", "", bytes_text(known["sent_bytes"]), style="bold")
    return table


def _compared_table(compiled: Mapping[str, Any]) -> "Table":
    depth, layers = compiled["all_layers"], compiled["layers"]
    what = f"{depth} {_plural('layer', depth)} compiled"
    if layers != [depth]:
        what = f"{', '.join(map(str, layers))} layers compiled, {depth} derived"
    table = _table(
        f"XLA's program on {_mesh_in_words(compiled['mesh'])}",
        "arrays",
        "formula",
        "bytes",
        "formula",
        right=range(1, 5),
    )
    for own in compiled["collectives"]:
        formula, program = own["formula"], own["program"]
        table.add_row(
            f"{own['kind']} along {_along(own['axes'], compiled['mesh'])}",
            f"{program['arrays']:,}",
            f"{formula['arrays']:,}",
            f"{program['bytes']:,}",
            f"{formula['bytes']:,}",
        )
    held = compiled["argument_bytes"]
    table.add_row("parameters, moments, state; and the batch", "", "", f"{held['program']:,}", f"{held['formula']:,}")
    temporary = compiled["temporary_bytes"]
    if temporary is not None:
        table.add_row("temporary, as the CPU has it", "", "", f"{temporary:,}", "")
    table.caption = f"{what}; numbers travel as float32 on the CPU"
    table.caption_justify = "left"
    return table


def _along(axes: Sequence[MeshAxis], mesh: Mapping[MeshAxis, int]) -> str:
    return ", ".join(f"{axis} {mesh[axis]}" for axis in axes)


def _mesh_in_words(mesh: Mapping[MeshAxis, int]) -> str:
    return _along([axis for axis, size in mesh.items() if size > 1], mesh) or "one device"


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"


def _table(first: str, *others: str, right: Sequence[int] = (1, 2)) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column(first)
    for place, name in enumerate(others, start=1):
        table.add_column(name, justify="right" if place in right else "left", no_wrap=place in right)
    return table
