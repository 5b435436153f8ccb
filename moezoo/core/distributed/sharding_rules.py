"""Which axis of the mesh cuts which axis of a parameter, and how many rows travel: data, read by the JAX backend.

A row of the parameter table names the axes of its dimensions; a rule maps such a name to axes of the mesh.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from moezoo.core.distributed.mesh import BATCH_AXES, MeshAxis, MeshConfig
from moezoo.core.errors import SpecError
from moezoo.core.parameters import Parameter
from moezoo.core.parameters.capacity import capacities
from moezoo.core.spec import CapacitySpec, MoESpec

RULES: dict[str, tuple[MeshAxis, ...]] = {
    "embed": ("fsdp",),
    "head": ("tensor",),
    "kv_head": ("tensor",),
    "hidden": ("tensor",),
    "expert": ("expert",),
    "latent": ("fsdp",),
}
_YIELDS = "latent"
"""It is cut along no axis of the mesh that another axis of its parameter has: of [embed, latent], `embed` alone."""

Partition = tuple[tuple[MeshAxis, ...], ...]
"""Of each dimension, the axes of the mesh that cut it."""


def partition(row: Parameter, mesh: MeshConfig, sizes: Mapping[MeshAxis, int]) -> Partition:
    """How a parameter lies on a mesh with so many devices along each axis.

    Routers and norms are small, and every device needs all of them: they are whole everywhere, as is all state. Axes of
    one device cut nothing, and are left out.

    Raises SpecError, with the parameter and the rule: a dimension that does not divide, an axis of the mesh used twice.
    """
    if not row.trained or row.role in ("router", "norms"):
        return ((),) * len(row.shape)
    rules: dict[str, tuple[MeshAxis, ...]] = {**RULES, **{str(name): axes for name, axes in mesh.rules.items()}}
    found: list[tuple[MeshAxis, ...]] = []
    used: dict[MeshAxis, str] = {}
    of_others = {axis for name in row.axes if name != _YIELDS for axis in rules.get(name, ())}
    for name, length in zip(row.axes, row.shape, strict=True):
        axes = tuple(axis for axis in rules.get(name, ()) if sizes[axis] > 1)
        if name == _YIELDS:
            axes = tuple(axis for axis in axes if axis not in of_others)
        for axis in axes:
            if axis in used:
                raise SpecError(
                    f"{row.name} {list(row.shape)} is cut twice along {axis} of the mesh: {used[axis]} and {name} both "
                    f"have it. Set mesh.rules.{name} or mesh.rules.{used[axis]} to null or to another axis."
                )
            used[axis] = name
        parts = math.prod(sizes[axis] for axis in axes)
        if length % parts:
            raise SpecError(
                f"{row.name} {list(row.shape)} has {length} along {name}, which mesh.rules.{name} = {', '.join(axes)} "
                f"would cut into {parts} equal parts. Use a mesh that divides it, or set mesh.rules.{name} to null."
            )
        found.append(axes)
    return tuple(found)


def at_work(row: Parameter, cut: Partition) -> Partition:
    """How a parameter lies when its block computes with it: whole along the batch's axes, but for an expert's own."""
    return tuple(
        axes if name == "expert" else tuple(axis for axis in axes if axis not in BATCH_AXES)
        for name, axes in zip(row.axes, cut, strict=True)
    )


def check_batch(batch: int, sizes: Mapping[MeshAxis, int]) -> None:
    """Raises SpecError where a micro-batch of so many sequences cannot be shared equally."""
    parts = math.prod(sizes[axis] for axis in BATCH_AXES)
    if batch % parts:
        named = ", ".join(f"{axis} {sizes[axis]}" for axis in BATCH_AXES if sizes[axis] > 1)
        raise SpecError(
            f"a micro-batch (training.batch_size / gradient_accumulation) has {batch} sequences, which {named} of the "
            f"mesh would share in {parts} equal parts. Use a multiple of {parts}, or a smaller mesh."
        )


class Exchanged(NamedTuple):
    """How many rows [D] a device sends to each device of its expert group with `exchange: padded`, used or not.

    Fields:
        rows: in one all-to-all; as many come back, and both again for the gradients.
        places: rows that each expert has for each sequence, where every copy has a place of its own; None where the
            rows for one device follow each other, whichever of its experts they are for.
    """

    rows: int
    places: int | None


def exchanged(moe: MoESpec, num_sequences: int, length: int, devices: int, *, inference: bool = False) -> Exchanged:
    """As many rows as could ever be for a device, so that none is left behind.

    - `p min(K, E / n)` for the p tokens that a device has: all could choose the experts of one of n devices.
    - `E / n` experts times b sequences times C, the capacity of a sequence, where there is one and this is less. The
      experts then compute all places, used or not.

    A capacity of the whole batch does not say how much of it one device has.

    Args:
        moe: the mixture.
        num_sequences: b, that a device has.
        length: T, p = b T.
        devices: n, that share the experts.
        inference: then no capacity counts.
    """
    experts = moe.num_experts // devices
    rows = num_sequences * length * min(moe.num_slots, experts)
    if not inference and isinstance(moe.dispatch, CapacitySpec) and moe.dispatch.group == "sequence":
        places = capacities(moe, length)[0]
        if experts * num_sequences * places < rows:
            return Exchanged(experts * num_sequences * places, places)
    return Exchanged(rows, None)
