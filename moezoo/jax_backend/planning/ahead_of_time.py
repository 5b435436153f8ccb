"""Compile a training step ahead of time for simulated devices, and read its memory and communication.

JAX only: MLX does not compile steps. No accelerator and no arrays are needed. Simulated CPU devices give the same
partitioning as real ones, because XLA partitions a program before most device-specific passes (GSPMD); the memory of
temporary arrays differs.
"""

import contextlib
import importlib.util
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import jax
import numpy as np

from moezoo.core.config.run_config import Config
from moezoo.core.cost.communication import Collective, CollectiveKind
from moezoo.core.cost.make_plan import ChipMemory
from moezoo.core.cost.step_plan import CompiledStep
from moezoo.core.distributed.mesh import MeshAxis
from moezoo.core.errors import BackendError
from moezoo.core.parameters.trained import trained_names
from moezoo.core.spec import GroupedQueryAttentionSpec, LatentAttentionSpec, LayerSpec, ModelSpec
from moezoo.jax_backend.distributed.sharding import Placement, Shapes
from moezoo.jax_backend.model import JaxModel
from moezoo.jax_backend.runtime.platform import planned_for
from moezoo.jax_backend.runtime.step_batch import StepBatch

MOST_DEVICES = 256
"""Largest number of devices for which a step is compiled: this takes seconds, and less than a GiB."""

