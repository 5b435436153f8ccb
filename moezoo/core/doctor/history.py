"""The metrics of a run as arrays, checked: a metrics file may be anybody's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.errors import RunError, shown
from moezoo.core.spec import ModelSpec
from moezoo.core.training.metrics import read_metrics

Floats = NDArray[np.float64]

_SHARE, _FEWEST, _MOST = 4, 3, 50  # the newest quarter of the records, at least 3 and at most 50


@dataclass(frozen=True)
class LayerHistory:
    """Routing of one MoE layer over R training records.

    Fields:
        load_RE: share of assignments of each expert.
        bias_RE: selection bias after the step; None without one.
    """

    load_RE: Floats
    bias_RE: Floats | None

    @property
    def recent_E(self) -> Floats:
        """Mean load over the newest records."""
        mean: Floats = np.mean(self.load_RE[-recent(len(self.load_RE)) :], axis=0)
        return mean  # NaN if a load was not finite


@dataclass(frozen=True)
class History:
    """Training records of a run.

    Fields:
        step_R: updates done.
        terms: `loss`, `cross_entropy`, `gradient_norm` and the weighted auxiliary losses by name, [R] each; NaN where
            a value was not finite.
        layers: routing by index of the MoE layer.
        problems: a line for each damaged line of the file.
    """

    step_R: NDArray[np.int64]
    terms: Mapping[str, Floats]
    layers: Mapping[int, LayerHistory]
    problems: Sequence[str]

    def __len__(self) -> int:
        return len(self.step_R)


def recent(count: int) -> int:
    """Return how many of the newest of `count` records stand for the end of a run."""
    return min(count, max(_FEWEST, min(_MOST, count // _SHARE)))


def read_history(path: Path, spec: ModelSpec) -> History:
    """Read the training records of a metrics file. Raises RunError: values of another form than training writes."""
    problems: list[str] = []
    lines = [line for line in read_metrics(path, problems) if "cross_entropy" in line]
    named = ["loss", "cross_entropy", "gradient_norm"]
    weighted = sorted({name for line in lines for name in line if name.endswith("_weighted")})
    terms = {name: np.array([_number(line, name, path) for line in lines]) for name in [*named, *weighted]}
    layers = {index: _layer(lines, index, moe.num_choices, path) for index, moe in spec.moes} if lines else {}
    return History(np.array([_step(line, path) for line in lines], np.int64), terms, layers, problems)


def _step(line: Mapping[str, Any], path: Path) -> int:
    step: int = line["step"]
    if not 0 <= step < 2**53:
        raise _invalid(line, path, "such a step")
    return step


def _number(line: Mapping[str, Any], name: str, path: Path) -> float:
    value = line.get(name)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _invalid(line, path, f"{name} is {shown(value, 60)}")
    return float(value)


def _layer(lines: Sequence[Mapping[str, Any]], index: int, num_experts: int, path: Path) -> LayerHistory:
    rows = [_row(line, index, path) for line in lines]
    load = np.array([_numbers(line, row, "load", num_experts, path) for line, row in zip(lines, rows, strict=True)])
    outside = np.argwhere(~np.isnan(load) & ~((load >= 0) & (load <= 1)))
    if len(outside):
        raise _invalid(lines[outside[0, 0]], path, f"a load of {load[tuple(outside[0])]:g} in layer {index}")
    if not all("selection_bias" in row for row in rows):
        return LayerHistory(load, None)
    bias = [_numbers(line, row, "selection_bias", num_experts, path) for line, row in zip(lines, rows, strict=True)]
    return LayerHistory(load, np.array(bias))


def _row(line: Mapping[str, Any], index: int, path: Path) -> Mapping[str, Any]:
    routing = line.get("routing")
    rows = [row for row in routing if isinstance(row, dict)] if isinstance(routing, list) else []
    found = next((row for row in rows if row.get("layer") == index), None)
    if found is None:
        raise _invalid(line, path, f"no routing of layer {index}")
    return found


def _numbers(line: Mapping[str, Any], row: Mapping[str, Any], name: str, count: int, path: Path) -> list[float]:
    values = row.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise _invalid(line, path, f"{name} of layer {row['layer']} is {shown(values, 60)}")
    return [_number({"step": line["step"], name: value}, name, path) for value in values]


def _invalid(line: Mapping[str, Any], path: Path, what: str) -> RunError:
    step = shown(line["step"], 30)
    return RunError(
        f"{path} does not fit the run's config; got {what} at step {step}; expected what training writes. Restore the "
        "file."
    )
