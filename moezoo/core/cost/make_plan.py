"""A plan by formula, beside what XLA makes of the same step where it is asked: what `moezoo plan` does."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from moezoo.core.config.run_config import Config
from moezoo.core.cost.flops import flops_per_token
from moezoo.core.cost.step_plan import Collective, CompiledStep, device_plan, smaller, with_same_sequences
from moezoo.core.distributed.mesh import BATCH_AXES, MeshAxis, known_sizes


class Planner(Protocol):
    """Compiles training steps ahead of time, without the devices: `jax_backend.planning.ahead_of_time`."""

    MOST_DEVICES: int
    """Devices that can be simulated in seconds."""

    def simulate_devices(self, count: int) -> None:
        """Have JAX simulate CPU devices. Raises BackendError: it has already started with another number."""
        ...

    def compiled_step(self, config: Config) -> CompiledStep:
        """Compile the training step of a config for the simulated devices of its mesh."""
        ...

    def chips_of(self, topology: str) -> Sequence[Any]:
        """Return the chips of a TPU topology. Raises BackendError: libtpu is not installed, or an unknown topology."""
        ...

    def memory_on_chips(self, config: Config, chips: Sequence[Any]) -> dict[str, int]:
        """Compile the step for these chips, and return the bytes that one of them needs, by kind."""
        ...


def make_plan(
    config: Config,
    num_devices: int | None,
    memory: int | None,
    *,
    planner: Planner | None = None,
    topology: str | None = None,
) -> dict[str, Any]:
    """Return the plan of one training step on a mesh, in the form of `plan_description`.

    Args:
        config: with a vocabulary size and a mesh, one axis of which may be `auto`.
        num_devices: number of devices; None: as many as the mesh says, or as the topology has chips.
        memory: bytes of memory per device, to check whether the step fits.
        planner: compiles the step as well, for simulated devices: on this mesh, or on a smaller one with the same axes
            if it has more devices than can be simulated in seconds. None: by formula alone.
        topology: TPU chips to compile for instead, which needs a planner; then `chip` has the memory of one of them.

    Raises SpecError where mesh, rules, model and batch do not fit. Raises BackendError: libtpu is not installed, or JAX
    has already started with other devices.
    """
    chips = None if topology is None or planner is None else planner.chips_of(topology)
    lengths = known_sizes(config.mesh, num_devices if chips is None else len(chips))
    mesh = config.mesh.model_copy(update={str(axis): length for axis, length in lengths.items()})
    config = config.model_copy(update={"mesh": mesh})
    known = plan_description(config, lengths, memory)  # refuses an impossible mesh before anything is compiled
    if planner is None:
        return known
    if chips is not None:
        return known | {"chip": {"topology": topology, **planner.memory_on_chips(config, chips)}}
    others = lengths if known["devices"] <= planner.MOST_DEVICES else smaller(lengths)
    planner.simulate_devices(math.prod(others.values()))
    small = with_same_sequences(config, lengths, others)
    return plan_description(config, lengths, memory, (small, others, planner.compiled_step(small)))


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
