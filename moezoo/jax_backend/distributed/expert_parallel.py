"""Experts on several devices: tokens travel to them and back. Only here: MLX has every expert in every process.

One `shard_map` holds all of it: each device sorts the copies of its own tokens, hands them to the devices that have
their experts, and sums up what comes back. Which copies are computed at all was decided before. A capacity of each
sequence bounds how many there can be for an expert, and each has a place; otherwise they follow each other (`_Padded`).
Source: Lepikhin et al. 2020, GShard, arXiv 2006.16668, section 3.2 (the all-to-all, places by capacity); Gale et al.
2022, MegaBlocks, arXiv 2211.15841 (dropless).
"""

import math
from collections.abc import Callable
from typing import Protocol, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from moezoo.core.distributed.mesh import MeshAxis
from moezoo.core.distributed.sharding_rules import exchanged
from moezoo.core.spec import DroplessSpec, MoESpec
from moezoo.jax_backend.dispatch import Dispatch, dispatch
from moezoo.jax_backend.distributed.sharding import Placement
from moezoo.jax_backend.experts import Experts
from moezoo.jax_backend.routing import Routing
from moezoo.jax_backend.runtime.placement import active_placement

Rows = Callable[[jax.Array, jax.Array], jax.Array]
"""What experts give [R, D] for rows [R, D] that are sorted by expert, of which each has size_E."""


class Through(Protocol):
    """The way of tokens through the experts: taken out by `dispatched`, computed, weighted and summed up."""

    def __call__(self, spec: MoESpec, experts: Rows, x_PD: jax.Array, dispatched: Dispatch) -> jax.Array: ...


