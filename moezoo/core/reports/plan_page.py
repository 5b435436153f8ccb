"""The report of `moezoo plan`: what a step costs each device by formula, and what XLA makes of it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moezoo.core.distributed.mesh import MeshAxis
from moezoo.core.reports.text import bytes_text, count, new_table, plural

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def plan_page(known: Mapping[str, Any], where: str) -> "RenderableType":
    """The page of `moezoo plan`, of what `plan_description` knows. `where` is its title."""
    from rich.console import Group
    from rich.text import Text

    named = _mesh_in_words(known["mesh"])
    sequences, parts = known["sequences"], known["micro_batches"]
    title = Text.assemble(
        (where, "bold"),
        f"\non {named}: {known['devices']:,} {plural('device', known['devices'])}, each with {sequences} "
        f"{plural('sequence', sequences)} of {known['sequence_length']:,} tokens at once, {parts} "
        f"{plural('time', parts)} a step\n{count(known['flops_per_token'], 'FLOPs')} per token, forward and backward; "
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
    table = new_table("memory of a device", "", "share", right=(1, 2))
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
    table = new_table("travels in a step", "as", "along", "arrays", "bytes", "a device sends", right=(3, 4, 5))
    for own in known["collectives"]:
        along = _along(own["axes"], known["mesh"])
        sizes = bytes_text(own["payload_bytes"]), bytes_text(own["sent_bytes"])
        table.add_row(own["purpose"], own["kind"], along, f"{own['arrays']:,}", *sizes)
    table.add_section()
    table.add_row("total", "", "", "", "", bytes_text(known["sent_bytes"]), style="bold")
    return table


def _compared_table(compiled: Mapping[str, Any]) -> "Table":
    depth, layers = compiled["all_layers"], compiled["layers"]
    what = f"{depth} {plural('layer', depth)} compiled"
    if layers != [depth]:
        what = f"{', '.join(map(str, layers))} layers compiled, {depth} derived"
    table = new_table(
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
