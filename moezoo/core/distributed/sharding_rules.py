"""Sharding rules for parameters, and buffer sizes of the expert-parallel all-to-all; used by the JAX backend and plans.

The parameter table names the logical axis of each dimension; a rule maps a logical axis to axes of the mesh.
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
    "group": ("tensor",),
    "ngram": ("fsdp", "expert"),
}
_LOWEST_PRIORITY = "latent"
"""This axis is not sharded over a mesh axis that another axis of the parameter uses: of [embed, latent], only embed."""

Partition = tuple[tuple[MeshAxis, ...], ...]
"""The mesh axes over which each dimension of an array is sharded (a PartitionSpec)."""


def partition(row: Parameter, mesh: MeshConfig, sizes: Mapping[MeshAxis, int]) -> Partition:
    """Return how a parameter is sharded over a mesh with `sizes` devices along each axis.

    Routers and norms are small and needed by every device: they are replicated, and so is all state. Mesh axes of one
    device are left out.

    Raises SpecError, naming the parameter and the rule: a dimension is not divisible, or a mesh axis is used twice.
    """
    if not row.trained or row.role in ("router", "norms"):
        return ((),) * len(row.shape)
    rules: dict[str, tuple[MeshAxis, ...]] = {**RULES, **{str(name): axes for name, axes in mesh.rules.items()}}
    found: list[tuple[MeshAxis, ...]] = []
    used: dict[MeshAxis, str] = {}
    others = {axis for name in row.axes if name != _LOWEST_PRIORITY for axis in rules.get(name, ())}
    for name, length in zip(row.axes, row.shape, strict=True):
        axes = tuple(axis for axis in rules.get(name, ()) if sizes[axis] > 1)
        if name == _LOWEST_PRIORITY:
            axes = tuple(axis for axis in axes if axis not in others)
        for axis in axes:
            if axis in used:
                raise SpecError(
                    f"{row.name} {list(row.shape)} is sharded over {axis} of the mesh twice: by {used[axis]} and by "
                    f"{name}. Set mesh.rules.{name} or mesh.rules.{used[axis]} to null or to another axis."
                )
            used[axis] = name
        parts = math.prod(sizes[axis] for axis in axes)
        if length % parts:
            raise SpecError(
                f"{row.name} {list(row.shape)} has size {length} along {name}, which is not divisible into {parts} "
                f"shards (mesh.rules.{name} = {', '.join(axes)}). Use a mesh that divides it, or set "
                f"mesh.rules.{name} to null."
            )
        found.append(axes)
    return tuple(found)


def gathered_partition(row: Parameter, stored: Partition) -> Partition:
    """Return how a parameter is sharded while its block computes: all-gathered over the batch axes.

    Experts and the tables of n-gram embeddings stay where they are: what is computed with them is exchanged.
    """
    return tuple(
        axes if name in ("expert", "ngram") else tuple(axis for axis in axes if axis not in BATCH_AXES)
        for name, axes in zip(row.axes, stored, strict=True)
    )


def check_batch(batch: int, sizes: Mapping[MeshAxis, int]) -> None:
    """Check that a micro-batch of `batch` sequences is divisible over the batch axes. Raises SpecError otherwise."""
    parts = math.prod(sizes[axis] for axis in BATCH_AXES)
    if batch % parts:
        named = ", ".join(f"{axis} {sizes[axis]}" for axis in BATCH_AXES if sizes[axis] > 1)
        raise SpecError(
            f"a micro-batch (training.batch_size / gradient_accumulation) has {batch} sequences, which is not "
            f"divisible by {parts} ({named} of the mesh). Use a multiple of {parts}, or a smaller mesh."
        )


class PaddedExchange(NamedTuple):
    """Buffer size of the all-to-all with `exchange: padded`, in rows [D] per pair of devices of an expert group.

    Fields:
        rows: rows sent to each device in the dispatch, used or not; the combine and the backward pass of each send as
            many.
        slots: slots per expert and sequence, if each assignment has a fixed slot; None if rows for a device are
            contiguous, sorted by expert.
    """

    rows: int
    slots: int | None


def padded_exchange(
    moe: MoESpec, num_sequences: int, length: int, devices: int, *, inference: bool = False
) -> PaddedExchange:
    """Return the buffer size that is sufficient for any routing, so that no row is dropped. The smaller of:

    - `p min(K, E / n)`: all p tokens of a device could choose experts of the same one of n devices.
    - `E / n` experts times b sequences times C, if there is a capacity C per sequence. The experts then compute all
      slots, used or not.

    A capacity of the whole batch does not limit the share of one device.

    Args:
        moe: the MoE layer.
        num_sequences: b, sequences per device.
        length: T, tokens per sequence; p = b T.
        devices: n, devices that share the experts.
        inference: ignore capacities, as inference routing does.
    """
    experts = moe.num_experts // devices
    rows = num_sequences * length * min(moe.num_slots, experts)
    if not inference and isinstance(moe.dispatch, CapacitySpec) and moe.dispatch.group == "sequence":
        slots = capacities(moe, length)[0]
        if experts * num_sequences * slots < rows:
            return PaddedExchange(experts * num_sequences * slots, slots)
    return PaddedExchange(rows, None)