_COLLECTIVE = re.compile(r"= (.*?) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\(")
_CALLED = re.compile(
    r"(?:to_apply|body|condition|calls|branch_computations|true_computation|false_computation)=\{?([^}\s]*)"
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_FAST_COMPILE: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
"""Compiler options that do not change the communication: the program is never run."""


def simulate_devices(count: int) -> None:
    """Simulate `count` devices on the CPU. Raises BackendError: JAX has started with another number of devices."""
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # JAX has started already, perhaps with this number
        jax.config.update("jax_num_cpu_devices", count)
    if jax.device_count() != count:
        raise BackendError(
            f"cannot simulate devices after JAX has started; got {jax.device_count()} devices; expected {count}. "
            "Run the plan in a separate process."
        )


def compiled_step(config: Config) -> CompiledStep:
    """Compile the training step of a config on its mesh of all devices. Allocates no arrays.

    For a deep model, one layer of each kind is compiled, then one more of each: the difference is the cost of a layer,
    multiplied by the number of such layers. Where a layer uses values of another layer, all layers are compiled.
    Scanned layers are planned as unrolled ones.
    """
    if config.mesh.exchange == "ragged":
        raise BackendError(
            "mesh.exchange is ragged, which cannot be compiled for simulated devices: XLA's CPU backend has no ragged "
            "all-to-all. Add --formula."
        )
    programs = _programs(config.model)
    steps = [(_compiled(config.model_copy(update={"model": model})), times) for model, times in programs]
    if len(steps) == 1:
        return steps[0][0]
    return CompiledStep(
        tuple(_sum((step.collectives, times) for step, times in steps)),
        sum(step.arguments * times for step, times in steps),
        None,
        tuple(number for step, _ in steps for number in step.layers),
    )


def chips_of(topology: str) -> list[jax.Device]:
    """Return the chips of a TPU topology by name, for example `v5e:16x16`; no TPU is needed.

    Not run yet: it needs libtpu in the version that JAX requires, which is not in the usual environment.
    Raises BackendError without libtpu. Source: the documentation of jax.experimental.topologies.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise BackendError(
            f"--topology {topology} needs libtpu, which compiles for TPUs without a TPU; it is not installed. "
            "Run `pip install libtpu`, or omit --topology."
        )
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise BackendError(f"--topology is {topology!r}, which libtpu refuses: {error}. Use e.g. v5e:16x16.") from None


def memory_on_chips(config: Config, chips: Sequence[jax.Device]) -> ChipMemory:
    """Compile all layers for TPU chips and return the memory per chip."""
    with planned_for("tpu"):
        lowered = _lowered(config, Placement(config.model, config.mesh, chips))
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    return ChipMemory(memory.argument_size_in_bytes, memory.temp_size_in_bytes)


def _programs(model: ModelSpec) -> list[tuple[ModelSpec, int]]:
    """Return models with multipliers, so that the weighted sum of their costs is the cost of this model."""
    layers = [layer.model_copy(update={"repeat": 1}) for layer in model.all_layers]
    kinds = [layer for place, layer in enumerate(layers) if layer not in layers[:place]]
    longer = [place for place, kind in enumerate(kinds) if layers.count(kind) > 1]
    if len(layers) <= len(kinds) + 1 or any(_uses_another_layer(layer) for layer in kinds):
        return [(model, 1)]
    more = [layers.count(kinds[place]) - 1 for place in longer]
    found = [(kinds, 1 - sum(more))]
    found += [([*kinds[: place + 1], *kinds[place:]], times) for place, times in zip(longer, more, strict=True)]
    return [(model.model_copy(update={"layers": tuple(some)}), times) for some, times in found if times]


def _uses_another_layer(layer: LayerSpec) -> bool:
    attention, moe = layer.attention, layer.routed
    shared = isinstance(attention, GroupedQueryAttentionSpec) and (
        attention.keys_of_layer is not None or attention.value_residual
    )
    shared = shared or (isinstance(attention, LatentAttentionSpec) and attention.indexer_of_layer is not None)
    return shared or layer.shortcut or (moe is not None and moe.router.reads_previous)


def _compiled(config: Config) -> CompiledStep:
    placement = None if config.mesh.is_one_device else Placement(config.model, config.mesh)
    compiled = _lowered(config, placement).compile(_FAST_COMPILE)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    return CompiledStep(
        () if placement is None else tuple(collectives_of(text, placement)),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        (len(config.model.all_layers),),
    )


def _lowered(config: Config, placement: Placement | None) -> jax.stages.Lowered:
    training = config.training
    model = _PlannedModel(config.model, placement)
    trained = trained_names(config.model, training.only)
    model.start_training(config.optimizer, rematerialize=training.rematerialize, trained=trained)
    # As on a TPU: attention in one piece; on the CPU it would be chunked, which is slow to compile.
    with planned_for("tpu"):
        sizes = training.gradient_accumulation, training.batch_size, training.sequence_length
        return model.lowered(*sizes, packed=config.data.documents == "separate")


class _PlannedModel(JaxModel):
    """A model whose arrays are shapes without data (`jax.ShapeDtypeStruct`)."""

    def __init__(self, spec: ModelSpec, placement: Placement | None):
        super().__init__(spec, Shapes(spec), placement)

    def _owned(self, init: Any, own: Any, given: Any, shardings: Any) -> Any:
        shapes = jax.eval_shape(init, own)
        if shardings is None:
            return own, shapes
        return own, jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
            shapes,
            shardings[1],
        )

    def lowered(self, micro_batches: int, batch: int, length: int, *, packed: bool) -> jax.stages.Lowered:
        """Lower the step; `packed`: on sequences that are packed with documents."""
        size = batch // micro_batches
        sharding = None if self._placement is None else self._placement.batch
        tokens = jax.ShapeDtypeStruct((micro_batches, size, length), np.int32, sharding=sharding)
        self.own_sequences(size)  # raises where the batch cannot be divided
        keys = jax.ShapeDtypeStruct((micro_batches, 2), np.uint32)
        with self._traced(size):
            batch_of_step = StepBatch(tokens, tokens, tokens if packed else None)
            return self._step.lower(*self._step_inputs(batch_of_step, 0.0, keys))


def _sum(parts: Iterable[tuple[Iterable[Collective], int]]) -> Iterator[Collective]:
    """Sum the collectives of several programs, with multipliers, by kind and mesh axes."""
    found: dict[tuple[str, tuple[MeshAxis, ...]], Collective] = {}
    for collectives, times in parts:
        for own in collectives:
            before = found.get((own.kind, own.axes), replace(own, count=0, payload=0))
            count, payload = before.count + times * own.count, before.payload + times * own.payload
            found[own.kind, own.axes] = replace(own, count=count, payload=payload)
    return iter(found.values())


# --- parsing HLO text ------------------------------------------------------------------------------------------------


def collectives_of(text: str, placement: Placement) -> Iterator[Collective]:
    """Return the collectives of a compiled program, summed by kind and mesh axes.

    Collectives in loops count once per iteration. Raises BackendError: a loop around a collective has no known trip
    count.
    """
    computations = dict(_computations(text))
    entry = next(name for name in computations if name.startswith("ENTRY "))
    found = ((_collective(line, placement), times) for line, times in _executed(computations, entry, 1))
    return _sum(([own], times) for own, times in found if own.axes)


def _collective(line: str, placement: Placement) -> Collective:
    found = _COLLECTIVE.search(line)
    assert found is not None
    shapes, kind = found.groups()
    arrays = [_bytes_of(*shape) for shape in re.findall(r"([a-z]+[0-9]*)\[([0-9,]*)\]", shapes)]
    axes = _axes_of(_groups_of(line), placement)
    devices = math.prod(placement.sizes[axis] for axis in axes)
    payload = sum(arrays)
    if kind == "reduce-scatter":  # its output is a shard of its input
        payload *= devices
    # An all-to-all on the CPU lists one array per receiving device.
    return Collective(cast(CollectiveKind, kind), axes, devices, 1 if kind == "all-to-all" else len(arrays), payload)


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Return the name and the lines of each computation; the entry computation's name has the prefix `ENTRY `."""
    name = ""
    lines: list[str] = []
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$", line)
        if header:
            name, lines = (header[1] or "") + header[2], []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _executed(computations: Mapping[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int]]:
    """Return the collectives that a computation executes, directly or through calls, with their counts."""
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
                        raise BackendError(f"a loop with collectives has no known trip count; got {line[:200]}.")
                    inside = [(found, count * int(trips[1])) for found, count in inside]
                yield from inside


def _bytes_of(dtype: str, shape: str) -> int:
    return _BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size)


