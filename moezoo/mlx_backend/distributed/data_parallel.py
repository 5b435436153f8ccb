"""Several processes with the same weights, each with a part of every batch. Only here: JAX divides arrays instead.

A process computes the loss of its own sequences such that the mean over processes is the loss of the batch, and then
so are gradients. Means need nothing for that. What is not linear in the batch (counts that divide, sums that are
squared) is made of the whole batch on the way, by `total` and `average`. Alone, every function here gives back what
it was given.

Started by `moezoo launch` or `mlx.launch`, which say by environment variables who is who; the transport is MLX's.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from moezoo.core.distributed.processes import Numbers, PendingNumbers, Processes
from moezoo.core.errors import BackendError, SpecError, TrainingError
from moezoo.core.spec import CapacitySpec, ExpertChoiceSpec, ModelSpec
from moezoo.mlx_backend.runtime.typed import custom_function, flatten, to_ints

_MESSAGE_BYTES = 32 * 2**20  # about so much in one message; as MLX's own average_gradients
_last_exchange: list[mx.array] = []
_LAUNCHED_BY = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")  # of the ring, JACCL and NCCL; of MPI


@functools.cache
def processes() -> Processes:
    """The processes of this run. Raises BackendError: a launcher's variables are there, but not the others."""
    launched = next((name for name in _LAUNCHED_BY if name in os.environ), None)
    if launched is None:
        return Processes()
    hosts = os.environ.get("MLX_HOSTFILE")
    if hosts is not None and os.path.isfile(hosts) and not os.path.getsize(hosts) > 1:
        return Processes()  # mlx.launch with one process gives a file that holds an empty line
    try:
        group = mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        raise BackendError(
            f"MLX cannot reach the other processes; got {launched}={os.environ[launched]} and "
            f"{' '.join(str(error).split())}. Start with `moezoo launch --nproc N train ...` or `mlx.launch`."
        ) from None
    return Processes(group.rank(), group.size())


def facts() -> dict[str, str]:
    """What a run's header says."""
    count = processes().count
    return {} if count == 1 else {"processes": f"{count}, each with all weights and 1/{count} of a batch"}


def gather(number: int) -> PendingNumbers:
    """See moezoo.core.backend.Backend.gather."""
    if processes().count == 1:
        return Numbers((number,))
    with lost_peer():
        numbers = _sent(mx.distributed.all_gather, mx.array([number], mx.int32))
        mx.async_eval(numbers)
    return _Gathered(numbers)


class _Gathered:
    def __init__(self, numbers: mx.array):
        self._numbers = numbers

    def fetch(self) -> Sequence[int]:
        with lost_peer():
            return to_ints(self._numbers)


def total(x: mx.array) -> mx.array:
    """The sum over processes of what each has of the batch."""
    return x if processes().count == 1 else _total(x)


def average(x: mx.array) -> mx.array:
    """The mean over processes of what each has of the batch."""
    return x if processes().count == 1 else _total(x) / processes().count


@custom_function
def _total(x: mx.array) -> mx.array:
    return _sent(mx.distributed.all_sum, x)


@_total.vjp
def _(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    # Trap: MLX passes the cotangent through as it is, which would be right if gradients were summed over processes.
    # They are averaged.
    return cotangent * processes().count


def averaged(gradients: dict[str, Any], terms: Mapping[str, mx.array]) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Gradients and loss terms of the whole batch, all of them float32."""
    if processes().count == 1:
        return gradients, dict(terms)
    named = flatten(gradients)
    means = [x / processes().count for x in _summed([*(value for _, value in named), *terms.values()])]
    averages = tree_unflatten([(name, mean) for (name, _), mean in zip(named, means, strict=False)]) if named else {}
    return averages, dict(zip(terms, means[len(named) :], strict=True))


def summed(*lists: Sequence[mx.array]) -> list[list[mx.array]]:
    """Sums over processes of lists of int32 arrays."""
    counts = [count for each in lists for count in each]
    left = iter(counts if processes().count == 1 else _summed(counts))
    return [list(itertools.islice(left, len(each))) for each in lists]


def _summed(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Sums over processes of arrays of one dtype, joined into messages."""
    sums: list[mx.array] = []
    while len(sums) < len(arrays):
        ends, rest = [0], arrays[len(sums) :]
        for array in rest:
            if ends[-1] * array.itemsize >= _MESSAGE_BYTES:
                break
            ends.append(ends[-1] + array.size)
        group = rest[: len(ends) - 1]
        joined = _sent(mx.distributed.all_sum, mx.concatenate([array.reshape(-1) for array in group]))
        parts = mx.split(joined, ends[1:-1]) if len(group) > 1 else [joined]
        sums += [part.reshape(array.shape) for part, array in zip(parts, group, strict=True)]
    return sums


def _sent(exchange: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """What the exchange gives for x, after all exchanges that were asked for before.

    Trap: MLX chooses an order by the shape of the graph, which may differ between processes (of an expert without rows
    there is no product). One would add up its loads, and the other its gradients.
    """
    after = mx.depends(x, _last_exchange) if _last_exchange else x
    _last_exchange[:] = [exchange(after)]
    return _last_exchange[0]


def own_part(batch: np.ndarray) -> np.ndarray:
    """The sequences of a batch, which all processes have, that this one computes: all where they cannot be divided."""
    count = processes().count
    return batch if count == 1 or len(batch) % count else batch[processes().share(len(batch))]


def whole_batch(part_BT: mx.array) -> mx.array:
    """What all processes have computed for their own parts, in order."""
    return part_BT if processes().count == 1 else _sent(mx.distributed.all_gather, part_BT)


def first_draw(count: int) -> int:
    """Where in the whole batch's random numbers those of this process begin, of which it draws `count`."""
    return processes().index * count


def check_shared(spec: ModelSpec) -> None:
    """Raises SpecError for what chooses among all tokens of a batch, and would choose otherwise among a part of it."""
    if processes().count == 1:
        return
    for index, moe in spec.moes:
        where = f"of layer {index}; {processes().count} processes share a batch"
        if isinstance(moe.dispatch, CapacitySpec) and moe.dispatch.group == "batch":
            raise SpecError(
                "model.layers[].moe.dispatch.group is batch, whose tokens compete for a capacity; expected sequence "
                f"({where}). Use group: sequence, dispatch: {{kind: dropless}}, or one process."
            )
        if isinstance(moe.router.choice, ExpertChoiceSpec):
            raise SpecError(
                "model.layers[].moe.router.choice is expert_choice, where experts choose among a whole batch's "
                f"tokens; expected a choice of each token alone ({where}). Use another choice, or one process."
            )


def check_mesh(sizes: Mapping[str, int | str]) -> None:
    """Raises SpecError where the axes of `mesh` ask for something else than this: each process a part of the batch."""
    for axis, size in sizes.items():
        expected = processes().count if axis == "data" else 1
        if size not in ("auto", expected):
            raise SpecError(
                f"mesh.{axis} is {size}, which MLX cannot do with {processes().count} processes; expected {expected} "
                "or auto: each process has all weights and a part of the batch. Train on JAX, or leave it out."
            )


@contextmanager
def lost_peer() -> Iterator[None]:
    """Says in our words that another process has gone, which MLX notices at the next message."""
    try:
        yield
    except RuntimeError as error:
        if processes().count == 1 or "peer" not in str(error):
            raise
        raise TrainingError(
            f"another process of the run has ended; got {error} in process {processes().index} of "
            f"{processes().count}. See what that one said, and go on from the last checkpoint with --resume."
        ) from None