def on_their_devices(
    through: Through,
    spec: MoESpec,
    experts: Experts,
    x_PD: jax.Array,
    routing: Routing,
    dispatched: Dispatch,
    *,
    num_sequences: int,
    inference: bool,
) -> jax.Array:
    """`through(spec, experts, x_PD, dispatched)`, on the devices that have the tokens, and those of the experts."""
    placement = active_placement()
    if placement is None:
        return through(spec, experts, x_PD, dispatched)
    graph, state = nnx.split(experts)
    cuts = placement.of_experts
    own = jax.tree.map_with_path(lambda path, _: cuts[path[0].key], state)
    rows, group = PartitionSpec(placement.batch_axes), placement.expert_axes
    devices = math.prod(placement.sizes[axis] for axis in group)
    # Which copies are computed is known, so nothing here is dropped: a device may have more of them than others have.
    local = spec.model_copy(update={"dispatch": DroplessSpec()})
    length = x_PD.shape[0] // num_sequences

    def on_one_device(state: nnx.State, x_PD: jax.Array, expert_PK, kept_PK, weight_PK) -> jax.Array:
        module = nnx.merge(graph, _bias_once(state, placement))
        chosen = routing._replace(expert_PK=expert_PK, valid_PK=kept_PK, weight_PK=weight_PK)
        if devices == 1:
            out_PD = through(local, module, x_PD, dispatch(local, chosen, inference=True))
        else:
            match placement.exchange:
                case "allgather":
                    out_PD = _with_all_tokens(through, local, module, x_PD, chosen, group, devices)
                case "padded" | "ragged":
                    most, places = exchanged(spec, x_PD.shape[0] // length, length, devices, inference=inference)
                    rows = dispatch(local, chosen, inference=True)
                    if placement.exchange == "ragged":
                        travelling = _travelled(module, _Ragged, group, devices, most)
                    elif places is None:
                        travelling = _travelled(module, _Padded, group, devices, most)
                    else:
                        rows, used_R = _in_places(rows, expert_PK.reshape(-1, length, expert_PK.shape[1]), places)
                        travelling = _travelled_in_places(module, group, used_R)
                    out_PD = through(local, travelling, x_PD, rows)
                case _:
                    assert_never(placement.exchange)
        return lax.psum(out_PD, "tensor") if placement.sizes["tensor"] > 1 else out_PD

    # Trap: with its check of what varies along which axis, shard_map refuses the loops over blocks, whose results start
    # as zeros.
    mapped = jax.shard_map(
        on_one_device, mesh=placement.mesh, in_specs=(own, rows, rows, rows, rows), out_specs=rows, check_vma=False
    )
    return mapped(state, x_PD, routing.expert_PK, dispatched.kept_PK, routing.weight_PK)


def _bias_once(state: nnx.State, placement: Placement) -> nnx.State:
    """Devices along `tensor` have parts of a sum, to which but one of them adds the bias."""
    if placement.sizes["tensor"] == 1 or "b_down" not in state:
        return state
    first = lax.axis_index("tensor") == 0
    state["b_down"] = jax.tree.map(lambda bias_ED: jnp.where(first, bias_ED, 0), state["b_down"])
    return state


def _with_all_tokens(
    through: Through,
    spec: MoESpec,
    experts: Rows,
    x_PD: jax.Array,
    chosen: Routing,
    group: tuple[MeshAxis, ...],
    devices: int,
) -> jax.Array:
    """Every device of a group has all tokens of the group, and sums up what its own experts add to them."""
    num_experts = spec.num_experts // devices
    x_PD, expert_PK, valid_PK, weight_PK = (
        lax.all_gather(values, group, tiled=True)
        for values in (x_PD, chosen.expert_PK, chosen.valid_PK, chosen.weight_PK)
    )
    expert_PK = expert_PK - lax.axis_index(group) * num_experts
    here_PK = valid_PK & (expert_PK >= 0) & (expert_PK < num_experts)
    own = chosen._replace(expert_PK=jnp.where(here_PK, expert_PK, 0), valid_PK=here_PK, weight_PK=weight_PK)
    spec = spec.model_copy(update={"num_experts": num_experts, "zero_computation": None})
    out_PD = through(spec, experts, x_PD, dispatch(spec, own, inference=True))
    return lax.psum_scatter(out_PD, group, tiled=True)


class _Padded:
    """An all-to-all of `most` rows for each device, which are as many as could ever be for it."""

    def __init__(self, count_S: jax.Array, group: tuple[MeshAxis, ...], most: int):
        """`count_S`: this device's rows for each device of the group, in their order."""
        self.group, self.most, self.devices = group, most, count_S.shape[0]
        self.count_S, self.start_S = count_S, jnp.cumsum(count_S) - count_S
        self.received_S = lax.all_to_all(count_S, group, 0, 0, tiled=True)
        self.arrival_S = jnp.arange(self.devices) * most

    def there(self, x_RD: jax.Array) -> jax.Array:
        """Rows -> those of all devices for this one; those of device s begin at `arrival_S[s]`."""
        row_SR = self.start_S[:, None] + jnp.arange(self.most)
        used_SR = jnp.arange(self.most) < self.count_S[:, None]
        x_SRD = jnp.where(used_SR[..., None], x_RD[jnp.minimum(row_SR, x_RD.shape[0] - 1)], 0)
        return lax.all_to_all(x_SRD, self.group, 0, 0, tiled=True).reshape(-1, x_RD.shape[1])

    def back(self, y_RD: jax.Array, num_rows: int) -> jax.Array:
        """What became of them, at the places where they were."""
        y_SRD = y_RD.reshape(self.devices, self.most, -1)
        y_RD = lax.all_to_all(y_SRD, self.group, 0, 0, tiled=True).reshape(y_RD.shape)
        row_R = jnp.arange(num_rows)
        device_R = jnp.minimum(jnp.searchsorted(jnp.cumsum(self.count_S), row_R, side="right"), self.devices - 1)
        place_R = device_R * self.most + row_R - self.start_S[device_R]
        used_R = row_R < jnp.sum(self.count_S)
        return jnp.where(used_R[:, None], y_RD[jnp.where(used_R, place_R, 0)], 0)


class _Ragged(_Padded):
    """An all-to-all of the rows that there are. Not run: XLA has none on the CPU."""

    def __init__(self, count_S: jax.Array, group: tuple[MeshAxis, ...], most: int):
        super().__init__(count_S, group, most)
        self.arrival_S = jnp.cumsum(self.received_S) - self.received_S
        # Where this device's rows begin in each other device's buffer, and the other way round.
        self.at_theirs_S, self.at_mine_S = (
            lax.all_to_all(start_S, group, 0, 0, tiled=True) for start_S in (self.arrival_S, self.start_S)
        )

    def there(self, x_RD: jax.Array) -> jax.Array:
        buffer = jnp.zeros((self.devices * self.most, x_RD.shape[1]), x_RD.dtype)
        sizes = self.start_S, self.count_S, self.at_theirs_S, self.received_S
        return lax.ragged_all_to_all(x_RD, buffer, *sizes, axis_name=self.group)

    def back(self, y_RD: jax.Array, num_rows: int) -> jax.Array:
        buffer = jnp.zeros((num_rows, y_RD.shape[1]), y_RD.dtype)
        sizes = self.arrival_S, self.received_S, self.at_mine_S, self.count_S
        return lax.ragged_all_to_all(y_RD, buffer, *sizes, axis_name=self.group)


def _travelled(experts: Rows, exchange: type[_Padded], group: tuple[MeshAxis, ...], devices: int, most: int) -> Rows:
    """Experts, of which this device has an equal part, for rows that are sorted by all of them."""

    def rows(x_RD: jax.Array, size_E: jax.Array) -> jax.Array:
        size_SE = size_E.reshape(devices, -1)
        ways = exchange(jnp.sum(size_SE, axis=1), group, most)
        size_SE = lax.all_to_all(size_SE, group, 0, 0, tiled=True)
        here_RD = ways.there(x_RD)
        # They are sorted by device, and by expert for each device; experts want them sorted by expert.
        place_R = jnp.arange(here_RD.shape[0])
        device_R = jnp.minimum(jnp.searchsorted(ways.arrival_S, place_R, side="right") - 1, devices - 1)
        end_RE = jnp.cumsum(size_SE, axis=1)[device_R]
        expert_R = jnp.sum((place_R - ways.arrival_S[device_R])[:, None] >= end_RE, axis=1)
        order_R = jnp.argsort(expert_R, stable=True)
        y_RD = experts(here_RD[order_R], jnp.sum(size_SE, axis=0))
        y_RD = jnp.zeros_like(y_RD).at[order_R].set(y_RD, unique_indices=True)
        return ways.back(y_RD, x_RD.shape[0])

    return rows


def _in_places(rows: Dispatch, expert_BTK: jax.Array, places: int) -> tuple[Dispatch, jax.Array]:
    """The same copies in rows of which each expert has `places` for each sequence, and which of them are used.

    Rows are sorted by expert and by token, thus by sequence too: those of an expert and a sequence follow each other.
    """
    num_experts, num_sequences = rows.size_E.shape[0], expert_BTK.shape[0]
    kept_BTK = rows.kept_PK.reshape(expert_BTK.shape)
    hot_BTKE = (expert_BTK[..., None] == jnp.arange(num_experts)) & kept_BTK[..., None]
    count_EB = jnp.sum(hot_BTKE, axis=(1, 2), dtype=jnp.int32).T
    start_EB = (jnp.cumsum(count_EB) - count_EB.reshape(-1)).reshape(count_EB.shape)
    used_EBC = jnp.arange(places) < count_EB[..., None]
    row_R = jnp.where(used_EBC, start_EB[..., None] + jnp.arange(places), 0).reshape(-1)
    used_R, each = used_EBC.reshape(-1), num_sequences * places
    return Dispatch(
        rows.token_R[row_R],
        jnp.repeat(jnp.arange(num_experts), each),
        jnp.where(used_R, rows.weight_R[row_R], 0),
        jnp.full(num_experts, each),
        rows.kept_PK,
    ), used_R


def _travelled_in_places(experts: Rows, group: tuple[MeshAxis, ...], used_R: jax.Array) -> Rows:
    """Experts, of which this device has an equal part, for equally many rows of each, not all of them used."""

    def rows(x_RD: jax.Array, size_E: jax.Array) -> jax.Array:
        x_ERD = jnp.where(used_R[:, None], x_RD, 0).reshape(size_E.shape[0], -1, x_RD.shape[1])
        x_ERD = lax.all_to_all(x_ERD, group, 0, 1, tiled=True)
        own, each, _ = x_ERD.shape
        y_RD = experts(x_ERD.reshape(own * each, -1), jnp.full(own, each))
        y_ERD = lax.all_to_all(y_RD.reshape(x_ERD.shape), group, 1, 0, tiled=True)
        # What experts with biases make of an empty place is nobody's.
        return jnp.where(used_R[:, None], y_ERD.reshape(x_RD.shape), 0)

    return rows