def _groups_of(line: str) -> np.ndarray:
    """Return the device ids of each replica group [groups, devices], from any of XLA's notations."""
    listed = re.search(r"replica_groups=\{(\{[0-9,{}]*\})\}", line)
    if listed:
        return np.array([[int(word) for word in group.split(",")] for group in re.findall(r"\{([0-9,]+)\}", listed[1])])
    counted = re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", line)
    if counted:
        return _counted(counted[2], counted[3]).reshape(_numbers(counted[1]))
    pairs = re.search(r"source_target_pairs=\{(\{[0-9,{}]*\})\}", line)
    if pairs:  # a source and a target device each
        return np.array([[int(word) for word in pair.split(",")] for pair in re.findall(r"\{([0-9,]+)\}", pairs[1])])
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([0-9,]+)\](?:T\(([0-9,]+)\))?\))? \{([^}]*)\}", line
    )
    if named is None:
        raise BackendError(f"a collective has replica groups in an unknown notation; got {line[:300]}.")
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=([0-9]+)", named[1])}
    ids = _counted(named[2] or str(math.prod(axes.values())), named[3]).reshape(tuple(axes.values()))
    along = [list(axes).index(name) for name in re.findall(r"'(\w+)'", named[4])]
    rest = [axis for axis in range(len(axes)) if axis not in along]
    return ids.transpose(rest + along).reshape(-1, math.prod(ids.shape[axis] for axis in along))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _counted(shape: str, order: str | None) -> np.ndarray:
    """Return 0, 1, 2, ... in a shape, transposed to `order`."""
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids if order is None else ids.transpose(_numbers(order))


def _axes_of(groups: np.ndarray, placement: Placement) -> tuple[MeshAxis, ...]:
    """Return the axes of the mesh along which devices of a group differ."""
    ids = np.vectorize(lambda device: device.id)(placement.mesh.devices)
    place = {int(number): np.array(place) for place, number in np.ndenumerate(ids)}
    places = np.array([[place[int(number)] for number in group] for group in groups])
    differ = np.any(places != places[:, :1], axis=(0, 1))
    return tuple(name for name, found in zip(placement.mesh.axis_names, differ, strict=True) if found)
