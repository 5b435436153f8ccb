"""Expert parallelism: all-to-all dispatch of tokens to the devices of their experts, and combine. JAX only.

All of it runs in one `shard_map`: each device sorts the token-expert assignments of its own tokens, dispatches them to
the devices of their experts, and combines the outputs. Tokens were dropped before this step. A capacity per sequence
bounds the number of assignments per expert and sequence, so each gets a slot; without one, they are packed in order
(`_PaddedAllToAll`).
Source: Lepikhin et al. 2020, GShard, arXiv 2006.16668, section 3.2 (the all-to-all, slots by capacity); Gale et al.
2022, MegaBlocks, arXiv 2211.15841 (dropless).
"""

import math
from typing import assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from moezoo.core.distributed.mesh import MeshAxis
from moezoo.core.distributed.sharding_rules import padded_exchange
from moezoo.core.spec import DroplessSpec, MoESpec
from moezoo.jax_backend.arrays import canonical_name
from moezoo.jax_backend.dispatch import Dispatch, dispatch
from moezoo.jax_backend.distributed.sharding import Placement
from moezoo.jax_backend.experts import Experts, ExpertsCall
from moezoo.jax_backend.moe import run_experts
from moezoo.jax_backend.routing import Routing
from moezoo.jax_backend.runtime.typed import State


