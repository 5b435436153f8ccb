"""Data parallelism: processes with the same weights, each with a shard of every batch. MLX only: JAX shards arrays.

Each process computes the loss of its own sequences so that the mean over processes is the loss of the batch; the same
then holds for gradients. Means satisfy this already. Values that are not linear in the batch (counts in denominators,
squared sums) are all-reduced over the whole batch in the forward pass, by `total` and `average`. With one process,
every function here returns its input.

Started by `moezoo launch` or `mlx.launch`, which set ranks in environment variables; the transport is MLX's.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from moezoo.core.distributed.process_group import is_address
from moezoo.core.distributed.processes import Numbers, PendingNumbers, Processes
from moezoo.core.distributed.startup import STARTUP_S, startup_limit
from moezoo.core.errors import BackendError, SpecError, TrainingError
from moezoo.core.files import read_bounded
from moezoo.core.json_text import parse_json
from moezoo.core.spec import CapacitySpec, ExpertChoiceSpec, ModelSpec
from moezoo.mlx_backend.runtime.typed import custom_function, flatten, to_ints

_MESSAGE_BYTES = 32 * 2**20  # approximate size of a message, as in MLX's average_gradients
_last_exchange: list[mx.array] = []
_LAUNCHED_BY = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")  # for ring, JACCL and NCCL; for MPI


_joined: Processes | None = None


def processes() -> Processes:
    """Return rank and number of processes. Raises BackendError, as `join`."""
    return _joined or join()


def join(startup_s: float = STARTUP_S) -> Processes:
    """Join the other processes that a launcher's variables announce, if any; once, later calls return the same.

    Raises BackendError: the variables are wrong, or a peer cannot be reached. A peer that never comes ends this process
    after `startup_s`, with one line.
    """
    global _joined
    if _joined is None:
        _joined = _join(startup_s)
    return _joined


def _join(startup_s: float) -> Processes:
    launched = next((name for name in _LAUNCHED_BY if name in os.environ), None)
    if launched is None:
        return Processes()
    hosts = os.environ.get("MLX_HOSTFILE")
    if hosts is not None and os.path.isfile(hosts) and not os.path.getsize(hosts) > 1:
        return Processes()  # mlx.launch with one process writes a file with an empty line
    failure = f"MLX cannot reach the other processes; got {launched}={os.environ[launched]}"
    advice = "Start all at the same time, with `moezoo launch --nproc N train ...` or `mlx.launch`."
    late = f"{BackendError.__name__}: {failure} and no answer within {startup_s:g} s (--startup-timeout). {advice}"
    try:
        _check_variables(hosts)
        with startup_limit(startup_s, late):
            group = mx.distributed.init(strict=True)
            ranks = to_ints(mx.distributed.all_gather(mx.array([group.rank()], mx.int32), group=group))
    except (RuntimeError, ValueError) as error:
        cause = " ".join(str(error).split()).rstrip(".")
        raise BackendError(f"{failure} and {cause}. {advice}") from None
    if ranks != list(range(group.size())):  # a foreign service at one of the addresses, or a rank twice
        raise BackendError(f"{failure} and ranks {ranks}; expected 0 to {group.size() - 1}, once each. {advice}")
    return Processes(group.rank(), group.size())


def _check_variables(hosts: str | None) -> None:
    """Check the ring's variables. Trap: MLX reads any rank as a number, and divides by the number of hosts."""
    rank = os.environ.get("MLX_RANK", "0")
    if not (rank.isascii() and rank.isdigit()):
        raise ValueError(f"MLX_RANK={rank}; expected a number from 0")
    if hosts is not None and os.path.isfile(hosts):
        processes = parse_json(read_bounded(hosts, 1_000_000))
        lists = isinstance(processes, list) and processes and all(isinstance(each, list) for each in processes)
        if not lists or not all(is_address(str(address)) for each in processes for address in each):
            raise ValueError(f"MLX_HOSTFILE={hosts}; expected a list of [HOST:PORT] of each process")


def facts() -> dict[str, str]:
    """Return the entries for a run's header."""
    count = processes().count
    return {} if count == 1 else {"processes": f"{count}, each with all weights and 1/{count} of a batch"}


def gather(number: int) -> PendingNumbers:
    """All-gather one number per process. See moezoo.core.backend.Backend.gather."""
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
    """Return the sum over processes (all-reduce), with a gradient."""
    return x if processes().count == 1 else _total(x)


