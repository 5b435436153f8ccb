"""Where a model's parameters lie on a mesh, and how many bytes of them a device has: before any device is there."""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moezoo.core.distributed.mesh import MeshAxis, MeshConfig, known_sizes
from moezoo.core.distributed.sharding_rules import Partition, partition
from moezoo.core.parameters import parameter_table
from moezoo.core.reports.text import bytes_text, new_table
from moezoo.core.spec import ModelSpec

if TYPE_CHECKING:
    from rich.console import RenderableType

FLOAT32_BYTES = 4


def mesh_description(spec: ModelSpec, mesh: MeshConfig, num_devices: int | None = None) -> dict[str, Any]:
    """Of each parameter its shape, what cuts each dimension, and its float32 bytes on a device; and sums of them.

    `num_devices`: how many there are, which an axis `auto` needs. Raises SpecError where mesh, model and devices do not
    fit, with the parameter and the rule.
    """
    lengths = known_sizes(mesh, num_devices)
    rows = []
    moments = 0
    for row in parameter_table(spec):
        cut = partition(row, mesh, lengths)
        held = FLOAT32_BYTES * row.size // parts(cut, lengths)
        moments += 2 * held if row.trained else 0
        rows.append({"name": row.name, "shape": list(row.shape), "cut": [list(axes) for axes in cut], "bytes": held})
    return {
        "mesh": lengths,
        "devices": math.prod(lengths.values()),
        "parameters": rows,
        "bytes_per_device": {"parameters": sum(row["bytes"] for row in rows), "moments": moments},
    }


def parts(cut: Partition, lengths: Mapping[MeshAxis, int]) -> int:
    """Into how many equal parts an array is cut."""
    return math.prod(lengths[axis] for axes in cut for axis in axes)


def mesh_page(known: Mapping[str, Any]) -> "RenderableType":
    """The table of `moezoo describe --mesh`; parameters of equal layers in one row."""
    named = ", ".join(f"{axis} {length}" for axis, length in known["mesh"].items() if length > 1) or "one device"
    table = new_table(f"on {named}", "layers", "shape, and what cuts it", "bytes a device", right=(1, 3))
    groups: dict[tuple[str, str], list[int]] = {}
    for row in known["parameters"]:
        shape = _cut_shape(row, known["mesh"])
        groups.setdefault((re.sub(r"^layers\.\d+\.", "layers.*.", row["name"]), shape), []).append(row["bytes"])
    for place, ((name, shape), held) in enumerate(groups.items()):
        repeated = f"{len(held)} x" if name.startswith("layers.*") else ""
        table.add_row(name, repeated, shape, bytes_text(sum(held)), end_section=place + 1 == len(groups))
    held = known["bytes_per_device"]
    table.add_row("parameters, float32", "", "", bytes_text(held["parameters"]), style="bold")
    table.add_row("moments of Adam", "", "", bytes_text(held["moments"]), style="bold")
    return table


def _cut_shape(row: Mapping[str, Any], lengths: Mapping[MeshAxis, int]) -> str:
    words = [
        f"{length}" + "".join(f" / {axis} {lengths[axis]}" for axis in axes)
        for length, axes in zip(row["shape"], row["cut"], strict=True)
    ]
    return " x ".join(words) or "a number"
