"""Memory and communication of one training step on each device of a mesh, by formula.

No accelerator and no framework is needed. moezoo/jax_backend/planning/ahead_of_time.py reads the same numbers from
XLA's compiled program; `moezoo plan` and the tests compare the two. Writing: writings/scaling.md.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import assert_never

from moezoo.core.config.run_config import Config
from moezoo.core.config.update_rules import update_rules
from moezoo.core.cost.communication import Collective, step_collectives
from moezoo.core.cost.memory import activation_bytes, expert_activation_bytes, layer_activation_bytes, mask_bytes
from moezoo.core.cost.sharded_step import ShardedStep
from moezoo.core.distributed.mesh import BATCH_AXES, MeshAxis
from moezoo.core.parameters import Parameter
from moezoo.core.parameters.capacity import has_variable_rows

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a training step on one device, in bytes; the fields are explained in `memory_per_device`."""

    parameters: int
    gradients: int
    moments: int
    state: int
    gathered: int
    activations: int
    exchange: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, int]:
        """Return the total and the bytes of each kind."""
        keys = {"gathered": "put together"}  # the key of a stable format
        return {"total": self.total} | {keys.get(kind, kind): size for kind, size in asdict(self).items()}


@dataclass(frozen=True)
class DevicePlan:
    """One device's share of a training step.

    Fields:
        memory: bytes by kind.
        collectives: the collectives of one step, in the order in which they first run.
    """

    memory: DeviceMemory
    collectives: tuple[Collective, ...]

    @property
    def sent(self) -> int:
        """Bytes that the device sends in one step."""
        return sum(collective.sent for collective in self.collectives)


@dataclass(frozen=True)
class CompiledStep:
    """One device's share of a training step, as XLA compiled it.

    Fields:
        collectives: the collectives of one step, those in a loop counted once per iteration. XLA on the CPU sends
            bfloat16 as float32.
        arguments: bytes of parameters, moments, state and the batch.
        temporary: bytes of temporary arrays; None if only a part of the model was compiled.
        layers: number of layers in each compiled program.
    """

    collectives: tuple[Collective, ...]
    arguments: int
    temporary: int | None
    layers: tuple[int, ...]


def device_plan(config: Config, lengths: Mapping[MeshAxis, int], *, float_bytes: int | None = None) -> DevicePlan:
    """Return memory and communication of one device, for a config with a vocabulary size and a mesh of these lengths.

    `float_bytes`: bytes of an activation in a collective, in place of the compute dtype's: XLA on the CPU sends
    bfloat16 as float32. Raises SpecError: mesh, rules, model and batch do not fit.
    """
    step = ShardedStep.of(config, lengths, float_bytes)
    return DevicePlan(memory_per_device(config, lengths), step_collectives(step))


def memory_per_device(config: Config, lengths: Mapping[MeshAxis, int], *, least: bool = False) -> DeviceMemory:
    """Return the memory of one device. The first four kinds are exact, the others estimates as in `training_memory`.

    `least`: leave out activations that may not be saved: attention probabilities and masks, which fused attention
    recomputes, and the rows of experts whose number depends on the routing; and a second gradient beside the
    accumulated one.

    With n parameters stored on the device, t of them trained, A micro-batches of p tokens per device, and c bytes of
    the compute dtype:

    - `parameters`: 4 n; `gradients`: 4 t, and with A > 1 the newest gradient as well, or the part of it that
      `rematerialize` leaves in memory (`training_memory`); `moments`: what the optimizer keeps, sharded as its
      parameters are, 8 t for AdamW; `state`: 4 a number, replicated.
    - `gathered`: parameters sharded over batch axes are all-gathered for use: the largest block of a layer, and those
      outside of layers, minus the shards that the device stores anyway; 8 bytes a number, with its gradient.
    - `activations`: p times the bytes per token of `training_memory`, with heads and hidden widths divided by `tensor`.
      An expert computes not the p K rows of these tokens but those it receives: n rows for each row of the
      `padded_exchange`, or all n p K of a group with `exchange: allgather`.
    - `exchange`: with experts on n devices, buffers for one layer's dispatch and combine, c bytes a number.
    - `logits`: `8 p V`, divided by `tensor` if a rule shards the vocabulary over it.

    Source: Rajbhandari et al. 2019, ZeRO, arXiv 1910.02054, section 3.1 (memory of Adam); Korthikanti et al. 2022,
    arXiv 2205.05198, section 4 (activations with tensor parallelism).
    """
    step = ShardedStep.of(config, lengths)
    spec, training, shards = config.model, config.training, step.tensor_shards
    parameters = sum(step.sharded_size(row) for row in step.table if row.trained)
    trained = sum(step.sharded_size(row) for row in step.table if row.name in step.trained)
    state = sum(step.sharded_size(row) for row in step.table if not row.trained)
    newest = 0 if least or step.micro_batches == 1 else min(trained, _newest_gradients(step, trained))
    layers, experts = [], []
    for layer in spec.all_layers:
        rows = None if layer.moe is None else step.expert_rows_per_token(layer.moe)
        width, length, size = spec.embed_dim, 0 if least else training.sequence_length, step.compute_bytes
        if least and layer.moe is not None and has_variable_rows(layer.moe):
            rows = Fraction(0)
        layers.append(layer_activation_bytes(layer, width, length, size, rows=rows, shards=shards))
        experts.append(expert_activation_bytes(layer, width, size, rows=rows, shards=shards))
    moes = [layer.moe for layer in spec.all_layers if layer.moe is not None]
    per_token = activation_bytes(spec, training.rematerialize, layers, experts) + (0 if least else mask_bytes(config))
    return DeviceMemory(
        parameters=_FLOAT32_BYTES * parameters,
        gradients=_FLOAT32_BYTES * (trained + newest),
        moments=_FLOAT32_BYTES * _moments(step),
        state=_FLOAT32_BYTES * state,
        gathered=2 * _FLOAT32_BYTES * _largest_gather(step),
        activations=round(step.tokens * per_token),
        exchange=max((2 * step.exchange_bytes(moe) for moe in moes), default=0),
        logits=2 * _FLOAT32_BYTES * step.tokens * spec.vocab // shards.get("vocab", 1),
    )