def average(x: mx.array) -> mx.array:
    """Return the mean over processes (all-reduce), with a gradient."""
    return x if processes().count == 1 else _total(x) / processes().count


@custom_function
def _total(x: mx.array) -> mx.array:
    return _sent(mx.distributed.all_sum, x)


@_total.vjp
def _(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    # Trap: MLX's own gradient passes the cotangent through unchanged, which is right for gradients that are summed over
    # processes. Ours are averaged.
    return cotangent * processes().count


def averaged(gradients: dict[str, Any], terms: Mapping[str, mx.array]) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """All-reduce gradients and loss terms to their means over processes, all float32."""
    if processes().count == 1:
        return gradients, dict(terms)
    named = flatten(gradients)
    means = [x / processes().count for x in _summed([*(value for _, value in named), *terms.values()])]
    averages = tree_unflatten([(name, mean) for (name, _), mean in zip(named, means, strict=False)]) if named else {}
    return averages, dict(zip(terms, means[len(named) :], strict=True))


def summed(*lists: Sequence[mx.array]) -> list[list[mx.array]]:
    """All-reduce lists of int32 arrays to their sums over processes."""
    counts = [count for each in lists for count in each]
    left = iter(counts if processes().count == 1 else _summed(counts))
    return [list(itertools.islice(left, len(each))) for each in lists]


def _summed(arrays: Sequence[mx.array]) -> list[mx.array]:
    """All-reduce arrays of one dtype to their sums, concatenated into messages."""
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


def _sent(collective: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """Run a collective on x, ordered after all earlier collectives.

    Trap: MLX orders collectives by the shape of the graph, which may differ between processes (an expert without rows
    has no product). One process would then sum its loads with the gradients of another.
    """
    after = mx.depends(x, _last_exchange) if _last_exchange else x
    _last_exchange[:] = [collective(after)]
    return _last_exchange[0]


def own_part(batch: np.ndarray) -> np.ndarray:
    """Return this process's sequences of a batch known to all processes; all of them if it is not divisible."""
    count = processes().count
    return batch if count == 1 or len(batch) % count else batch[processes().share(len(batch))]


def whole_batch(part_BT: mx.array) -> mx.array:
    """All-gather the results of all processes, in order of rank."""
    return part_BT if processes().count == 1 else _sent(mx.distributed.all_gather, part_BT)


def first_draw(count: int) -> int:
    """Return the offset of this process's `count` random numbers in those of the whole batch."""
    return processes().index * count


def check_shared(spec: ModelSpec) -> None:
    """Raise SpecError if routing depends on all tokens of a batch, and would differ on a shard of it."""
    if processes().count == 1:
        return
    for index, moe in spec.moes:
        where = f"of layer {index}; {processes().count} processes share a batch"
        if isinstance(moe.dispatch, CapacitySpec) and moe.dispatch.group == "batch":
            raise SpecError(
                "model.layers[].moe.dispatch.group is batch, where all tokens compete for capacity; expected sequence "
                f"({where}). Use group: sequence, dispatch: {{kind: dropless}}, or one process."
            )
        if isinstance(moe.router.choice, ExpertChoiceSpec):
            raise SpecError(
                "model.layers[].moe.router.choice is expert_choice, where experts choose among all tokens of a "
                f"batch; expected a choice per token ({where}). Use another choice, or one process."
            )


def check_mesh(sizes: Mapping[str, int | str]) -> None:
    """Raise SpecError if the axes of `mesh` request anything other than data parallelism over all processes."""
    for axis, size in sizes.items():
        expected = processes().count if axis == "data" else 1
        if size not in ("auto", expected):
            raise SpecError(
                f"mesh.{axis} is {size}, which MLX does not support with {processes().count} processes; expected "
                f"{expected} or auto: each process has all weights and a shard of the batch. Train on JAX, or omit it."
            )


@contextmanager
def lost_peer() -> Iterator[None]:
    """Raise TrainingError if a collective fails because another process has ended."""
    try:
        yield
    except RuntimeError as error:
        if processes().count == 1 or "peer" not in str(error):
            raise
        raise TrainingError(
            f"another process of the run has ended; got {error} in process {processes().index} of {processes().count}. "
            "See the output of that process, then continue from the last checkpoint with --resume."
        ) from None
