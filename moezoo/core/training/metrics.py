"""Training metrics as records, and `metrics.jsonl`, which has one record per line as a JSON object.

Training records have `step` (updates done), `tokens`, `loss` (the training objective), `cross_entropy`, each auxiliary
loss as `<name>` (mean over its layers, unweighted) and `<name>_weighted` (its contribution to the loss),
`gradient_norm`, `learning_rate`, `tokens_per_second`, and `routing`: per MoE layer `layer`, `load` (share of
assignments per expert, sums to 1), `worst_load` (the largest share times the number of experts: 1 is balanced),
`dropped` (share of assignments beyond an expert's capacity), `losses` (each auxiliary loss of this layer by name,
unweighted; `index` is that of its attention's indexer), and if the router has them `selection_bias` and `cutoff` of
each expert after the step (writings/router_state.md). Validation records have `step`, `tokens`, `validation_loss`
(nats per token) and the other fields of `Evaluation`; their `routing` has neither losses nor router state. The last key
of a line, `crc32`, is the CRC-32 of the line's text before it, in hexadecimal.
"""

import io
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moezoo.core.backend import StepMetrics
from moezoo.core.errors import RunError
from moezoo.core.files import read_bounded, readable_errors, reason_of, write_atomically
from moezoo.core.json_text import parse_json
from moezoo.core.spec import ModelSpec

_CHECKSUM = "crc32"
_MAX_BYTES = 2_000_000_000


@dataclass(frozen=True)
class RoutingStatistics:
    """Routing statistics of one MoE layer over a training step or an evaluation.

    Fields:
        layer: index of the layer in the model.
        load: share of assignments of each expert, before capacity drops any; sums to 1, rounded to 6 decimals.
        worst_load: the largest share times the number of experts: 1 is balanced.
        dropped: share of assignments beyond an expert's capacity.
    """

    layer: int
    load: tuple[float, ...]
    worst_load: float
    dropped: float

    @property
    def max_vio(self) -> float:
        """MaxVio: the largest load over a balanced one, less 1. Source: Wang et al. 2024, arXiv 2408.15664."""
        return self.worst_load - 1

    @property
    def entropy(self) -> float:
        """Entropy of the load over that of a balanced load: 1 is balanced, 0 one expert."""
        share = np.array([share for share in self.load if share > 0])
        return float(-(share * np.log(share)).sum() / np.log(len(self.load))) if len(self.load) > 1 else 1.0

    @property
    def worst_expert(self) -> int:
        """Index of the expert with the largest load."""
        return self.load.index(max(self.load))


