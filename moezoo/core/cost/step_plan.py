"""What a training step costs each device of a mesh, by formula: memory, operations, and what travels.

It needs no device and no framework. moezoo/jax_backend/planning/ahead_of_time.py has what XLA makes of the same step;
the two are compared by `moezoo plan`, and by the tests. Writing: writings/scaling.md.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, assert_never

from moezoo.core.config.run_config import Config
from moezoo.core.cost.memory import activation_bytes, copies_bytes, layer_activation_bytes
from moezoo.core.distributed.mesh import BATCH_AXES, MESH_AXES, MeshAxis, MeshConfig
from moezoo.core.distributed.sharding_rules import RULES, Partition, at_work, check_batch, exchanged, partition
from moezoo.core.parameters import Parameter, parameter_table
from moezoo.core.parameters.precision import COMPUTE_BYTES, compute_dtype
from moezoo.core.spec import LatentAttentionSpec, MoESpec, TiedHeadSpec

CollectiveKind = Literal[
    "all-to-all", "ragged-all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute"
]
_FLOAT32_BYTES = _INT32_BYTES = 4


@dataclass(frozen=True)
class Collective:
    """What devices along some axes of the mesh exchange in one step, all arrays of one purpose together.

    Fields:
        kind: `all-to-all`, `all-gather`, `all-reduce`, `reduce-scatter`, as XLA calls them.
        axes: of the mesh, along which the devices of a group lie.
        devices: in a group.
        count: how many arrays. XLA may send several in one message.
        payload: bytes of those arrays on one device: what an all-gather ends with, what the others begin with.
        purpose: in words; empty where XLA's text does not say.
    """

    kind: CollectiveKind
    axes: tuple[MeshAxis, ...]
    devices: int
    count: int
    payload: int
    purpose: str = ""

    @property
    def sent(self) -> int:
        """Bytes that each device sends at least: `(n - 1) / n` of the payload, twice that for an all-reduce.

        Source: Thakur et al. 2005, Optimization of collective communication operations in MPICH, section 4 (ring).
        """
        if self.kind == "collective-permute":
            return self.payload
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.payload * (self.devices - 1) // self.devices


@dataclass(frozen=True)
class DevicePlan:
    """One device's part of a training step.

    Fields:
        memory: bytes by what they hold, in the order of `memory_per_device`.
        collectives: of one step, in the order in which they first happen.
    """

    memory: Mapping[str, int]
    collectives: tuple[Collective, ...]

    @property
    def memory_total(self) -> int:
        """Bytes of all."""
        return sum(self.memory.values())

    @property
    def sent(self) -> int:
        """Bytes that the device sends in one step."""
        return sum(collective.sent for collective in self.collectives)


@dataclass(frozen=True)
class CompiledStep:
    """What XLA says of one device's part of a compiled step, beside which a plan is held.

    Fields:
        collectives: those of one step, with loops counted as often as they run. XLA on the CPU sends bfloat16 as
            float32.
        arguments: bytes of parameters, moments, state and the batch.
        temporary: bytes that the step needs besides; None where what was compiled is not the whole step.
        layers: how many layers were compiled, in each program.
    """

    collectives: tuple[Collective, ...]
    arguments: int
    temporary: int | None
    layers: tuple[int, ...]


def device_plan(config: Config, lengths: Mapping[MeshAxis, int], *, float_bytes: int | None = None) -> DevicePlan:
    """The plan of a config, whose model has a vocabulary, on its mesh with so many devices along each axis.

    `float_bytes`: of an activation that travels, in place of the compute dtype's: XLA on the CPU sends bfloat16 as
    float32. Raises SpecError where mesh, rules, model and batch do not fit.
    """
    step = _Step.of(config, lengths, float_bytes)
    found = [*_gathered_parameters(step), *_exchanges(step), *_tensor_sums(step), *_gradients(step), *_statistics(step)]
    return DevicePlan(memory_per_device(config, lengths), tuple(_together(found, step.micro_batches)))


def memory_per_device(config: Config, lengths: Mapping[MeshAxis, int]) -> dict[str, int]:
    """Bytes that one device holds in a step. The first four are exact, the others estimates as in `training_memory`.

    With n numbers of the trained parameters that lie on the device, A micro-batches of which it has p tokens, and c
    bytes of the compute dtype:

    - `parameters`: 4 n; `gradients`: 4 n, and with A > 1 as many again, or as many as `rematerialize` leaves of them
      (`training_memory`); `moments`: 8 n; `state`: 4 a number, whole everywhere.
    - `put together`: what is cut along the batch's axes is whole where it is used: the largest block of a layer, and
      what is outside of layers, less the parts that the device has anyway; 8 bytes a number, with its gradient.
    - `activations`: p times what `training_memory` counts, with heads and hidden widths divided along `tensor`. An
      expert's rows are not the p K of these tokens but what arrives: n rows for each row that `exchanged` allows, or
      all n p K of a group with `exchange: allgather`.
    - `exchange`: with experts on n devices, one layer's rows to and from all of them, in buffers of c bytes a number.
    - `logits`: `8 p V`, divided where a rule cuts the vocabulary along `tensor`.

    Source: Rajbhandari et al. 2019, ZeRO, arXiv 1910.02054, section 3.1 (what Adam holds); Korthikanti et al. 2022,
    arXiv 2205.05198, section 4 (activations along `tensor`).
    """
    step = _Step.of(config, lengths, None)
    spec, training = config.model, config.training
    trained = sum(step.held(row) for row in step.table if row.trained)
    state = sum(step.held(row) for row in step.table if not row.trained)
    newest = 0 if step.micro_batches == 1 else min(trained, _newest(step, trained))
    layers, copies = [], []
    for layer in spec.all_layers:
        rows = None if layer.moe is None else step.arriving(layer.moe)
        length = training.sequence_length
        layers.append(layer_activation_bytes(layer, spec.embed_dim, length, step.compute, rows=rows, parts=step.parts))
        copies.append(copies_bytes(layer, spec.embed_dim, step.compute, rows=rows, parts=step.parts))
    kept = activation_bytes(spec, training.rematerialize, layers, copies)
    return {
        "parameters": _FLOAT32_BYTES * trained,
        "gradients": _FLOAT32_BYTES * (trained + newest),
        "moments": 2 * _FLOAT32_BYTES * trained,
        "state": _FLOAT32_BYTES * state,
        "put together": 2 * _FLOAT32_BYTES * _most_put_together(step),
        "activations": round(step.tokens * kept),
        "exchange": max((2 * step.exchange_bytes(moe) for _, moe in spec.moes), default=0),
        "logits": 2 * _FLOAT32_BYTES * step.tokens * spec.vocab // step.parts.get("vocab", 1),
    }


# --- one step on one device ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """What the formulas need of a step.

    Fields:
        sequences, tokens: of a micro-batch, that a device has.
        compute: bytes of an activation in memory; travelling: of one that travels.
        cuts: of each parameter.
        parts: into how many parts a logical axis is cut along `tensor`, where it is.
    """

    config: Config
    lengths: Mapping[MeshAxis, int]
    table: tuple[Parameter, ...]
    cuts: Mapping[str, Partition]
    micro_batches: int
    sequences: int
    tokens: int
    compute: int
    travelling: int
    parts: Mapping[str, int]

    @classmethod
    def of(cls, config: Config, lengths: Mapping[MeshAxis, int], float_bytes: int | None) -> "_Step":
        training, table = config.training, tuple(parameter_table(config.model))
        size = training.batch_size // training.gradient_accumulation
        check_batch(size, lengths)
        sequences = size // math.prod(lengths[axis] for axis in BATCH_AXES)
        compute = COMPUTE_BYTES[compute_dtype(config.model)]
        return cls(
            config,
            lengths,
            table,
            {row.name: partition(row, config.mesh, lengths) for row in table},
            training.gradient_accumulation,
            sequences,
            sequences * training.sequence_length,
            compute,
            float_bytes or compute,
            {
                name: lengths["tensor"]
                for name, axes in _rules(config.mesh).items()
                if "tensor" in axes and lengths["tensor"] > 1
            },
        )

    @property
    def batch_axes(self) -> tuple[MeshAxis, ...]:
        return tuple(axis for axis in BATCH_AXES if self.lengths[axis] > 1)

    @property
    def expert_axes(self) -> tuple[MeshAxis, ...]:
        axes = _rules(self.config.mesh)["expert"]
        return tuple(axis for axis in MESH_AXES if axis in axes and self.lengths[axis] > 1)

    @property
    def group(self) -> int:
        """Devices that share the experts."""
        return self.size(self.expert_axes)

    def size(self, axes: Iterable[MeshAxis]) -> int:
        return math.prod(self.lengths[axis] for axis in axes)

    def at_work(self, row: Parameter) -> Partition:
        return at_work(row, self.cuts[row.name])

    def held(self, row: Parameter) -> int:
        return row.size // self.size(axis for axes in self.cuts[row.name] for axis in axes)

    def working(self, row: Parameter) -> int:
        """Numbers of it that the device computes with."""
        return row.size // self.size(axis for axes in self.at_work(row) for axis in axes)

    def arriving(self, moe: MoESpec) -> Fraction:
        """Rows that a device's experts have room for, for each token that it has."""
        if self.group == 1:
            return Fraction(moe.router.top_k)
        if self.config.mesh.exchange == "allgather":
            return Fraction(self.group * moe.num_slots)
        return Fraction(self.group * self.rows(moe), self.tokens)

    def rows(self, moe: MoESpec) -> int:
        return exchanged(moe, self.sequences, self.config.training.sequence_length, self.group).rows

    def exchange_bytes(self, moe: MoESpec) -> int:
        """Of the rows of one way."""
        if self.group == 1:
            return 0
        rows = self.tokens if self.config.mesh.exchange == "allgather" else self.rows(moe)
        return self.compute * self.group * rows * self.width(moe)

    def width(self, moe: MoESpec) -> int:
        """Of the rows that travel."""
        return self.config.model.embed_dim if moe.latent_dim is None else moe.latent_dim

    def collective(
        self, kind: CollectiveKind, axes: tuple[MeshAxis, ...], purpose: str, payload: int, count: int = 1
    ) -> Collective:
        """So many arrays of so many bytes each."""
        return Collective(kind, axes, self.size(axes), count, count * payload, purpose)