class ExpertParallel:
    """`run_experts` on a mesh: tokens and experts are sharded over its devices."""

    def __init__(self, placement: Placement):
        self.placement = placement
        self.devices = math.prod(placement.sizes[axis] for axis in placement.expert_axes)

    def __call__(
        self,
        spec: MoESpec,
        experts: Experts,
        x_PD: jax.Array,
        routing: Routing,
        dispatched: Dispatch,
        *,
        num_sequences: int,
        inference: bool,
    ) -> jax.Array:
        placement = self.placement
        graph, state = nnx.split(experts)
        partitions = jax.tree.map_with_path(
            lambda path, _: placement.experts[canonical_name(path)], state, is_leaf=_is_variable
        )
        rows, length = PartitionSpec(placement.batch_axes), x_PD.shape[0] // num_sequences
        # Dropped assignments are already masked, so the local dispatch is dropless: devices may have unequal loads.
        local = spec.model_copy(update={"dispatch": DroplessSpec()})

        def on_each_device(
            state: State, x_PD: jax.Array, expert_PK: jax.Array, kept_PK: jax.Array, weight_PK: jax.Array
        ) -> jax.Array:
            module = nnx.merge(graph, _bias_once(state, placement))
            chosen = routing._replace(expert_PK=expert_PK, valid_PK=kept_PK, weight_PK=weight_PK)
            if self.devices == 1:
                out_PD = run_experts(local, module, x_PD, dispatch(local, chosen, inference=True))
            elif placement.exchange == "allgather":
                out_PD = self._with_all_tokens(local, module, x_PD, chosen)
            else:
                most, slots = padded_exchange(spec, x_PD.shape[0] // length, length, self.devices, inference=inference)
                out_PD = self._with_all_to_all(local, module, x_PD, chosen, length, most, slots)
            return lax.psum(out_PD, "tensor") if placement.sizes["tensor"] > 1 else out_PD

        # Trap: with check_vma (which axes a value varies over), shard_map rejects the loops over blocks, whose carries
        # start as zeros.
        mapped = jax.shard_map(
            on_each_device,
            mesh=placement.mesh,
            in_specs=(partitions, rows, rows, rows, rows),
            out_specs=rows,
            check_vma=False,
        )
        return mapped(state, x_PD, routing.expert_PK, dispatched.kept_PK, routing.weight_PK)

    def _with_all_tokens(self, spec: MoESpec, experts: ExpertsCall, x_PD: jax.Array, chosen: Routing) -> jax.Array:
        """All-gather the tokens of the group, run the local experts on them, and reduce-scatter the outputs."""
        group, num_experts = self.placement.expert_axes, spec.num_experts // self.devices
        x_PD, expert_PK, valid_PK, weight_PK = (
            lax.all_gather(values, group, tiled=True)
            for values in (x_PD, chosen.expert_PK, chosen.valid_PK, chosen.weight_PK)
        )
        expert_PK = expert_PK - lax.axis_index(group) * num_experts
        here_PK = valid_PK & (expert_PK >= 0) & (expert_PK < num_experts)
        own = chosen._replace(expert_PK=jnp.where(here_PK, expert_PK, 0), valid_PK=here_PK, weight_PK=weight_PK)
        spec = spec.model_copy(update={"num_experts": num_experts, "zero_computation": None})
        out_PD = run_experts(spec, experts, x_PD, dispatch(spec, own, inference=True))
        scattered_PD: jax.Array = lax.psum_scatter(out_PD, group, tiled=True)
        return scattered_PD

    def _with_all_to_all(
        self,
        spec: MoESpec,
        experts: ExpertsCall,
        x_PD: jax.Array,
        chosen: Routing,
        length: int,
        most: int,
        slots: int | None,
    ) -> jax.Array:
        """Send at most `most` rows to each device of the group, in `slots` per expert and sequence unless None."""
        group, rows = self.placement.expert_axes, dispatch(spec, chosen, inference=True)
        match self.placement.exchange:
            case "ragged":
                of_all = _experts_of_all_devices(experts, _RaggedAllToAll, group, self.devices, most)
            case "padded" if slots is None:
                of_all = _experts_of_all_devices(experts, _PaddedAllToAll, group, self.devices, most)
            case "padded":
                assert slots is not None
                rows, used_R = _in_slots(rows, chosen.expert_PK.reshape(-1, length, chosen.expert_PK.shape[1]), slots)
                of_all = _experts_by_slot(experts, group, used_R)
            case "allgather":
                raise ValueError("exchange allgather has no all-to-all")
            case _:
                assert_never(self.placement.exchange)
        return run_experts(spec, of_all, x_PD, rows)


def _is_variable(leaf: object) -> bool:
    return isinstance(leaf, nnx.Variable)


def _bias_once(state: State, placement: Placement) -> State:
    """Zero the output bias on all devices along `tensor` but the first: their outputs are summed."""
    if placement.sizes["tensor"] == 1 or "b_down" not in state:
        return state
    first = lax.axis_index("tensor") == 0
    state["b_down"] = jax.tree.map(lambda bias_ED: jnp.where(first, bias_ED, 0), state["b_down"])
    return state


class _PaddedAllToAll:
    """All-to-all padded to `most` rows per device, the upper bound of rows for one device."""

    def __init__(self, count_S: jax.Array, group: tuple[MeshAxis, ...], most: int):
        """`count_S`: number of this device's rows for each device of the group, in order."""
        self.group, self.most, self.devices = group, most, count_S.shape[0]
        self.count_S, self.start_S = count_S, jnp.cumsum(count_S) - count_S
        self.received_S = lax.all_to_all(count_S, group, 0, 0, tiled=True)
        self.arrival_S = jnp.arange(self.devices) * most

    def dispatch(self, x_RD: jax.Array) -> jax.Array:
        """Send rows to their devices. Returns the received rows; those from device s begin at `arrival_S[s]`."""
        row_SR = self.start_S[:, None] + jnp.arange(self.most)
        used_SR = jnp.arange(self.most) < self.count_S[:, None]
        x_SRD = jnp.where(used_SR[..., None], x_RD[jnp.minimum(row_SR, x_RD.shape[0] - 1)], 0)
        received_SRD: jax.Array = lax.all_to_all(x_SRD, self.group, 0, 0, tiled=True)
        return received_SRD.reshape(-1, x_RD.shape[1])

    def combine(self, y_RD: jax.Array, num_rows: int) -> jax.Array:
        """Return outputs to the devices and rows of their inputs."""
        y_SRD = y_RD.reshape(self.devices, self.most, -1)
        y_RD = lax.all_to_all(y_SRD, self.group, 0, 0, tiled=True).reshape(y_RD.shape)
        row_R = jnp.arange(num_rows)
        device_R = jnp.minimum(jnp.searchsorted(jnp.cumsum(self.count_S), row_R, side="right"), self.devices - 1)
        place_R = device_R * self.most + row_R - self.start_S[device_R]
        used_R = row_R < jnp.sum(self.count_S)
        return jnp.where(used_R[:, None], y_RD[jnp.where(used_R, place_R, 0)], 0)


class _RaggedAllToAll(_PaddedAllToAll):
    """Ragged all-to-all, without padding. Not run yet: XLA does not support it on the CPU."""

    def __init__(self, count_S: jax.Array, group: tuple[MeshAxis, ...], most: int):
        super().__init__(count_S, group, most)
        self.arrival_S = jnp.cumsum(self.received_S) - self.received_S
        # Start of this device's rows in each other device's buffer, and of each other device's rows in this one's.
        self.at_theirs_S, self.at_mine_S = (
            lax.all_to_all(start_S, group, 0, 0, tiled=True) for start_S in (self.arrival_S, self.start_S)
        )

    def dispatch(self, x_RD: jax.Array) -> jax.Array:
        buffer = jnp.zeros((self.devices * self.most, x_RD.shape[1]), x_RD.dtype)
        sizes = self.start_S, self.count_S, self.at_theirs_S, self.received_S
        received_RD: jax.Array = lax.ragged_all_to_all(x_RD, buffer, *sizes, axis_name=self.group)
        return received_RD

    def combine(self, y_RD: jax.Array, num_rows: int) -> jax.Array:
        buffer = jnp.zeros((num_rows, y_RD.shape[1]), y_RD.dtype)
        sizes = self.arrival_S, self.received_S, self.at_mine_S, self.count_S
        received_RD: jax.Array = lax.ragged_all_to_all(y_RD, buffer, *sizes, axis_name=self.group)
        return received_RD


def _experts_of_all_devices(
    experts: ExpertsCall, all_to_all: type[_PaddedAllToAll], group: tuple[MeshAxis, ...], devices: int, most: int
) -> ExpertsCall:
    """Return a function of rows sorted by global expert, which runs experts that are sharded over devices."""

    def call(x_RD: jax.Array, size_E: jax.Array) -> jax.Array:
        size_SE = size_E.reshape(devices, -1)
        exchange = all_to_all(jnp.sum(size_SE, axis=1), group, most)
        size_SE = lax.all_to_all(size_SE, group, 0, 0, tiled=True)
        here_RD = exchange.dispatch(x_RD)
        # Received rows are sorted by sending device, then by expert; the experts need them sorted by expert.
        place_R = jnp.arange(here_RD.shape[0])
        device_R = jnp.minimum(jnp.searchsorted(exchange.arrival_S, place_R, side="right") - 1, devices - 1)
        end_RE = jnp.cumsum(size_SE, axis=1)[device_R]
        expert_R = jnp.sum((place_R - exchange.arrival_S[device_R])[:, None] >= end_RE, axis=1)
        order_R = jnp.argsort(expert_R, stable=True)
        y_RD = experts(here_RD[order_R], jnp.sum(size_SE, axis=0))
        y_RD = jnp.zeros_like(y_RD).at[order_R].set(y_RD, unique_indices=True)
        return exchange.combine(y_RD, x_RD.shape[0])

    return call


def _in_slots(rows: Dispatch, expert_BTK: jax.Array, slots: int) -> tuple[Dispatch, jax.Array]:
    """Return the assignments in rows with `slots` per expert and sequence, and a mask of the used rows.

    Rows are sorted by expert, then by token, hence by sequence: rows of one expert and sequence are contiguous.
    """
    num_experts, num_sequences = rows.size_E.shape[0], expert_BTK.shape[0]
    kept_BTK = rows.kept_PK.reshape(expert_BTK.shape)
    hot_BTKE = (expert_BTK[..., None] == jnp.arange(num_experts)) & kept_BTK[..., None]
    count_EB = jnp.sum(hot_BTKE, axis=(1, 2), dtype=jnp.int32).T
    start_EB = (jnp.cumsum(count_EB) - count_EB.reshape(-1)).reshape(count_EB.shape)
    used_EBC = jnp.arange(slots) < count_EB[..., None]
    row_R = jnp.where(used_EBC, start_EB[..., None] + jnp.arange(slots), 0).reshape(-1)
    used_R, each = used_EBC.reshape(-1), num_sequences * slots
    return Dispatch(
        rows.token_R[row_R],
        jnp.repeat(jnp.arange(num_experts), each),
        jnp.where(used_R, rows.weight_R[row_R], 0),
        jnp.full(num_experts, each),
        rows.kept_PK,
    ), used_R


def _experts_by_slot(experts: ExpertsCall, group: tuple[MeshAxis, ...], used_R: jax.Array) -> ExpertsCall:
    """Return a function of equally many rows per expert (some unused), which runs experts sharded over devices."""

    def call(x_RD: jax.Array, size_E: jax.Array) -> jax.Array:
        x_ERD = jnp.where(used_R[:, None], x_RD, 0).reshape(size_E.shape[0], -1, x_RD.shape[1])
        x_ERD = lax.all_to_all(x_ERD, group, 0, 1, tiled=True)
        own, each, _ = x_ERD.shape
        y_RD = experts(x_ERD.reshape(own * each, -1), jnp.full(own, each))
        y_ERD = lax.all_to_all(y_RD.reshape(x_ERD.shape), group, 1, 0, tiled=True)
        # The output of experts with biases for an unused slot is ignored.
        return jnp.where(used_R[:, None], y_ERD.reshape(x_RD.shape), 0)

    return call
