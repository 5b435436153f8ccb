"""Shardings of a model's arrays on a mesh of devices. Model files are single-device code.

A model on a mesh is the same program; XLA partitions it by the shardings of its arrays (GSPMD). What it would partition
badly is told here: parameters that are sharded over `fsdp` are all-gathered a block at a time, activations stay with
their sequences, and what is done to each row by itself is done where the row is.
"""

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moezoo.core.checkpoint.safetensors_file import LazyTensors, shapes_of
from moezoo.core.distributed.mesh import BATCH_AXES, MESH_AXES, MeshAxis, MeshConfig, sizes
from moezoo.core.distributed.sharding_rules import RULES, check_batch, gathered_partition, partition
from moezoo.core.errors import SpecError
from moezoo.core.parameters import parameter_table
from moezoo.core.quantization.weight import QuantizedWeight, stored
from moezoo.core.spec import ModelSpec
from moezoo.jax_backend.arrays import canonical_name
from moezoo.jax_backend.layer import WrapBlock
from moezoo.jax_backend.runtime.placement import active
from moezoo.jax_backend.runtime.typed import State

OUTSIDE_LAYERS = ("embedding.", "position.", "layer_inputs.", "head.")
"""Names of the parameters that are all-gathered once a step, begin so."""


class Placement:
    """Shardings of one model's arrays. Raises SpecError where mesh, rules, model and devices do not fit.

    Fields:
        parameters: sharding of each parameter between steps, by canonical name.
        computing: sharding of each parameter while its block computes: gathered over the batch's axes.
        experts: partition of each parameter of the experts while they compute, by its name in the module.
        expert_axes, ngram_axes, batch_axes: axes of the mesh over which experts, the features of n-gram embeddings and
            sequences are sharded.
        batch: sharding of a step's tokens and targets [A, B, T].
        replicated: sharding of an array that every device has as a whole.
    """

    def __init__(self, spec: ModelSpec, config: MeshConfig, devices: Sequence[jax.Device] | None = None):
        """On all of JAX's devices; in a plan, on simulated `devices`."""
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
        partitions = {row.name: partition(row, config, self.sizes) for row in table}
        self.parameters = {name: self.sharding(*axes) for name, axes in partitions.items()}
        self.computing = {row.name: self.sharding(*gathered_partition(row, partitions[row.name])) for row in table}
        self.experts: dict[str, PartitionSpec] = {
            row.name.partition(".experts.")[2]: self.computing[row.name].spec
            for row in table
            if ".moe.experts." in row.name
        }
        self.expert_axes, self.ngram_axes = (
            self._known(config.rules.get(name, RULES[name])) for name in ("expert", "ngram")
        )
        self.batch = self.sharding((), self.batch_axes)
        self.replicated = self.sharding()

    def _known(self, axes: Iterable[MeshAxis]) -> tuple[MeshAxis, ...]:
        return tuple(axis for axis in axes if axis in self._axes)

    def sharding(self, *partition: tuple[MeshAxis, ...]) -> NamedSharding:
        """Return the sharding of an array whose dimensions are sharded over these axes; those not named are whole."""
        return NamedSharding(self.mesh, PartitionSpec(*(axes or None for axes in partition)))

    def shard(self, weights: Mapping[str, np.ndarray]) -> "_Sharded":
        """Shard weights over the mesh, one array at a time: no device ever holds more than its shards."""
        return _Sharded(weights, self.parameters)

    def own_sequences(self, batch: int) -> np.ndarray:
        """Return the indices of the sequences of a micro-batch that this process's devices compute."""
        check_batch(batch, self.sizes)
        found = self.batch.addressable_devices_indices_map((1, batch))
        return np.unique(np.concatenate([np.arange(batch)[index[1]] for index in found.values() if index is not None]))

    def of_all_processes(self, tokens: np.ndarray) -> jax.Array:
        """Return the tokens, or targets, [A, B, T] of all processes, from this one's own sequences."""
        of_all: jax.Array = jax.make_array_from_process_local_data(self.batch, tokens)
        return of_all

    def divides(self, num_sequences: int) -> bool:
        """Return True where so many sequences can be sharded equally."""
        return num_sequences % self._parts == 0

    def padded_batch(self, num_sequences: int) -> int:
        """Return the next number of sequences that can be sharded equally; the same if more would change results."""
        return num_sequences if self._compete else -(-num_sequences // self._parts) * self._parts

    @contextmanager
    def active(self, num_sequences: int) -> Iterator[None]:
        """Trace for this mesh inside; batches that cannot be sharded equally are left to XLA."""
        with active(self if self.divides(num_sequences) else None), jax.set_mesh(self.mesh):
            yield


class _Sharded(LazyTensors):
    def __init__(self, weights: Mapping[str, np.ndarray], shardings: Mapping[str, NamedSharding]):
        super().__init__(shapes_of(weights))
        self._weights, self._shardings = weights, shardings

    def __getitem__(self, name: str) -> jax.Array:
        if isinstance(stored(self._weights, name), QuantizedWeight):
            raise SpecError(
                f"{name} is quantized, and a mesh of devices does not compute with codes. Use one device, or make a "
                "checkpoint of floats with `moezoo convert --dequantize`."
            )
        return shard(self._weights, name, self._shardings[name])


def shard(arrays: Mapping[str, np.ndarray], name: str, sharding: NamedSharding) -> jax.Array:
    """Put one of the arrays, which all processes have, on its devices: each process reads its own shards."""
    if isinstance(arrays, Shapes):
        return cast(jax.Array, jax.ShapeDtypeStruct(arrays.shapes[name], np.float32, sharding=sharding))
    if isinstance(arrays, LazyTensors):
        shape, read = arrays.shapes[name], arrays.reader(name)
    else:
        value = np.asarray(arrays[name])
        shape, read = value.shape, value.__getitem__
    return jax.make_array_from_callback(shape, sharding, cast(Callable[..., np.ndarray], read))


class Shapes(LazyTensors):
    """Shapes in place of a model's arrays, for a plan."""

    def __init__(self, spec: ModelSpec):
        super().__init__({row.name: row.shape for row in parameter_table(spec)})

    def __getitem__(self, name: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shapes[name], np.float32)


def stacked(own: NamedSharding) -> NamedSharding:
    """Return the sharding of several layers' arrays in one, with an axis L in front, from that of each layer's own."""
    return NamedSharding(own.mesh, PartitionSpec(None, *own.spec))


def with_axes(whole: NamedSharding, axes: Sequence[int]) -> NamedSharding:
    """Return the sharding of an array that has these axes of another one."""
    return NamedSharding(whole.mesh, PartitionSpec(*(whole.spec[axis] for axis in axes)))


def gather_outside_layers(parameters: Mapping[str, jax.Array], placement: Placement) -> dict[str, jax.Array]:
    """All-gather what the model uses outside of its layers; the layers' blocks gather their own (`GatherBlocks`)."""
    return {
        name: _gather(value, name, placement) if name.startswith(OUTSIDE_LAYERS) else value
        for name, value in parameters.items()
    }


def gather_blocks(placement: Placement, recomputed: Container[str] = ()) -> WrapBlock:
    """All-gather the parameters of each block where it computes, and again in the backward pass.

    So only one block's whole parameters are there at a time. `recomputed` names the blocks that the backward pass
    recomputes anyway.
    """

    def wrap(block: nnx.Module, name: str) -> nnx.Module:
        return _Gathered(block, name, placement, name.rpartition(".")[2] in recomputed)

    return wrap


class _Gathered(nnx.Module):
    """A block whose parameters are all-gathered when it computes, and not stored for the backward pass."""

    def __init__(self, block: nnx.Module, name: str, placement: Placement, recomputed: bool):
        self.block, self.name, self.placement, self.recomputed = block, name, placement, recomputed

    def __call__(self, *inputs: Any, record: Any = None, name: str = "", exchange: Any = None, **named: Any) -> Any:
        placement = self.placement
        graph, state = nnx.split(self.block)
        static = {} if exchange is None else {"exchange": exchange}

        def block(state: State, inputs: Any, named: dict[str, Any]) -> Any:
            # Trap: XLA takes what never changes out of the loop over micro-batches, and would gather all blocks before
            # it. The barrier makes a block's parameters depend on the block's input. It covers no other input: a key
            # that nothing draws from stays out of the program.
            state, x_BTD = jax.lax.optimization_barrier((state, inputs[0]))
            module = nnx.merge(graph, _gather_state(state, self.name, placement))
            return module(x_BTD, *inputs[1:], **named, **static)

        rows = placement.sharding(placement.batch_axes)
        inputs = (jax.lax.with_sharding_constraint(inputs[0], rows), *inputs[1:])
        if self.recomputed:
            return block(state, inputs, named)
        return jax.checkpoint(block, policy=_not_gathered)(state, inputs, named)


def _not_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Return True for a result that may be stored for the backward pass: no whole parameter, nor another form of it."""
    forms = ("sharding_constraint", "convert_element_type", "reshape", "transpose", "squeeze", "optimization_barrier")
    return primitive.name not in forms


def _gather_state(state: State, prefix: str, placement: Placement) -> State:
    def gather(path: Any, variable: Any) -> Any:
        if not isinstance(variable, nnx.Param):
            return variable
        name = f"{prefix}.{canonical_name(path)}"
        return variable.replace(_gather(variable[...], name, placement))

    gathered: State = jax.tree.map_with_path(gather, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return gathered


def _gather(value: jax.Array, name: str, placement: Placement) -> jax.Array:
    """All-gather a parameter to the sharding with which it is computed with."""
    if placement.computing[name] == placement.parameters[name]:
        return value
    gathered: jax.Array = jax.lax.with_sharding_constraint(value, placement.computing[name])
    return gathered