def _rules(mesh: MeshConfig) -> dict[str, tuple[MeshAxis, ...]]:
    return {**RULES, **{str(name): axes for name, axes in mesh.rules.items()}}


def _newest(step: _Step, trained: int) -> int:
    """Numbers of the gradients of one micro-batch that are there at once, beside those of all before."""
    match step.config.training.rematerialize:
        case "none":
            return trained
        case "experts":
            experts = _by_layer((row for row in step.table if ".moe.experts." in row.name), step.held).values()
            return trained - sum(experts) + max(experts, default=0)
        case "block":
            return max(_by_layer(step.table, step.held).values())
        case _:
            assert_never(step.config.training.rematerialize)


def _most_put_together(step: _Step) -> int:
    """Numbers that a device has for a while beside its own: of the largest block, and of what is outside of layers."""

    def missing(row: Parameter) -> int:
        return step.working(row) - step.held(row)

    outside = sum(missing(row) for row in step.table if not row.name.startswith("layers."))
    return max(_by_layer(step.table, missing, 3).values()) + outside


def _by_layer(table: Iterable[Parameter], size: Callable[[Parameter], int], words: int = 2) -> dict[str, int]:
    """Sums over the parameters of each layer, or of each block of one, which has three words in a name."""
    sums: dict[str, int] = {}
    for row in table:
        if row.name.startswith("layers."):
            name = ".".join(row.name.split(".")[:words])
            sums[name] = sums.get(name, 0) + size(row)
    return sums


