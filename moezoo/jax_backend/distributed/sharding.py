"""Where arrays lie on a mesh of devices. Only here and in expert_parallel.py: all other files are of one device.

A model on a mesh is the same program; XLA divides it by where its arrays lie (GSPMD). What it would divide badly is
told here: parameters that are cut along `fsdp` are put together a block at a time, activations stay with their
sequences, and what is done to each row by itself is done where the row is.
"""

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moezoo.core.checkpoint.safetensors_file import LazyTensors, shapes_of
from moezoo.core.distributed.mesh import BATCH_AXES, MESH_AXES, MeshAxis, MeshConfig, sizes
from moezoo.core.distributed.sharding_rules import RULES, at_work, check_batch, partition
from moezoo.core.errors import SpecError
from moezoo.core.parameters import parameter_table
from moezoo.core.spec import ModelSpec
from moezoo.jax_backend.runtime.placement import active, active_placement

_BLOCKS = ("attention", "moe", "feed_forward", "layer_input")


class Placement:
    """Where the arrays of one model lie. Raises SpecError where mesh, rules, model and devices do not fit."""

    def __init__(self, spec: ModelSpec, config: MeshConfig, devices: Sequence[jax.Device] | None = None):
        """On all of JAX's devices; in a plan, on `devices` that are not there."""
        self.exchange = config.exchange
        self.sizes = sizes(config, jax.device_count() if devices is None else len(devices))
        if config.is_one_device and jax.process_count() > 1:
            raise SpecError(
                f"mesh is one device, but there are {jax.process_count()} processes with {jax.device_count()} devices. "
                "Use a mesh of all of them, for example --mesh data=auto."
            )
        # Axes of one device are left out: XLA on the CPU keeps sums over them.
        self._axes = tuple(axis for axis in MESH_AXES if self.sizes[axis] > 1)
        shape = tuple(self.sizes[axis] for axis in self._axes)
        self.mesh = jax.make_mesh(shape, self._axes, axis_types=(AxisType.Auto,) * len(shape), devices=devices)
        self.batch_axes = self._known(BATCH_AXES)
        self._parts, self._compete = math.prod(self.sizes[axis] for axis in BATCH_AXES), spec.sequences_compete
        table = parameter_table(spec)
        cuts = {row.name: partition(row, config, self.sizes) for row in table}
        self.parameters = {name: self.sharding(*cut) for name, cut in cuts.items()}
        self.at_work = {row.name: self.sharding(*at_work(row, cuts[row.name])) for row in table}
        self.of_experts = {
            row.name.rsplit(".", 1)[1]: self.at_work[row.name].spec for row in table if ".moe.experts." in row.name
        }
        self.expert_axes = self._known({**RULES, **config.rules}["expert"])
        self.windows = self.sharding((), self.batch_axes)
        self.whole = self.sharding()

    def _known(self, axes: Iterable[MeshAxis]) -> tuple[MeshAxis, ...]:
        return tuple(axis for axis in axes if axis in self._axes)

    def sharding(self, *cut: tuple[MeshAxis, ...]) -> NamedSharding:
        """Of an array whose dimensions are cut along these axes of the mesh; dimensions that are not named are not."""
        return NamedSharding(self.mesh, PartitionSpec(*(axes or None for axes in cut)))

    def placed(self, weights: Mapping[str, np.ndarray]) -> "_Placed":
        """Weights as arrays on their devices, one at a time: no device ever holds more than its shards."""
        return _Placed(weights, self.parameters)

    def own_sequences(self, batch: int) -> np.ndarray:
        """Which of a micro-batch's sequences this process's devices compute."""
        check_batch(batch, self.sizes)
        found = self.windows.addressable_devices_indices_map((1, batch))
        return np.unique(np.concatenate([np.arange(batch)[rows] for _, rows in found.values()]))

    def of_all_processes(self, windows: np.ndarray) -> jax.Array:
        """Windows [A, B, T + 1] of all processes, from this one's own sequences."""
        return jax.make_array_from_process_local_data(self.windows, windows)

    def filled_up(self, num_sequences: int) -> int:
        """The next number of sequences that can be shared equally; the same one where others would change results."""
        return num_sequences if self._compete else -(-num_sequences // self._parts) * self._parts

    @contextmanager
    def active(self, num_sequences: int) -> Iterator[None]:
        """What is traced inside lies so; where so many sequences cannot be shared equally, as XLA has it."""
        shared = num_sequences % self._parts == 0
        with active(self if shared else None), jax.set_mesh(self.mesh):
            yield


class _Placed(LazyTensors):
    def __init__(self, weights: Mapping[str, np.ndarray], shardings: Mapping[str, NamedSharding]):
        super().__init__(shapes_of(weights))
        self._weights, self._shardings = weights, shardings

    def __getitem__(self, name: str) -> jax.Array:
        return divided(self._weights, name, self._shardings[name])


def divided(arrays: Mapping[str, np.ndarray], name: str, sharding: NamedSharding) -> jax.Array:
    """One of the arrays, which all processes have, on its devices: each process reads the parts of its own."""
    if isinstance(arrays, Shapes):
        return jax.ShapeDtypeStruct(arrays.shapes[name], np.float32, sharding=sharding)
    if isinstance(arrays, LazyTensors):
        return jax.make_array_from_callback(arrays.shapes[name], sharding, arrays.reader(name))
    value = np.asarray(arrays[name])
    return jax.make_array_from_callback(value.shape, sharding, lambda part: value[part])


class Shapes(LazyTensors):
    """What stands for arrays in a plan: their shapes alone."""

    def __init__(self, spec: ModelSpec):
        super().__init__({row.name: row.shape for row in parameter_table(spec)})

    def __getitem__(self, name: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shapes[name], np.float32)


def of_layers(own: NamedSharding) -> NamedSharding:
    """Of arrays of several layers in one, with an axis L in front: each layer lies as its own would."""
    return NamedSharding(own.mesh, PartitionSpec(None, *own.spec))


def gathered(module: nnx.Module, recomputed: Container[str] = ()) -> nnx.Module:
    """The model's module for a mesh, changed in place: what is cut along `fsdp` is put together where it is used.

    Blocks do it themselves, and again on the way back, so that one block's parameters are there at a time. `recomputed`
    names those of which the way back computes all again anyway.
    """
    placement = active_placement()
    if placement is None:
        return module
    layers = module.layers.items() if isinstance(module.layers, nnx.Dict) else enumerate(module.layers)
    for key, layer in layers:
        first = str(key).partition("-")[0]  # of scanned layers, which lie alike
        for name in _BLOCKS:
            if hasattr(layer, name):
                setattr(layer, name, _Gathered(getattr(layer, name), f"layers.{first}.{name}", name in recomputed))
    for name in ("embedding", "position", "layer_inputs", "head"):
        if hasattr(module, name):
            _at_work(getattr(module, name), placement, name)
    return module


class _Gathered(nnx.Module):
    """A block whose parameters are put together when it computes, and not kept for the way back."""

    def __init__(self, block: nnx.Module, name: str, recomputed: bool):
        self.block, self.name, self.recomputed = block, name, recomputed

    def __call__(self, *given: Any, record: Any = None, name: str = "", **named: Any):
        placement = active_placement()
        graph, state = nnx.split(self.block)

        def block(state: nnx.State, given: Any, named: dict[str, Any]) -> Any:
            # Trap: XLA takes what never changes out of the loop over micro-batches, and would put all blocks together
            # before it. Behind the barrier a block's parameters hang on what enters it.
            state, given = jax.lax.optimization_barrier((state, given))
            module = nnx.merge(graph, state)
            _at_work(module, placement, self.name)
            return module(*given, **named)

        given = (jax.lax.with_sharding_constraint(given[0], placement.sharding(placement.batch_axes)), *given[1:])
        if self.recomputed:
            return block(state, given, named)
        return jax.checkpoint(block, policy=_not_gathered)(state, given, named)


def _not_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Whether what this gives may be kept for the way back: neither whole parameters nor another form of them."""
    forms = ("sharding_constraint", "convert_element_type", "reshape", "transpose", "squeeze", "optimization_barrier")
    return primitive.name not in forms


def _at_work(module: nnx.Module, placement: Placement, prefix: str) -> None:
    """Changes the parameters of a module to how they lie when they are computed with."""
    for path, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Param):
            name = ".".join([prefix, *(str(key) for key in path)])
            if placement.at_work[name] != placement.parameters[name]:
                variable[...] = jax.lax.with_sharding_constraint(variable[...], placement.at_work[name])
