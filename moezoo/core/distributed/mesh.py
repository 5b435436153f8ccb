"""Device meshes with named axes. How parameters are sharded over them: core/distributed/sharding_rules.py."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from moezoo.core.errors import SpecError
from moezoo.core.spec import Part, impossible

MeshAxis = Literal["data", "fsdp", "expert", "tensor"]
MESH_AXES: tuple[MeshAxis, ...] = get_args(MeshAxis)
BATCH_AXES: tuple[MeshAxis, ...] = ("data", "fsdp", "expert")
"""Axes over which the batch is sharded. Devices along `tensor` share the same sequences."""

LogicalAxis = Literal["embed", "vocab", "head", "kv_head", "head_dim", "hidden", "expert", "latent", "group", "ngram"]
Exchange = Literal["padded", "allgather", "ragged"]


def _as_size(value: object) -> object:
    if value == "auto" or (type(value) is int and value > 0):
        return value
    raise PydanticCustomError("size", "expected a number of devices, 1 or more, or auto")


Size = Annotated[PositiveInt | Literal["auto"], BeforeValidator(_as_size)]


def _as_axes(value: object) -> object:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


class MeshConfig(Part):
    """Number of devices along each axis of the mesh; one axis may be `auto`: all remaining devices.

    Fields:
        data: data parallelism; parameters are replicated.
        fsdp: fully sharded data parallelism; parameters and moments are sharded, and all-gathered per layer.
        expert: expert parallelism; experts are sharded, and tokens are dispatched to them.
        tensor: tensor parallelism; heads and hidden widths are sharded.
        rules: mesh axes over which a logical axis of the parameter table is sharded, in place of
            `sharding_rules.RULES`: an axis, several, or null.
        exchange: how tokens reach experts on other devices. `padded`: an all-to-all with buffers large enough for any
            routing (`sharding_rules.padded_exchange`), so no token is dropped. `allgather`: every device gets all
            tokens of its group. `ragged`: an all-to-all of the actual rows, on platforms that support it (TPU).
    """

    data: Size = 1
    fsdp: Size = 1
    expert: Size = 1
    tensor: Size = 1
    rules: dict[LogicalAxis, Annotated[tuple[MeshAxis, ...], BeforeValidator(_as_axes)]] = Field(default_factory=dict)
    exchange: Exchange = "padded"

    @model_validator(mode="after")
    def _one_auto(self) -> "MeshConfig":
        if len(auto := [axis for axis in MESH_AXES if getattr(self, axis) == "auto"]) > 1:
            raise impossible(auto[1], f"is 'auto', and so is {auto[0]}", "Set one of them to a number")
        for name, axes in self.rules.items():
            if name in ("expert", "ngram") and "tensor" in axes:
                raise impossible(
                    f"rules.{name}", "is sharded over tensor, whose devices share the same tokens", "Use expert"
                )
            if name in ("embed", "head_dim", "latent") and "tensor" in axes:
                raise impossible(
                    f"rules.{name}",
                    "is sharded over tensor, but a block cannot be computed in parts along it",
                    "Use tensor for head, kv_head, hidden or vocab",
                )
        return self

    @property
    def is_one_device(self) -> bool:
        """True for a mesh of a single device."""
        return all(getattr(self, axis) == 1 for axis in MESH_AXES)


@dataclass(frozen=True)
class Devices:
    """The devices that share a training step.

    Fields:
        lengths: number of devices along each mesh axis.
        local: number of devices in this process.
        free_bytes: free memory of each device in bytes; None if devices use the memory of their host.
    """

    lengths: Mapping[MeshAxis, int]
    local: int
    free_bytes: int | None


ONE_DEVICE = Devices(dict.fromkeys(MESH_AXES, 1), local=1, free_bytes=None)
"""One device that uses the memory of its host."""


def sizes(mesh: MeshConfig, num_devices: int) -> dict[MeshAxis, int]:
    """Return the number of devices along each axis, with `auto` resolved.

    Raises SpecError: the mesh does not have exactly `num_devices` devices. A mesh of one device always fits.
    """
    known: dict[MeshAxis, int] = {axis: size for axis in MESH_AXES if (size := getattr(mesh, axis)) != "auto"}
    auto = [axis for axis in MESH_AXES if axis not in known]
    product = math.prod(known.values())
    if auto and num_devices % product == 0:
        known[auto[0]] = num_devices // product
    elif auto or product not in (1, num_devices):
        raise SpecError(
            f"mesh is {in_words(mesh)}, for {'a multiple of ' if auto else ''}{product} devices; got {num_devices} "
            f"devices. Use sizes whose product {'divides' if auto else 'is'} {num_devices}, or set one axis to auto."
        )
    return {axis: known[axis] for axis in MESH_AXES}


def in_words(mesh: MeshConfig) -> str:
    """Describe a mesh by its axes of more than one device: `data 2, expert 4`."""
    named = [f"{axis} {size}" for axis in MESH_AXES if (size := getattr(mesh, axis)) != 1]
    return ", ".join(named) or "one device"


def planned_sizes(mesh: MeshConfig, num_devices: int | None) -> dict[MeshAxis, int]:
    """Return the number of devices along each axis for planning, without any devices. Raises SpecError, as `sizes`.

    `num_devices`: total number of devices, needed to resolve `auto`.
    """
    known = [size for axis in MESH_AXES if (size := getattr(mesh, axis)) != "auto"]
    if num_devices is None and len(known) < len(MESH_AXES):
        raise SpecError("an axis of the mesh is auto, but the number of devices is unknown. Add --devices N.")
    devices = math.prod(known) if num_devices is None else num_devices
    if mesh.is_one_device and devices > 1:
        raise SpecError(f"mesh is one device; got --devices {devices}. Add --mesh, for example --mesh data=auto.")
    return sizes(mesh, devices)
