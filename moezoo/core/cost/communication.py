"""Collectives of one training step on a mesh and the bytes they send, by formula. Writing: writings/scaling.md."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from moezoo.core.cost.sharded_step import ShardedStep
from moezoo.core.distributed.mesh import MESH_AXES, MeshAxis
from moezoo.core.distributed.sharding_rules import Partition, padded_exchange
from moezoo.core.spec import LatentAttentionSpec, MoESpec, TiedHeadSpec

CollectiveKind = Literal[
    "all-to-all", "ragged-all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute"
]
_FLOAT32_BYTES = _INT32_BYTES = 4

_JSON_PURPOSES = {
    "expert dispatch and combine": "tokens to experts and back",
    "token dispatch": "tokens to experts",
    "routing choices": "choices to experts",
    "token combine": "tokens back",
    "gradients of routing weights": "weights back",
    "rows per expert": "rows of each expert",
    "row offsets": "places of rows",
    "partial sums of blocks, forward": "parts of blocks, forward",
    "partial sums of blocks, backward": "parts of blocks, backward",
    "partial sums of experts, forward": "parts of experts, forward",
    "partial sums of experts, backward": "parts of experts, backward",
    "losses and expert loads": "loads and losses",
}
"""Purposes whose name in `--json`, a stable format, differs from the one on the page."""


@dataclass(frozen=True)
class Collective:
    """A collective operation of one step; all arrays of one purpose are counted together.

    Fields:
        kind: `all-to-all`, `all-gather`, `all-reduce`, `reduce-scatter`, as XLA names them.
        axes: the mesh axes along which it communicates.
        devices: number of devices in a group.
        count: number of arrays. XLA may combine several in one message.
        payload: bytes of those arrays on one device: the output of an all-gather, the input of all others.
        purpose: a label; empty if XLA's text does not name one.
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

    def to_json(self) -> dict[str, Any]:
        """Return the collective as plain data."""
        return {
            "purpose": _JSON_PURPOSES.get(self.purpose, self.purpose),
            "kind": self.kind,
            "axes": list(self.axes),
            "devices": self.devices,
            "arrays": self.count,
            "payload_bytes": self.payload,
            "sent_bytes": self.sent,
        }


def step_collectives(step: ShardedStep) -> tuple[Collective, ...]:
    """Return the collectives of one step in the order in which they first run, one per kind, purpose and axes."""
    found = [
        *_parameter_gathers(step),
        *_ngram_lookups(step),
        *_expert_exchanges(step),
        *_tensor_reductions(step),
        *_gradient_reductions(step),
        *_loss_reductions(step),
    ]
    sums: dict[tuple[str, str, tuple[MeshAxis, ...]], Collective] = {}
    for each in found:
        key = (each.kind, each.purpose, each.axes)
        before = sums.get(key, replace(each, count=0, payload=0))
        sums[key] = replace(each, count=before.count + each.count, payload=before.payload + each.payload)
    times = step.micro_batches
    return tuple(replace(each, count=each.count * times, payload=each.payload * times) for each in sums.values())


def _collective(
    step: ShardedStep, kind: CollectiveKind, axes: tuple[MeshAxis, ...], purpose: str, payload: int, count: int = 1
) -> Collective:
    """Return a collective of `count` arrays of `payload` bytes each."""
    return Collective(kind, axes, step.num_devices(axes), count, count * payload, purpose)


# --- collectives of one micro-batch, in the order of a step ----------------------------------------------------------


def _parameter_gathers(step: ShardedStep) -> Iterator[Collective]:
    """All-gather parameters that are sharded over batch axes, `4 * gathered size`: in layers forward and backward."""
    for row in step.table:
        axes = _gathered_axes(step.partitions[row.name], step.gathered_partition(row))
        if axes:
            times = 2 if row.name.startswith("layers.") else 1
            yield _collective(step, "all-gather", axes, "parameters", _FLOAT32_BYTES * step.gathered_size(row), times)


def _gathered_axes(sharded: Partition, gathered: Partition) -> tuple[MeshAxis, ...]:
    """Return the mesh axes of the first partition that the second one lacks."""
    axes = {axis for before, after in zip(sharded, gathered, strict=True) for axis in before if axis not in after}
    return tuple(axis for axis in MESH_AXES if axis in axes)


