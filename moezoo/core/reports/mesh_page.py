"""The page of `moezoo describe --mesh`: how parameters are sharded over a mesh, and their bytes per device."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moezoo.core.config.optimizers import AdamWConfig, OptimizerConfig
from moezoo.core.config.update_rules import update_rules
from moezoo.core.distributed.mesh import MeshAxis, MeshConfig, planned_sizes
from moezoo.core.distributed.sharding_rules import Partition, partition
from moezoo.core.parameters import parameter_table
from moezoo.core.reports.text import bytes_text, new_table
from moezoo.core.spec import ModelSpec

if TYPE_CHECKING:
    from rich.console import RenderableType

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ShardedParameter:
    """A parameter on a mesh.

    Fields:
        name, shape: of the whole parameter.
        partition: for each dimension, the mesh axes over which it is sharded.
        device_bytes: float32 bytes on one device.
        kept_bytes: float32 bytes of what the optimizer keeps of it, on one device.
    """

    name: str
    shape: tuple[int, ...]
    partition: Partition
    device_bytes: int
    kept_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the parameter as plain data."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "cut": [list(axes) for axes in self.partition],
            "bytes": self.device_bytes,
        }


@dataclass(frozen=True)
class MeshDescription:
    """The parameters of a model on a mesh.

    Fields:
        lengths: number of devices along each mesh axis.
        parameters: in the order of the parameter table.
    """

    lengths: Mapping[MeshAxis, int]
    parameters: tuple[ShardedParameter, ...]

    @property
    def devices(self) -> int:
        """Number of devices of the mesh."""
        return math.prod(self.lengths.values())

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters on one device."""
        return sum(row.device_bytes for row in self.parameters)

    @property
    def moment_bytes(self) -> int:
        """Bytes of what the optimizer keeps, on one device."""
        return sum(row.kept_bytes for row in self.parameters)

    def to_json(self) -> dict[str, Any]:
        """Return the description as plain data."""
        return {
            "mesh": dict(self.lengths),
            "devices": self.devices,
            "parameters": [row.to_json() for row in self.parameters],
            "bytes_per_device": {"parameters": self.parameter_bytes, "moments": self.moment_bytes},
        }


def mesh_description(
    spec: ModelSpec, mesh: MeshConfig, num_devices: int | None = None, optimizer: OptimizerConfig | None = None
) -> MeshDescription:
    """Return how a model's parameters are sharded over a mesh.

    `num_devices`: number of devices, needed if an axis is `auto`. `optimizer`: None: AdamW. Raises SpecError: mesh,
    model and devices do not fit, with the parameter and the rule.
    """
    lengths, table = planned_sizes(mesh, num_devices), parameter_table(spec)
    rules = update_rules(optimizer or AdamWConfig(learning_rate=1.0), table)
    rows = []
    for row in table:
        sharded = partition(row, mesh, lengths)
        parts = [length // num_shards((axes,), lengths) for length, axes in zip(row.shape, sharded, strict=True)]
        kept = rules[row.name].state_axes(len(parts)).values() if row.trained else ()
        kept_bytes = sum(FLOAT32_BYTES * math.prod(parts[axis] for axis in axes) for axes in kept)
        size = FLOAT32_BYTES * math.prod(parts)
        rows.append(ShardedParameter(row.name, tuple(row.shape), sharded, size, kept_bytes))
    return MeshDescription(lengths, tuple(rows))


def num_shards(sharded: Partition, lengths: Mapping[MeshAxis, int]) -> int:
    """Return the number of equal shards of an array."""
    return math.prod(lengths[axis] for axes in sharded for axis in axes)


def mesh_page(known: MeshDescription) -> "RenderableType":
    """Return the table of `moezoo describe --mesh`; parameters of equal layers share a row."""
    mesh = ", ".join(f"{axis} {length}" for axis, length in known.lengths.items() if length > 1) or "one device"
    table = new_table(f"on {mesh}", "layers", "shape and sharding", "bytes per device", right=(1, 3))
    groups: dict[tuple[str, str], list[int]] = {}
    for row in known.parameters:
        key = re.sub(r"^layers\.\d+\.", "layers.*.", row.name), _sharded_shape(row, known.lengths)
        groups.setdefault(key, []).append(row.device_bytes)
    for place, ((name, shape), sizes) in enumerate(groups.items()):
        repeated = f"{len(sizes)} x" if name.startswith("layers.*") else ""
        table.add_row(name, repeated, shape, bytes_text(sum(sizes)), end_section=place + 1 == len(groups))
    table.add_row("parameters, float32", "", "", bytes_text(known.parameter_bytes), style="bold")
    table.add_row("optimizer state, float32", "", "", bytes_text(known.moment_bytes), style="bold")
    return table


def _sharded_shape(row: ShardedParameter, lengths: Mapping[MeshAxis, int]) -> str:
    dimensions = [
        f"{length}" + "".join(f" / {axis} {lengths[axis]}" for axis in axes)
        for length, axes in zip(row.shape, row.partition, strict=True)
    ]
    return " x ".join(dimensions) or "scalar"