# --- what travels: of one micro-batch, in the order of a step --------------------------------------------------------


def _gathered_parameters(step: _Step) -> Iterator[Collective]:
    """A parameter that is cut along the batch's axes, `4 * numbers at work`: in a layer twice, forward and backward."""
    for row in step.table:
        axes = _taken_off(step.cuts[row.name], step.at_work(row))
        if axes:
            times = 2 if row.name.startswith("layers.") else 1
            yield step.collective("all-gather", axes, "parameters", _FLOAT32_BYTES * step.working(row), times)


def _exchanges(step: _Step) -> Iterator[Collective]:
    """Tokens to their experts and back, in each layer with a mixture, experts being on n devices.

    `padded`, r rows of width D for each device: four all-to-alls of `n r D` numbers, there and back, forward and
    backward; two more where the way back computes it again. How many rows are used is told by `E` integers, once each
    way forward, unless every place has its expert.

    `ragged`: as many rows as there are, p K if no router prefers this device's experts, in buffers as for `padded`;
    three numbers for each device say where they go. By formula alone: XLA on the CPU has no such exchange.

    `allgather`: the n p tokens of the group with their choices, and a reduce-scatter of what comes back; backward the
    reverse of both.
    """
    again = step.config.training.rematerialize != "none"
    axes, n, p = step.expert_axes, step.group, step.tokens
    for layer in step.config.model.all_layers:
        moe = layer.moe
        if moe is None or n == 1:
            continue
        width, k = step.width(moe), moe.num_slots
        if step.config.mesh.exchange == "allgather":
            rows, forward = n * p * width * step.travelling, 2 if again else 1
            choices = n * p * k
            yield step.collective("all-gather", axes, "tokens to experts", rows, forward + 1)
            for size in (_INT32_BYTES, 1, _FLOAT32_BYTES):  # experts, which are used, weights
                yield step.collective("all-gather", axes, "choices to experts", choices * size, forward)
            yield step.collective("reduce-scatter", axes, "tokens back", rows, 2)
            yield step.collective("reduce-scatter", axes, "weights back", choices * _FLOAT32_BYTES)
            continue
        counts = _INT32_BYTES * moe.num_experts
        if step.config.mesh.exchange == "ragged":
            rows = p * moe.router.top_k * width * step.travelling
            yield step.collective("ragged-all-to-all", axes, "tokens to experts and back", rows, 6 if again else 4)
            yield step.collective("all-to-all", axes, "rows of each expert", counts, 2 if again else 1)
            yield step.collective("all-to-all", axes, "places of rows", _INT32_BYTES * n, 6 if again else 3)
            continue
        plan = exchanged(moe, step.sequences, step.config.training.sequence_length, n)
        rows = n * plan.rows * width * step.travelling
        yield step.collective("all-to-all", axes, "tokens to experts and back", rows, 6 if again else 4)
        if plan.places is None:
            yield step.collective("all-to-all", axes, "rows of each expert", counts, 2 if again else 1)


