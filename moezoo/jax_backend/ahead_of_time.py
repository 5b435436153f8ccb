"""A training step, compiled for devices that are not there and without its arrays: what travels, and what is where.

Only here: MLX compiles no step. Simulated devices of the CPU give the same division of the work as real ones, since XLA
divides a program before it knows much of its devices; the memory of temporary arrays is another one there.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import jax
import numpy as np

from moezoo.core.config import Config
from moezoo.core.errors import BackendError
from moezoo.core.mesh import MeshAxis, MeshConfig
from moezoo.core.plan import Collective
from moezoo.core.spec import ModelSpec
from moezoo.jax_backend.sharding import Placement, Shapes
from moezoo.jax_backend.steps import JaxModel

_COLLECTIVE = re.compile(r"= (.*?) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\(")
_CALLED = re.compile(r"(?:to_apply|body|condition|calls|branch_computations|true_computation|false_computation)=\{?([^}\s]*)")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


def simulate_devices(count: int) -> None:
    """Let the CPU stand for so many devices. Raises BackendError where JAX has started with another number."""
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass
    if jax.device_count() != count:
        raise BackendError(
            f"JAX has started with {jax.device_count()} devices, and cannot simulate {count} any more. "
            "Ask for a plan in a process of its own."
        )


@dataclass(frozen=True)
class CompiledStep:
    """What XLA says of a compiled step, of one device.

    Fields:
        collectives: those of one step, with loops counted as often as they run.
        arguments: bytes of parameters, state, moments and the batch.
        temporary: bytes that the step needs besides.
    """

    collectives: list[Collective]
    arguments: int
    temporary: int


def compiled_step(config: Config, mesh: MeshConfig) -> CompiledStep:
    """The step of a config on all devices, as `training` trains it: nothing is allocated but the program."""
    placement = None if mesh.is_one_device else Placement(config.model, mesh)
    model = _PlannedModel(config.model, placement)
    training = config.training
    model.start_training(config.optimizer, rematerialize=training.rematerialize, layers=training.layers)
    compiled = model.lowered(training.gradient_accumulation, training.batch_size, training.sequence_length).compile()
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    return CompiledStep(
        [] if placement is None else collectives_of(text, placement),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
    )


class _PlannedModel(JaxModel):
    """A model whose arrays are shapes."""

    def __init__(self, spec: ModelSpec, placement: Placement | None):
        super().__init__(spec, Shapes(spec), placement)

    def _new_moments(self, init: Any, shardings: Any) -> Any:
        shapes = jax.eval_shape(init, self._parameters)
        if shardings is None:
            return shapes
        return jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings
        )

    def lowered(self, micro_batches: int, batch: int, length: int) -> jax.stages.Lowered:
        size = batch // micro_batches
        sharding = None if self._placement is None else self._placement.windows
        windows = jax.ShapeDtypeStruct((micro_batches, size, length + 1), np.int32, sharding=sharding)
        self.own_sequences(size)  # says what does not divide
        keys = jax.ShapeDtypeStruct((micro_batches, 2), np.uint32)
        given = (self._parameters, self._state, self._moments, windows, np.float32(0), keys)
        with self._traced(size):
            return self._step.lower(*given)


# --- reading XLA's text ----------------------------------------------------------------------------------------------


def collectives_of(text: str, placement: Placement) -> list[Collective]:
    """The collectives of a compiled program, those of one kind and the same axes of the mesh together.

    Loops count as often as they run. Raises BackendError where one around a collective does not say how often.
    """
    found: dict[tuple[str, tuple[MeshAxis, ...]], tuple[int, int]] = {}
    computations = dict(_computations(text))
    for line, times in _executed(computations, next(name for name in computations if name.startswith("ENTRY ")), 1):
        shapes, kind = _COLLECTIVE.search(line).groups()
        axes = _axes_of(_groups_of(line), placement)
        payload = sum(_bytes_of(*shape) for shape in re.findall(r"([a-z]+[0-9]*)\[([0-9,]*)\]", shapes))
        if kind == "reduce-scatter":  # its result is a part of what each device gives
            payload *= math.prod(placement.sizes[axis] for axis in axes)
        if axes:
            count, total = found.get((kind, axes), (0, 0))
            found[kind, axes] = count + times, total + times * payload
    return [
        Collective(kind, axes, math.prod(placement.sizes[axis] for axis in axes), count, total)
        for (kind, axes), (count, total) in sorted(found.items())
    ]


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each computation's name, the entry's with `ENTRY ` before it, and its lines."""
    name, lines = "", []
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$", line)
        if header:
            name, lines = (header[1] or "") + header[2], []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _executed(computations: Mapping[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int]]:
    """The collectives that a computation executes, by itself and by what it calls, and how often."""
    for line in computations[name]:
        if _COLLECTIVE.search(line):
            yield line, times
            continue
        for called in _CALLED.findall(line):
            for own in re.findall(r"[\w.-]+", called):
                inside = list(_executed(computations, own, times)) if own in computations else []
                if inside and " while(" in line:
                    trips = re.search(r'known_trip_count":\{"n":"([0-9]+)"', line)
                    if trips is None:
                        raise BackendError(f"a loop with collectives does not say how often it runs; got {line[:200]}.")
                    inside = [(found, count * int(trips[1])) for found, count in inside]
                yield from inside


def _bytes_of(dtype: str, shape: str) -> int:
    return _BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size)


def _groups_of(line: str) -> np.ndarray:
    """Device numbers of each group [groups, devices], from any of the ways in which XLA writes them."""
    listed = re.search(r"replica_groups=\{(\{[0-9,{}]*\})\}", line)
    if listed:
        return np.array([[int(word) for word in group.split(",")] for group in re.findall(r"\{([0-9,]+)\}", listed[1])])
    counted = re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", line)
    if counted:
        return _counted(counted[2], counted[3]).reshape(_numbers(counted[1]))
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([0-9,]+)\](?:T\(([0-9,]+)\))?\))? \{([^}]*)\}", line
    )
    if named is None:
        raise BackendError(f"XLA names the devices of a collective in an unknown way; got {line[:300]}.")
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=([0-9]+)", named[1])}
    ids = _counted(named[2] or str(math.prod(axes.values())), named[3]).reshape(tuple(axes.values()))
    along = [list(axes).index(name) for name in re.findall(r"'(\w+)'", named[4])]
    rest = [axis for axis in range(len(axes)) if axis not in along]
    return ids.transpose(rest + along).reshape(-1, math.prod(ids.shape[axis] for axis in along))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _counted(shape: str, order: str | None) -> np.ndarray:
    """0, 1, 2 ... of a shape, with its axes in another order."""
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids if order is None else ids.transpose(_numbers(order))


def _axes_of(groups: np.ndarray, placement: Placement) -> tuple[MeshAxis, ...]:
    """The axes of the mesh along which the devices of each group lie."""
    wanted = {frozenset(group) for group in groups.tolist()}
    names = placement.mesh.axis_names
    ids = np.array([device.id for device in placement.mesh.devices.flat]).reshape(placement.mesh.devices.shape)
    for size in range(len(names) + 1):
        for along in combinations(range(len(names)), size):
            rest = [axis for axis in range(len(names)) if axis not in along]
            lying = ids.transpose([*rest, *along]).reshape(-1, math.prod(ids.shape[axis] for axis in along))
            if {frozenset(group) for group in lying.tolist()} == wanted:
                return tuple(names[axis] for axis in along)
    raise BackendError(f"a collective lies along no axes of the mesh; got groups {groups.tolist()}.")
