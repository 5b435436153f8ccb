"""Sizes of one training step on one device of a mesh, on which the formulas for memory and communication are based."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from moezoo.core.config.run_config import Config
from moezoo.core.distributed.mesh import BATCH_AXES, MESH_AXES, MeshAxis, MeshConfig
from moezoo.core.distributed.sharding_rules import (
    RULES,
    Partition,
    check_batch,
    gathered_partition,
    padded_exchange,
    partition,
)
from moezoo.core.parameters import Parameter, parameter_table
from moezoo.core.parameters.precision import COMPUTE_BYTES, compute_dtype
from moezoo.core.parameters.trained import trained_names
from moezoo.core.spec import MoESpec


@dataclass(frozen=True)
class ShardedStep:
    """One device's share of a training step.

    Fields:
        config: the run's config, with a vocabulary size.
        lengths: number of devices along each mesh axis.
        table: the parameter table.
        trained: names of the parameters that are trained.
        partitions: for each parameter, the mesh axes over which it is sharded.
        micro_batches: number of micro-batches in a step.
        sequences: sequences of a micro-batch on one device.
        tokens: tokens of a micro-batch on one device.
        compute_bytes: bytes of an activation in memory.
        message_bytes: bytes of an activation in a collective.
        tensor_shards: number of shards of each logical axis that is sharded over `tensor`.
    """

    config: Config
    lengths: Mapping[MeshAxis, int]
    table: tuple[Parameter, ...]
    trained: frozenset[str]
    partitions: Mapping[str, Partition]
    micro_batches: int
    sequences: int
    tokens: int
    compute_bytes: int
    message_bytes: int
    tensor_shards: Mapping[str, int]

    @classmethod
    def of(cls, config: Config, lengths: Mapping[MeshAxis, int], float_bytes: int | None = None) -> "ShardedStep":
        """Return the step of a config on a mesh; `float_bytes` replaces the compute dtype's size in collectives.

        Raises SpecError: mesh, rules, model and batch do not fit.
        """
        training, table = config.training, tuple(parameter_table(config.model))
        size = training.batch_size // training.gradient_accumulation
        check_batch(size, lengths)
        sequences = size // math.prod(lengths[axis] for axis in BATCH_AXES)
        compute_bytes = COMPUTE_BYTES[compute_dtype(config.model)]
        rules = _rules(config.mesh)
        return cls(
            config=config,
            lengths=lengths,
            table=table,
            trained=trained_names(config.model, training.only),
            partitions={row.name: partition(row, config.mesh, lengths) for row in table},
            micro_batches=training.gradient_accumulation,
            sequences=sequences,
            tokens=sequences * training.sequence_length,
            compute_bytes=compute_bytes,
            message_bytes=float_bytes or compute_bytes,
            tensor_shards={
                name: lengths["tensor"] for name, axes in rules.items() if "tensor" in axes and lengths["tensor"] > 1
            },
        )

    @property
    def batch_axes(self) -> tuple[MeshAxis, ...]:
        """Mesh axes over which the batch is sharded."""
        return tuple(axis for axis in BATCH_AXES if self.lengths[axis] > 1)

    @property
    def expert_axes(self) -> tuple[MeshAxis, ...]:
        """Mesh axes over which experts are sharded."""
        axes = _rules(self.config.mesh)["expert"]
        return tuple(axis for axis in MESH_AXES if axis in axes and self.lengths[axis] > 1)

    @property
    def expert_shards(self) -> int:
        """Number of devices that share the experts of a layer."""
        return self.num_devices(self.expert_axes)

    def num_devices(self, axes: Iterable[MeshAxis]) -> int:
        """Return the number of devices along these mesh axes."""
        return math.prod(self.lengths[axis] for axis in axes)

    def gathered_partition(self, row: Parameter) -> Partition:
        """Return the partition of a parameter during its block's computation, after the all-gather."""
        return gathered_partition(row, self.partitions[row.name])

    def sharded_size(self, row: Parameter, axes: Sequence[int] | None = None) -> int:
        """Return how many numbers of a parameter the device stores; `axes`: of an array that has these alone."""
        parts = self.partitions[row.name]
        axes = range(len(row.shape)) if axes is None else axes
        return math.prod(row.shape[axis] // self.num_devices(parts[axis]) for axis in axes)

    def gathered_size(self, row: Parameter) -> int:
        """Return how many numbers of a parameter the device computes with, after the all-gather."""
        return row.size // self.num_devices(axis for axes in self.gathered_partition(row) for axis in axes)

    def expert_rows_per_token(self, moe: MoESpec) -> Fraction:
        """Return the rows that the device's experts compute, padding included, per token of the device."""
        if self.expert_shards == 1:
            return Fraction(moe.router.top_k)
        if self.config.mesh.exchange == "allgather":
            return Fraction(self.expert_shards * moe.num_slots)
        return Fraction(self.expert_shards * self.padded_rows(moe), self.tokens)

    def padded_rows(self, moe: MoESpec) -> int:
        """Return the rows that a padded all-to-all sends to each device of an expert group."""
        return padded_exchange(moe, self.sequences, self.config.training.sequence_length, self.expert_shards).rows

    def exchange_bytes(self, moe: MoESpec) -> int:
        """Return the bytes of the rows that expert parallelism exchanges in one direction, for one layer."""
        if self.expert_shards == 1:
            return 0
        rows = self.tokens if self.config.mesh.exchange == "allgather" else self.padded_rows(moe)
        return self.compute_bytes * self.expert_shards * rows * self.exchange_width(moe)

    def exchange_width(self, moe: MoESpec) -> int:
        """Return the width of the rows that expert parallelism exchanges."""
        return self.config.model.embed_dim if moe.latent_dim is None else moe.latent_dim


def _rules(mesh: MeshConfig) -> dict[str, tuple[MeshAxis, ...]]:
    return {**RULES, **{str(name): axes for name, axes in mesh.rules.items()}}
