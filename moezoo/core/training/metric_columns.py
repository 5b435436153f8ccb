"""The numbers of a metrics file as columns; the file may be anybody's."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.core.errors import RunError
from moezoo.core.tokens import Column
from moezoo.core.training.metrics import read_metrics

_MOST_COLUMNS = 200
_LARGEST_STEP = 2**62


def read_columns(path: Path, problems: list[str]) -> dict[str, Column]:
    """Read the numbers of a metrics file by name, [n] for n steps: `step` int64, all others float64.

    A step has one row, with the numbers of its training record and of its validation; NaN is a number that it does not
    have. `problems`: a line for the user about each damaged line is added.

    Raises RunError: the file cannot be read, or is not one of metrics.
    """
    rows: dict[int, dict[str, float]] = {}
    for line in read_metrics(path, problems):
        row = rows.setdefault(line["step"], {})
        row.update({name: number for name, value in line.items() if (number := _number(value)) is not None})
    names = dict.fromkeys(name for row in rows.values() for name in row if name != "step")
    if len(names) > _MOST_COLUMNS or any(not 0 <= step < _LARGEST_STEP for step in rows):
        raise RunError(f"{path} has {len(names)} kinds of numbers, or impossible steps; expected metrics of training.")
    steps = sorted(rows)
    columns: dict[str, Column] = {"step": np.array(steps, np.int64)}
    return columns | {name: np.array([rows[step].get(name, math.nan) for step in steps]) for name in names}


def last_number(columns: Mapping[str, Column], name: str) -> float | None:
    """Return the last finite number of a column; None if it has none."""
    values = columns.get(name, np.zeros(0))
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
