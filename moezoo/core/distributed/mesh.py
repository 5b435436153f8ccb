"""The devices of a run, as a grid whose axes have names. What is cut along them says core/sharding_rules.py."""

import math
from typing import TYPE_CHECKING

from moezoo.core.errors import SpecError

if TYPE_CHECKING:
    pass

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from moezoo.core.spec import Part, impossible

MeshAxis = Literal["data", "fsdp", "expert", "tensor"]
MESH_AXES: tuple[MeshAxis, ...] = get_args(MeshAxis)
BATCH_AXES: tuple[MeshAxis, ...] = ("data", "fsdp", "expert")
"""Each of them has its own sequences. Devices along `tensor` compute parts of the same ones."""

LogicalAxis = Literal["embed", "vocab", "head", "kv_head", "head_dim", "hidden", "expert", "latent"]
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
    """How many devices there are along each axis; one of them may be `auto`, which is as many as are left.

    `data`: each device has all parameters. `fsdp`: parameters and moments are cut, and put together for each layer when
    it is their turn. `expert`: experts are cut, and tokens travel. `tensor`: heads and hidden widths are cut.

    `rules`: what cuts a logical axis of the parameter table, in place of `sharding_rules.RULES`: an axis of the mesh,
    several, or null.

    `exchange`: how tokens reach experts on other devices. `padded`: an all-to-all of as many rows as could be (see
    `sharding_rules.exchanged`), so that none is left behind. `allgather`: every device has all tokens of its group.
    `ragged`: an all-to-all of the rows that there are, on platforms that have one (TPU).
    """

    data: Size = 1
    fsdp: Size = 1
    expert: Size = 1
    tensor: Size = 1
    rules: dict[LogicalAxis, Annotated[tuple[MeshAxis, ...], BeforeValidator(_as_axes)]] = Field(default_factory=dict)
    exchange: Exchange = "padded"

    @model_validator(mode="after")
    def _one_auto(self) -> "MeshConfig":
        if len(words := [axis for axis in MESH_AXES if getattr(self, axis) == "auto"]) > 1:
            raise impossible(words[1], f"is 'auto', as {words[0]} is", "Give a number for one of them")
        for name, axes in self.rules.items():
            if name == "expert" and "tensor" in axes:
                raise impossible(
                    "rules.expert", "is cut along tensor, where devices have the same tokens", "Use expert"
                )
            if name in ("embed", "head_dim", "latent") and "tensor" in axes:
                raise impossible(
                    f"rules.{name}",
                    "is cut along tensor, which is for what a block can compute in parts",
                    "Use tensor for head, kv_head, hidden or vocab",
                )
        return self

    @property
    def is_one_device(self) -> bool:
        """Whether nothing but one device is asked for."""
        return all(getattr(self, axis) == 1 for axis in MESH_AXES)


def sizes(mesh: MeshConfig, num_devices: int) -> dict[MeshAxis, int]:
    """Devices along each axis, `auto` filled in.

    A mesh of one device needs no more than that. Raises SpecError where any other does not have exactly `num_devices`.
    """
    given: dict[MeshAxis, int] = {axis: size for axis in MESH_AXES if (size := getattr(mesh, axis)) != "auto"}
    words = [axis for axis in MESH_AXES if axis not in given]
    product = math.prod(given.values())
    if words and num_devices % product == 0:
        given[words[0]] = num_devices // product
    elif words or product not in (1, num_devices):
        raise SpecError(
            f"mesh is {in_words(mesh)}, for {'a multiple of ' if words else ''}{product} devices; got {num_devices} "
            f"devices. Use sizes whose product {'divides' if words else 'is'} {num_devices}, or let one axis be auto."
        )
    return {axis: given[axis] for axis in MESH_AXES}


def in_words(mesh: MeshConfig) -> str:
    """`data 2, expert 4`: the axes that have more than one device."""
    named = [f"{axis} {size}" for axis in MESH_AXES if (size := getattr(mesh, axis)) != 1]
    return ", ".join(named) or "one device"


def known_sizes(mesh: MeshConfig, num_devices: int | None) -> dict[MeshAxis, int]:
    """Devices along each axis of a mesh of which only the plan is there. Raises SpecError, as `sizes`."""
    given = [size for axis in MESH_AXES if (size := getattr(mesh, axis)) != "auto"]
    if num_devices is None and len(given) < len(MESH_AXES):
        raise SpecError("an axis of the mesh is auto, which is as many devices as are left. Add --devices N.")
    devices = math.prod(given) if num_devices is None else num_devices
    if mesh.is_one_device and devices > 1:
        raise SpecError(f"mesh is one device; got --devices {devices}. Add --mesh, for example --mesh data=auto.")
    return sizes(mesh, devices)
