"""The report of `moezoo plan`: a training step by formula, compared with XLA's compiled program where it is wanted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from moezoo.core.config.run_config import Config
from moezoo.core.cost.communication import Collective, CollectiveKind
from moezoo.core.cost.flops import flops_per_token
from moezoo.core.cost.step_bound import Accelerator, StepBound, step_bound
from moezoo.core.cost.step_plan import CompiledStep, DevicePlan, device_plan, smaller, with_same_sequences
from moezoo.core.distributed.mesh import BATCH_AXES, MeshAxis, planned_sizes
from moezoo.core.errors import SpecError

_MOST_BYTES = 1 << 56


@dataclass(frozen=True)
class ChipMemory:
    """Memory of a training step on one TPU chip, from the TPU compiler.

    Fields:
        arguments: bytes of parameters, moments, state and the batch.
        temporary: bytes of temporary arrays.
    """

    arguments: int
    temporary: int

    def to_json(self) -> dict[str, Any]:
        """Return the memory as plain data."""
        return {"argument_bytes": self.arguments, "temporary_bytes": self.temporary}


class Planner(Protocol):
    """Ahead-of-time compiler of training steps, without accelerators: `jax_backend.planning.ahead_of_time`."""

    MOST_DEVICES: int
    """Number of devices that can be simulated in seconds."""

    def simulate_devices(self, count: int) -> None:
        """Have JAX simulate CPU devices. Raises BackendError: it has already started with another number."""
        ...

    def compiled_step(self, config: Config) -> CompiledStep:
        """Compile the training step of a config for the simulated devices of its mesh."""
        ...

    def chips_of(self, topology: str) -> Sequence[Any]:
        """Return the chips of a TPU topology. Raises BackendError: libtpu is not installed, or an unknown topology."""
        ...

    def memory_on_chips(self, config: Config, chips: Sequence[Any]) -> ChipMemory:
        """Compile the step for these chips, and return the memory of one of them."""
        ...


@dataclass(frozen=True)
class ComparedCollective:
    """Collectives of one kind along the same axes: number of arrays and bytes, by formula and in XLA's program."""

    kind: CollectiveKind
    axes: tuple[MeshAxis, ...]
    formula_arrays: int
    formula_bytes: int
    program_arrays: int
    program_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        return {
            "kind": self.kind,
            "axes": list(self.axes),
            "formula": {"arrays": self.formula_arrays, "bytes": self.formula_bytes},
            "program": {"arrays": self.program_arrays, "bytes": self.program_bytes},
        }


@dataclass(frozen=True)
class CompiledComparison:
    """A compiled step beside the formulas for the same mesh; collectives send float32, as XLA on the CPU does.

    Fields:
        lengths: number of devices along each axis of the mesh that was compiled for.
        layers: number of layers in each compiled program.
        num_layers: number of layers of the model.
        collectives: by kind and axes.
        formula_arguments, program_arguments: bytes of parameters, moments and state; the program's include the batch.
        temporary: bytes of temporary arrays; None if only a part of the model was compiled.
    """

    lengths: Mapping[MeshAxis, int]
    layers: tuple[int, ...]
    num_layers: int
    collectives: tuple[ComparedCollective, ...]
    formula_arguments: int
    program_arguments: int
    temporary: int | None

    @property
    def devices(self) -> int:
        """Number of devices of the mesh."""
        return math.prod(self.lengths.values())

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        return {
            "mesh": dict(self.lengths),
            "devices": self.devices,
            "layers": list(self.layers),
            "all_layers": self.num_layers,
            "collectives": [own.to_json() for own in self.collectives],
            "argument_bytes": {"formula": self.formula_arguments, "program": self.program_arguments},
            "temporary_bytes": self.temporary,
        }


@dataclass(frozen=True)
class Plan:
    """Memory and communication of one training step on one device of a mesh.

    Fields:
        config: the run's config, with a vocabulary size and the mesh.
        lengths: number of devices along each mesh axis.
        device: memory and collectives by formula.
        flops_per_token: floating-point operations of a token, forward and backward.
        memory_limit: bytes of memory per device; None: not checked.
        compiled: the comparison with XLA's program, on this mesh or a smaller one; None: formula alone.
        topology: name of the TPU topology that was compiled for.
        chip: memory of one of its chips.
        bound: least time of the step on an accelerator; None: no accelerator was named.
    """

    config: Config
    lengths: Mapping[MeshAxis, int]
    device: DevicePlan
    flops_per_token: int
    memory_limit: int | None = None
    compiled: CompiledComparison | None = None
    topology: str | None = None
    chip: ChipMemory | None = None
    bound: StepBound | None = None

    @property
    def devices(self) -> int:
        """Number of devices of the mesh."""
        return math.prod(self.lengths.values())

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches in a step."""
        return self.config.training.gradient_accumulation

    @property
    def sequences(self) -> int:
        """Sequences of a micro-batch on one device."""
        return self.config.training.batch_size // self.micro_batches // math.prod(self.lengths[a] for a in BATCH_AXES)

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.config.training.sequence_length

    @property
    def flops(self) -> int:
        """Floating-point operations of one device in one step."""
        return self.flops_per_token * self.config.training.batch_size * self.sequence_length // self.devices

    @property
    def fits(self) -> bool | None:
        """True if the step fits in the memory limit; None without a limit."""
        return None if self.memory_limit is None else self.device.memory.total <= self.memory_limit

    @property
    def extrapolated(self) -> bool:
        """True if nothing was compiled for exactly this mesh."""
        return self.compiled is None or dict(self.compiled.lengths) != dict(self.lengths)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data: bytes and operations of one device and step, unless a name says otherwise."""
        known = {
            "mesh": dict(self.lengths),
            "devices": self.devices,
            "exchange": self.config.mesh.exchange,
            "micro_batches": self.micro_batches,
            "sequences": self.sequences,
            "sequence_length": self.sequence_length,
            "flops_per_token": self.flops_per_token,
            "flops": self.flops,
            "memory_bytes": self.device.memory.to_json(),
            "memory_limit_bytes": self.memory_limit,
            "fits": self.fits,
            "collectives": [own.to_json() for own in self.device.collectives],
            "sent_bytes": self.device.sent,
            "compiled": None if self.compiled is None else self.compiled.to_json(),
            "extrapolated": self.extrapolated,
        }
        known |= {} if self.bound is None else {"bound": self.bound.to_json()}
        return known if self.chip is None else known | {"chip": {"topology": self.topology} | self.chip.to_json()}


