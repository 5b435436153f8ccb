"""What a run writes down: `metrics.jsonl`, one JSON object a line.

Training lines have `step` (updates done), `tokens`, `loss` (what is minimized), `cross_entropy`, every auxiliary loss
as `<name>` (mean over its layers, unweighted) and `<name>_weighted` (what it adds to the loss), `gradient_norm`,
`learning_rate`, `tokens_per_second`, and `routing`: per MoE layer `layer`, `load` (share of routed copies per expert,
sums to 1), `worst_load` (the most loaded expert's share times the number of experts: 1 is balanced), `dropped`
(share of routed copies that a capacity dropped), and `losses` (each auxiliary loss of this layer by name, unweighted;
`index` is that of its attention's indexer), and where the router has them `selection_bias` and `cutoff` of each expert
after the step (writings/router_state.md). Validation lines have `step`, `tokens`, `validation_loss` (nats a token)
and what else `Evaluation.to_dict` gives; their `routing` is without these.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.errors import RunError
from moezoo.core.files import write_atomically


def routing_statistics(
    layers: Sequence[int], load: Sequence[NDArray[np.int64]], dropped: Sequence[int]
) -> list[dict[str, Any]]:
    """Per MoE layer: load, worst load and drop rate, from counts of routed copies per expert."""
    rows = []
    for layer, counts, lost in zip(layers, load, dropped, strict=True):
        share = counts / counts.sum()
        rows.append(
            {
                "layer": layer,
                "load": [round(float(value), 6) for value in share],
                "worst_load": round(float(share.max() * len(share)), 4),
                "dropped": round(lost / int(counts.sum()), 6),
            }
        )
    return rows


def layer_losses(losses: Mapping[str, float], layer: int) -> dict[str, float]:
    """The auxiliary losses of one layer by name: of all loss terms, those named `layers.<layer>.<name>`."""
    prefix = f"layers.{layer}."
    return {name.removeprefix(prefix): value for name, value in losses.items() if name.startswith(prefix)}


def layer_state(state: Mapping[str, NDArray[Any]], layer: int) -> dict[str, list[float]]:
    """State of one layer's router by its short name; a cutoff as the average that inference uses."""
    prefix = f"layers.{layer}.moe.router."
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    weight = own.pop("cutoff_weight", None)
    if weight is not None:
        own["cutoff"] = own["cutoff"] / np.maximum(weight, np.finfo(np.float32).tiny)
    return {name: [round(float(number), 6) for number in value] for name, value in own.items()}


def worst_load(routing: Iterable[Mapping[str, Any]]) -> float | None:
    """The worst load of all layers; None for a dense model."""
    return max((row["worst_load"] for row in routing), default=None)


class MetricsFile:
    """Appends lines; each is flushed, so a killed run loses none but the one it was writing."""

    def __init__(self, path: Path, *, keep_to_step: int = 0):
        """Open for appending. Lines after `keep_to_step`, of a run that outlived its last checkpoint, are dropped."""
        self._path = path
        kept = [line for line, record in _lines(path) if record.get("step", 0) <= keep_to_step]
        write_atomically(path, "".join(kept))
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{path} cannot be written; got {error.strerror}. Check the folder's permissions.") from None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object. Values that are not finite become null, which JSON can hold."""
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file; [] where it does not exist."""
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line that a kill cut short
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