def _ngram_lookups(step: ShardedStep) -> Iterator[Collective]:
    """Look up n-gram embeddings in tables of which n devices have some features each.

    The rows that the group's n p tokens need are all-gathered, an integer for each hash function; all-to-alls return
    their p tokens' features to devices, and the gradients in the backward pass. Recomputation looks up once more.
    """
    forward = 2 if step.config.training.rematerialize == "block" else 1
    for index, layer in enumerate(step.config.model.all_layers):
        if (spec := layer.ngram_embeddings) is None:
            continue
        sharded = step.partitions[f"layers.{index}.ngram_embeddings.weight"][-1]
        if not (axes := tuple(axis for axis in MESH_AXES if axis in sharded)):
            continue
        rows = _INT32_BYTES * step.num_devices(axes) * step.tokens * spec.num_heads
        features = step.message_bytes * step.tokens * spec.dim
        yield _collective(step, "all-gather", axes, "rows of n-grams", rows, forward)
        yield _collective(step, "all-to-all", axes, "n-gram embeddings", features, forward + 1)


def _expert_exchanges(step: ShardedStep) -> Iterator[Collective]:
    """Dispatch tokens to experts on n devices and combine their outputs, in each MoE layer."""
    recompute = step.config.training.rematerialize != "none"
    if step.expert_shards == 1:
        return
    for moe in (layer.moe for layer in step.config.model.all_layers if layer.moe is not None):
        match step.config.mesh.exchange:
            case "allgather":
                yield from _allgather_exchange(step, moe, recompute)
            case "ragged":
                yield from _ragged_exchange(step, moe, recompute)
            case "padded":
                yield from _padded_exchange(step, moe, recompute)


def _padded_exchange(step: ShardedStep, moe: MoESpec, recompute: bool) -> Iterator[Collective]:
    """Yield four all-to-alls of `n r D` numbers: dispatch and combine, forward and backward.

    Each device sends r rows of width D to each other one. Recomputation in the backward pass adds two. `E` integers say
    how many rows each expert gets, in each forward pass, unless every slot belongs to one expert.
    """
    axes, n = step.expert_axes, step.expert_shards
    plan = padded_exchange(moe, step.sequences, step.config.training.sequence_length, n)
    rows = n * plan.rows * step.exchange_width(moe) * step.message_bytes
    yield _collective(step, "all-to-all", axes, "expert dispatch and combine", rows, 6 if recompute else 4)
    if plan.slots is None:
        counts = _INT32_BYTES * moe.num_experts
        yield _collective(step, "all-to-all", axes, "rows per expert", counts, 2 if recompute else 1)


def _ragged_exchange(step: ShardedStep, moe: MoESpec, recompute: bool) -> Iterator[Collective]:
    """Yield all-to-alls of the rows that are used: p K, if routing is balanced, in buffers as large as for `padded`.

    Three integers per device are the offsets of its rows. By formula alone: XLA on the CPU has no such collective.
    """
    axes = step.expert_axes
    rows = step.tokens * moe.router.top_k * step.exchange_width(moe) * step.message_bytes
    counts, offsets = _INT32_BYTES * moe.num_experts, _INT32_BYTES * step.expert_shards
    yield _collective(step, "ragged-all-to-all", axes, "expert dispatch and combine", rows, 6 if recompute else 4)
    yield _collective(step, "all-to-all", axes, "rows per expert", counts, 2 if recompute else 1)
    yield _collective(step, "all-to-all", axes, "row offsets", offsets, 6 if recompute else 3)


def _allgather_exchange(step: ShardedStep, moe: MoESpec, recompute: bool) -> Iterator[Collective]:
    """Yield all-gathers of the group's n p tokens and choices, and a reduce-scatter of the outputs; and the backward.

    The backward pass of each is the reverse: a reduce-scatter of the tokens' gradients, an all-gather of the outputs'.
    """
    axes, tokens = step.expert_axes, step.expert_shards * step.tokens
    rows, forward = tokens * step.exchange_width(moe) * step.message_bytes, 2 if recompute else 1
    choices = tokens * moe.num_slots
    yield _collective(step, "all-gather", axes, "token dispatch", rows, forward + 1)
    for size in (_INT32_BYTES, 1, _FLOAT32_BYTES):  # expert indices, mask of used choices, routing weights
        yield _collective(step, "all-gather", axes, "routing choices", choices * size, forward)
    yield _collective(step, "reduce-scatter", axes, "token combine", rows, 2)
    yield _collective(step, "reduce-scatter", axes, "gradients of routing weights", choices * _FLOAT32_BYTES)