def make_plan(
    config: Config,
    num_devices: int | None,
    memory: int | None,
    *,
    planner: Planner | None = None,
    topology: str | None = None,
    on: Accelerator | None = None,
) -> Plan:
    """Return the plan of one training step on a mesh.

    Args:
        config: with a vocabulary size and a mesh, one axis of which may be `auto`.
        num_devices: number of devices; None: as many as the mesh says, or as the topology has chips.
        memory: bytes of memory per device, to check whether the step fits; None: those of `on`, if it has a figure.
        on: accelerator for whose figures the least time of the step is computed.
        planner: compiles the step as well, for simulated devices: on this mesh, or on a smaller one with the same axes
            if it has more devices than can be simulated in seconds. None: by formula alone.
        topology: TPU chips to compile for instead, which needs a planner; the plan then has the memory of one chip.

    Raises SpecError: mesh, rules, model and batch do not fit. Raises BackendError: libtpu is not installed, or JAX has
    already started with other devices.
    """
    chips = None if topology is None or planner is None else planner.chips_of(topology)
    lengths = planned_sizes(config.mesh, num_devices if chips is None else len(chips))
    mesh = config.mesh.model_copy(update={str(axis): length for axis, length in lengths.items()})
    config = config.model_copy(update={"mesh": mesh})
    device = device_plan(config, lengths)  # rejects an impossible mesh before anything is compiled
    flops = flops_per_token(config.model, config.training.sequence_length, training=True).total
    plan = Plan(config, lengths, device, flops, on.memory if memory is None and on is not None else memory)
    plan = plan if on is None else replace(plan, bound=step_bound(config, device, plan.flops, on))
    if planner is None:
        return plan
    if device.memory.total > _MOST_BYTES:  # Trap: XLA ends the process if the size of an array overflows
        raise SpecError(
            f"a step needs {device.memory.total} bytes on each device, more than XLA can describe; expected at most "
            f"{_MOST_BYTES}. Use a smaller model or batch, more devices, or --formula."
        )
    if chips is not None:
        return replace(plan, topology=topology, chip=planner.memory_on_chips(config, chips))
    others = lengths if plan.devices <= planner.MOST_DEVICES else smaller(lengths)
    planner.simulate_devices(math.prod(others.values()))
    small = with_same_sequences(config, lengths, others)
    return replace(plan, compiled=_compared(small, others, planner.compiled_step(small)))


def _compared(config: Config, lengths: Mapping[MeshAxis, int], step: CompiledStep) -> CompiledComparison:
    """Compare a compiled step with the formulas, which count numbers as XLA on the CPU sends them: float32."""
    plan = device_plan(config, lengths, float_bytes=4)
    formula, program = _by_axes(plan.collectives), _by_axes(step.collectives)
    memory = plan.memory
    return CompiledComparison(
        lengths=lengths,
        layers=step.layers,
        num_layers=len(config.model.all_layers),
        collectives=tuple(
            ComparedCollective(kind, axes, *formula.get((kind, axes), (0, 0)), *program.get((kind, axes), (0, 0)))
            for kind, axes in dict.fromkeys([*formula, *program])
        ),
        formula_arguments=memory.parameters + memory.moments + memory.state,
        program_arguments=step.arguments,
        temporary=step.temporary,
    )


def _by_axes(
    collectives: Sequence[Collective],
) -> dict[tuple[CollectiveKind, tuple[MeshAxis, ...]], tuple[int, int]]:
    """Return the number of arrays and their bytes by kind and axes."""
    found: dict[tuple[CollectiveKind, tuple[MeshAxis, ...]], tuple[int, int]] = {}
    for own in collectives:
        arrays, size = found.get((own.kind, own.axes), (0, 0))
        found[own.kind, own.axes] = (arrays + own.count, size + own.payload)
    return found
