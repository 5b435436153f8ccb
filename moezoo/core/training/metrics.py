"""Training metrics as records, and `metrics.jsonl`, which has one record per line as a JSON object.

Training records have `step` (updates done), `tokens`, `loss` (the training objective), `cross_entropy`, each auxiliary
loss as `<name>` (mean over its layers, unweighted) and `<name>_weighted` (its contribution to the loss),
`gradient_norm`, `learning_rate`, `tokens_per_second`, and `routing`: per MoE layer `layer`, `load` (share of
assignments per expert, sums to 1), `worst_load` (the largest share times the number of experts: 1 is balanced),
`dropped` (share of assignments beyond an expert's capacity), `losses` (each auxiliary loss of this layer by name,
unweighted; `index` is that of its attention's indexer), and if the router has them `selection_bias` and `cutoff` of
each expert after the step (writings/router_state.md). Validation records have `step`, `tokens`, `validation_loss`
(nats per token) and the other fields of `Evaluation`; their `routing` has neither losses nor router state.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moezoo.core.errors import RunError
from moezoo.core.files import read_bounded, reason_of, write_atomically

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
    def worst_load(self) -> float | None:
        """The worst load of all MoE layers; None for a dense model."""
        return max((layer.statistics.worst_load for layer in self.routing), default=None)

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
        share = counts / counts.sum()
        rows.append(
            RoutingStatistics(
                layer=layer,
                load=tuple(round(float(value), 6) for value in share),
                worst_load=round(float(share.max() * len(share)), 4),
                dropped=round(lost / int(counts.sum()), 6),
            )
        )
    return tuple(rows)


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
    """An append-only `metrics.jsonl`. Each line is flushed, so a killed process loses at most the line in progress."""

    def __init__(self, path: Path, *, keep_to_step: int = 0):
        """Open for appending. Lines after `keep_to_step` are removed: they are newer than the checkpoint resumed."""
        self._path = path
        kept = [line for line, record in _lines(path) if record.get("step", 0) <= keep_to_step]
        write_atomically(path, "".join(kept))
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{path} cannot be written; got {error.strerror}. Check the folder's permissions.") from None

    def write(self, record: Record) -> None:
        """Append a record. Values that are not finite become null, because JSON has no NaN."""
        self._file.write(json.dumps(_finite(record.to_dict()), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read every complete line of a metrics file; [] if it does not exist."""
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if not os.path.lexists(path):
        return []
    found = []
    try:
        text = read_bounded(path, _MAX_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read; got: {reason_of(error)}; expected JSON lines. Repair it.") from None
    for line in text.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line that a killed process left incomplete
        if isinstance(record, dict) and line.endswith("\n"):
            found.append((line, record))
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