@dataclass(frozen=True)
class LayerRecord:
    """An MoE layer in a training record.

    Fields:
        statistics: load and drops of the step.
        losses: the layer's auxiliary losses by name, unweighted.
        state: router state after the step by its short name (`selection_bias`, `cutoff`), a number per expert.
    """

    statistics: RoutingStatistics
    losses: Mapping[str, float]
    state: Mapping[str, Sequence[float]]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as one flat object for JSON."""
        return {**asdict(self.statistics), "losses": self.losses, **self.state}


@dataclass(frozen=True)
class StepRecord:
    """A training record: the logged metrics of one step.

    Fields:
        step: updates done.
        tokens: tokens trained on so far.
        losses: `loss`, `cross_entropy`, and each auxiliary loss as `<name>` and `<name>_weighted`.
        gradient_norm: global norm before clipping.
        learning_rate: of this step's update.
        tokens_per_second: mean since the last record; None for the first step of a process, which compiles.
        routing: one LayerRecord per MoE layer.
    """

    step: int
    tokens: int
    losses: Mapping[str, float]
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float | None
    routing: tuple[LayerRecord, ...] = ()

    @property
    def loss(self) -> float:
        """The training objective."""
        return self.losses["loss"]

    @property
    def weighted_losses(self) -> dict[str, float]:
        """Contribution of each auxiliary loss to the training objective, by name."""
        ending = "_weighted"
        return {name.removesuffix(ending): value for name, value in self.losses.items() if name.endswith(ending)}

    @property
    def worst_layer(self) -> RoutingStatistics | None:
        """The MoE layer with the worst load; None for a dense model."""
        return max((layer.statistics for layer in self.routing), key=lambda layer: layer.worst_load, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as one object for JSON, loss terms at the top level."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            **self.losses,
            "gradient_norm": self.gradient_norm,
            "learning_rate": self.learning_rate,
            "tokens_per_second": self.tokens_per_second,
            "routing": [layer.to_dict() for layer in self.routing],
        }


class Record(Protocol):
    """A line of `metrics.jsonl`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as one object for JSON."""
        ...


def routing_statistics(
    layers: Sequence[int], load: Sequence[NDArray[np.int64]], dropped: Sequence[int]
) -> tuple[RoutingStatistics, ...]:
    """Compute load, worst load and drop rate per MoE layer from its assignment counts.

    Args:
        layers: layer indices.
        load: int64 [E] per layer, assignments to each expert before capacity drops any.
        dropped: number of dropped assignments per layer.
    """
    rows = []
    for layer, counts, lost in zip(layers, load, dropped, strict=True):
        total = max(1, int(counts.sum()))  # NaN chooses no expert
        share = counts / total
        rows.append(
            RoutingStatistics(
                layer=layer,
                load=tuple(round(float(value), 6) for value in share),
                worst_load=round(float(share.max() * len(share)), 4),
                dropped=round(lost / total, 6),
            )
        )
    return tuple(rows)


def step_record(
    spec: ModelSpec, step: int, tokens: int, learning_rate: float, metrics: StepMetrics, speed: float | None
) -> StepRecord:
    """Return the record of a training step; `speed` is in tokens per second, None if it is unknown."""
    kinds: list[str] = [*dict.fromkeys(loss.kind for _, moe in spec.moes for loss in moe.losses)]
    kinds += ["index"] if "index" in metrics.losses else []
    names = ["loss", "cross_entropy", *(name for kind in kinds for name in (kind, f"{kind}_weighted"))]
    statistics = routing_statistics(spec.moe_layers, metrics.load, metrics.dropped)
    return StepRecord(
        step=step,
        tokens=tokens,
        losses={name: metrics.losses[name] for name in names},
        gradient_norm=metrics.gradient_norm,
        learning_rate=learning_rate,
        tokens_per_second=None if speed is None else round(speed, 1),
        routing=tuple(
            LayerRecord(row, layer_losses(metrics.losses, row.layer), layer_state(metrics.state, row.layer))
            for row in statistics
        ),
    )


def layer_losses(losses: Mapping[str, float], layer: int) -> dict[str, float]:
    """Select the auxiliary losses of one layer: of all loss terms, those named `layers.<layer>.<name>`, by `<name>`."""
    prefix = f"layers.{layer}."
    return {name.removeprefix(prefix): value for name, value in losses.items() if name.startswith(prefix)}


def layer_state(state: Mapping[str, NDArray[Any]], layer: int) -> dict[str, list[float]]:
    """Select the router state of one layer by short name; a cutoff is the bias-corrected average used in inference."""
    prefix = f"layers.{layer}.moe.router."
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    weight = own.pop("cutoff_weight", None)
    if weight is not None:
        own["cutoff"] = own["cutoff"] / np.maximum(weight, np.finfo(np.float32).tiny)
    return {name: [round(float(number), 6) for number in value] for name, value in own.items()}


class MetricsFile:
    """A `metrics.jsonl` open for appending, with one line per step and kind (training or validation).

    Each line is in the file when `write` returns, so a killed process loses at most the line in progress.

    Fields:
        problems: a line for the user about each damaged line, which is removed, or about a file without lines.
    """

    def __init__(self, path: Path, *, keep_to_step: int = 0):
        """Open or create the file. Lines after `keep_to_step` are removed: they are newer than the checkpoint resumed.

        Raises RunError: the file cannot be read or written.
        """
        self._path = path
        saved, problems = _read(path)
        self.problems = [f"{problem}; the line was removed" for problem in problems]
        kept = {key: line for key, (line, _) in saved.items() if key[0] <= keep_to_step}
        if keep_to_step and not kept and not problems:
            self.problems = [f"{path} is missing or empty; the steps up to {keep_to_step} will not be in it"]
        self._keys = set(kept)
        write_atomically(path, b"".join(kept.values()))

    def write(self, record: Record) -> None:
        """Append a record, or replace the line of its step and kind. Values that are not finite become null.

        Raises RunError: the file was removed, the disk is full, or a limit on its size is reached; the earlier lines
        are still complete then.
        """
        content = _finite(record.to_dict())  # JSON has no NaN
        key, line = _key(content), _encode(content)
        with readable_errors(f"cannot write {self._path}"):
            if key in self._keys:
                others = [other for saved, (other, _) in _read(self._path)[0].items() if saved != key]
                write_atomically(self._path, b"".join([*others, line]))
            else:
                _append(self._path, line)
        self._keys.add(key)


def read_metrics(path: Path, problems: list[str] | None = None) -> list[dict[str, Any]]:
    """Read every intact line of a metrics file, the last one of each step and kind; [] if it does not exist.

    `problems`: a line for the user about each damaged line is added to it.

    Raises RunError: the file cannot be read.
    """
    saved, damaged = _read(path)
    if problems is not None:
        problems += [f"{problem}; the line was ignored" for problem in damaged]
    return [record for _, record in saved.values()]


def has_validation(path: Path, step: int) -> bool:
    """Return whether a metrics file has the validation of a step."""
    return any(line["step"] == step and "windows" in line for line in read_metrics(path))


_Key = tuple[int, str]  # step, and kind: training or validation


def _read(path: Path) -> tuple[dict[_Key, tuple[bytes, dict[str, Any]]], list[str]]:
    """Return line and record of each step and kind, in the file's order, and the problem of each damaged line."""
    saved: dict[_Key, tuple[bytes, dict[str, Any]]] = {}
    problems: list[str] = []
    if not os.path.lexists(path):
        return saved, problems
    try:
        content = read_bounded(path, _MAX_BYTES)
    except OSError as error:
        raise RunError(f"{path} cannot be read; got: {reason_of(error)}; expected JSON lines. Repair it.") from None
    for number, line in enumerate(io.BytesIO(content), start=1):
        try:
            record = _decode(line)
        except ValueError as error:
            problems.append(f"line {number} of {path} is damaged: {error}")
            continue
        saved[_key(record)] = line, record
    return saved, problems