def _tensor_sums(step: _Step) -> Iterator[Collective]:
    """Sums over what is cut along `tensor`, p numbers of a width each.

    A matrix whose inputs are cut gives parts of its outputs: they are summed forward. One whose outputs are cut gives
    parts of its inputs' gradient: they are summed backward, and so is that of the rotated key which all heads of latent
    attention share. All experts of a layer give one sum forward; backward there
    are two of that width, and one of the K weights.

    Source: Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053, section 3. Differs: queries, keys and values, gate and
    up, each have a sum of their own.
    """
    if not step.parts:
        return
    axes: tuple[MeshAxis, ...] = ("tensor",)
    p = step.tokens
    for row in step.table:
        cut = [place for place, own in enumerate(step.at_work(row)) if "tensor" in own]
        is_matrix = len(row.shape) > 1 and row.axes != ("head", "head_dim") and row.axes != ("kv_head", "head_dim")
        if not cut or not is_matrix or ".moe.experts." in row.name:
            continue
        way, width = ("forward", row.shape[-1]) if cut[0] == 0 else ("backward", row.shape[0])
        yield step.collective("all-reduce", axes, f"parts of blocks, {way}", step.travelling * p * width)
    for layer in step.config.model.all_layers:
        moe, attention = layer.moe, layer.attention
        if isinstance(attention, LatentAttentionSpec) and "head" in step.parts:
            size = step.travelling * p * attention.rope_head_dim
            yield step.collective("all-reduce", axes, "parts of blocks, backward", size)
        if moe is not None:
            rows = step.travelling * p * step.width(moe)
            yield step.collective("all-reduce", axes, "parts of experts, forward", rows)
            yield step.collective("all-reduce", axes, "parts of experts, backward", rows, 2)
            yield step.collective("all-reduce", axes, "parts of experts, backward", _FLOAT32_BYTES * p * moe.num_slots)