def _tensor_reductions(step: ShardedStep) -> Iterator[Collective]:
    """All-reduce partial sums over `tensor`, p rows of some width each.

    A matrix with sharded inputs gives partial sums of its outputs, which are reduced in the forward pass. One with
    sharded outputs gives partial sums of its inputs' gradient, which are reduced in the backward pass; so is the
    gradient of the rotated key that all heads of latent attention share. All experts of a layer need one reduction
    forward; backward there are two of that width, and one of the K routing weights.

    Source: Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053, section 3. Differs: queries, keys and values, gate and
    up each have their own reduction.
    """
    if not step.tensor_shards:
        return
    axes: tuple[MeshAxis, ...] = ("tensor",)
    for row in step.table:
        sharded = [place for place, own in enumerate(step.gathered_partition(row)) if "tensor" in own]
        is_matrix = len(row.shape) > 1 and row.axes != ("head", "head_dim") and row.axes != ("kv_head", "head_dim")
        if not sharded or not is_matrix or ".moe.experts." in row.name:
            continue
        direction, width = ("forward", row.shape[-1]) if sharded[0] == 0 else ("backward", row.shape[0])
        size = step.message_bytes * step.tokens * width
        yield _collective(step, "all-reduce", axes, f"partial sums of blocks, {direction}", size)
    for layer in step.config.model.all_layers:
        moe, attention = layer.moe, layer.attention
        if isinstance(attention, LatentAttentionSpec) and attention.rope_head_dim and "head" in step.tensor_shards:
            size = step.message_bytes * step.tokens * attention.rope_head_dim
            yield _collective(step, "all-reduce", axes, "partial sums of blocks, backward", size)
        if moe is not None:
            rows = step.message_bytes * step.tokens * step.exchange_width(moe)
            weights = _FLOAT32_BYTES * step.tokens * moe.num_slots
            yield _collective(step, "all-reduce", axes, "partial sums of experts, forward", rows)
            yield _collective(step, "all-reduce", axes, "partial sums of experts, backward", rows, 2)
            yield _collective(step, "all-reduce", axes, "partial sums of experts, backward", weights)


def _gradient_reductions(step: ShardedStep) -> Iterator[Collective]:
    """All-reduce each gradient, `4 * gathered size`, over the batch axes that do not shard its parameter.

    Once per micro-batch. A matrix that is both embedding and head has a gradient from each. Compilers for GPU and TPU
    turn the reduction of a sharded parameter's gradient into a reduce-scatter, which sends half of that; XLA on the CPU
    does not.
    """
    tied = isinstance(step.config.model.head, TiedHeadSpec)
    for row in step.table:
        sharded = {axis for axes in step.gathered_partition(row) for axis in axes}
        axes = tuple(axis for axis in step.batch_axes if axis not in sharded)
        if row.name in step.trained and axes:
            times = 2 if tied and row.name == "embedding.weight" else 1
            yield _collective(step, "all-reduce", axes, "gradients", _FLOAT32_BYTES * step.gathered_size(row), times)


def _loss_reductions(step: ShardedStep) -> Iterator[Collective]:
    """All-reduce losses and expert loads of the whole batch: two counts and a mean of E numbers for each MoE layer.

    Scalars of each loss, some hundred bytes in total, are not counted: their number depends on the losses.
    """
    if not step.batch_axes:
        return
    purpose = "losses and expert loads"
    for _, moe in step.config.model.moes:
        yield _collective(step, "all-reduce", step.batch_axes, purpose, _FLOAT32_BYTES * moe.num_choices, 3)
    yield _collective(step, "all-reduce", step.batch_axes, purpose, _FLOAT32_BYTES)