def _moments(step: ShardedStep) -> int:
    """Return how many numbers of the optimizer's state the device stores."""
    rows = [row for row in step.table if row.name in step.trained]
    rules = update_rules(step.config.optimizer, rows)
    return sum(
        step.sharded_size(row, axes) for row in rows for axes in rules[row.name].state_axes(len(row.shape)).values()
    )


def _newest_gradients(step: ShardedStep, trained: int) -> int:
    """Return how many numbers of a micro-batch's gradients exist at once, beside the accumulated ones."""
    match step.config.training.rematerialize:
        case "none":
            return trained
        case "experts":
            rows = [row for row in step.table if ".moe.experts." in row.name and row.name in step.trained]
            experts = _by_layer(rows, step.sharded_size).values()
            return trained - sum(experts) + max(experts, default=0)
        case "block":
            rows = [row for row in step.table if row.name in step.trained]
            return max(_by_layer(rows, step.sharded_size).values(), default=0)
        case _:
            assert_never(step.config.training.rematerialize)


def _largest_gather(step: ShardedStep) -> int:
    """Return how many numbers are gathered at once: those of the largest block, and of parameters outside of layers."""

    def gathered(row: Parameter) -> int:
        return step.gathered_size(row) - step.sharded_size(row)

    outside = sum(gathered(row) for row in step.table if not row.name.startswith("layers."))
    return max(_by_layer(step.table, gathered, 3).values()) + outside


def _by_layer(table: Iterable[Parameter], size: Callable[[Parameter], int], words: int = 2) -> dict[str, int]:
    """Return sizes summed over each layer, or over each block of a layer, whose name has three words."""
    sums: dict[str, int] = {}
    for row in table:
        if row.name.startswith("layers."):
            name = ".".join(row.name.split(".")[:words])
            sums[name] = sums.get(name, 0) + size(row)
    return sums


# --- smaller meshes --------------------------------------------------------------------------------------------------


def smaller(lengths: Mapping[MeshAxis, int]) -> dict[MeshAxis, int]:
    """Return a mesh with the same axes and fewer devices, each length reduced to its smallest prime factor."""
    return {
        axis: next(size for size in range(min(2, length), length + 1) if length % size == 0)
        for axis, length in lengths.items()
    }


def with_same_sequences(config: Config, lengths: Mapping[MeshAxis, int], others: Mapping[MeshAxis, int]) -> Config:
    """Return the config for another mesh, with the same number of sequences of a micro-batch on each device."""
    before, after = (math.prod(each[axis] for axis in BATCH_AXES) for each in (lengths, others))
    training = config.training.model_copy(update={"batch_size": config.training.batch_size * after // before})
    mesh = config.mesh.model_copy(update={str(axis): size for axis, size in others.items()})
    return config.model_copy(update={"training": training, "mesh": mesh})