def _gradients(step: _Step) -> Iterator[Collective]:
    """Of each parameter, `4 * numbers at work`, summed over the batch's axes that do not cut it, for each micro-batch.

    A matrix that is embedding and head has a gradient from each. Compilers for GPU and TPU turn the sum of a gradient
    that is cut along an axis into a reduce-scatter along it, which sends half of that; XLA on the CPU does not.
    """
    tied = isinstance(step.config.model.head, TiedHeadSpec)
    for row in step.table:
        cut = {axis for axes in step.at_work(row) for axis in axes}
        axes = tuple(axis for axis in step.batch_axes if axis not in cut)
        if row.trained and axes:
            times = 2 if tied and row.name == "embedding.weight" else 1
            yield step.collective("all-reduce", axes, "gradients", _FLOAT32_BYTES * step.working(row), times)


def _statistics(step: _Step) -> Iterator[Collective]:
    """Losses and loads of the whole batch: of each mixture two counts and one mean of E numbers, and a few numbers.

    How many numbers there are depends on the losses, and is not followed here: they are some hundred bytes.
    """
    if not step.batch_axes:
        return
    for _, moe in step.config.model.moes:
        yield step.collective("all-reduce", step.batch_axes, "loads and losses", _FLOAT32_BYTES * moe.num_choices, 3)
    yield step.collective("all-reduce", step.batch_axes, "loads and losses", _FLOAT32_BYTES)


def _taken_off(cut: Partition, whole: Partition) -> tuple[MeshAxis, ...]:
    """Axes that cut the one and not the other."""
    axes = {axis for ours, theirs in zip(cut, whole, strict=True) for axis in ours if axis not in theirs}
    return tuple(axis for axis in MESH_AXES if axis in axes)


def _together(found: Iterable[Collective], micro_batches: int) -> Iterator[Collective]:
    """Those of one kind, purpose and axes as one; of all micro-batches."""
    sums: dict[tuple[str, str, tuple[MeshAxis, ...]], Collective] = {}
    for each in found:
        key = (each.kind, each.purpose, each.axes)
        before = sums.get(key, replace(each, count=0, payload=0))
        sums[key] = replace(each, count=before.count + each.count, payload=before.payload + each.payload)
    for each in sums.values():
        yield replace(each, count=each.count * micro_batches, payload=each.payload * micro_batches)


# --- other meshes ----------------------------------------------------------------------------------------------------


def smaller(lengths: Mapping[MeshAxis, int]) -> dict[MeshAxis, int]:
    """A mesh with the same axes and fewer devices, that divides what this one divides: their smallest prime factors."""
    return {
        axis: next(size for size in range(min(2, length), length + 1) if length % size == 0)
        for axis, length in lengths.items()
    }


def with_same_sequences(config: Config, lengths: Mapping[MeshAxis, int], others: Mapping[MeshAxis, int]) -> Config:
    """The config for another mesh, with as many sequences of a micro-batch on each device."""
    before, after = (math.prod(each[axis] for axis in BATCH_AXES) for each in (lengths, others))
    training = config.training.model_copy(update={"batch_size": config.training.batch_size * after // before})
    mesh = config.mesh.model_copy(update={str(axis): size for axis, size in others.items()})
    return config.model_copy(update={"training": training, "mesh": mesh})