def _append(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        end, done = os.fstat(descriptor).st_size, 0
        try:
            while done < len(line):  # a full disk writes a part first, and then fails
                done += os.write(descriptor, line[done:])
        except OSError:
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def _encode(record: dict[str, Any]) -> bytes:
    """Return a line: JSON whose last key is the CRC-32 of the text before it."""
    text = json.dumps(record, allow_nan=False)[:-1]
    return f'{text}, "{_CHECKSUM}": "{zlib.crc32(text.encode()):08x}"}}\n'.encode()


def _decode(line: bytes) -> dict[str, Any]:
    """Return the record of a line, without its checksum, which older lines lack. Raises ValueError with the problem."""
    if not line.endswith(b"\n"):
        raise ValueError("it has no end, because the process that wrote it was killed, or the disk was full")
    try:
        record = parse_json(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON ({reason_of(error)})") from None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError("it has no step")
    checksum = record.pop(_CHECKSUM, None)
    text = line[: -len(f', "{_CHECKSUM}": "00000000"}}\n')]
    if checksum is None and isinstance([*record.values()][-1], str):  # no other value of a record is a text
        raise ValueError("the name of its checksum differs")
    if checksum is not None and checksum != f"{zlib.crc32(text):08x}":
        raise ValueError("its checksum differs")
    return record


def _key(record: Mapping[str, Any]) -> _Key:
    return record["step"], "validation" if "validation_loss" in record else "training"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
