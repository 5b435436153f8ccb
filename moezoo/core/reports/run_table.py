"""Report of `moezoo plot`: how runs ended, and the fields in which their configs differ."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moezoo.core.config.differences import Difference, differing_fields, merged_over_layers, value_text
from moezoo.core.reports.run_curves import RunCurves, at_end, read_curves
from moezoo.core.reports.text import new_table
from moezoo.core.runs.run_folder import load_run_config, open_run

if TYPE_CHECKING:
    from rich.console import RenderableType

_FORMATS = {
    "step": ",.0f",
    "training": ".3f",
    "validation": ".3f",
    "MaxVio": ".2f",
    "entropy": ".3f",
    "dropped": ".1%",
    "tokens/s": ",.0f",
}
"""Columns of the table of runs, besides the name."""


@dataclass(frozen=True)
class FinishedRun:
    """A run to draw, finished or not.

    Fields:
        name: of its folder; the whole path if two have the same name.
        path: of its folder.
        config: the dumped config.
        curves: its metrics.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    curves: RunCurves

    @property
    def end(self) -> dict[str, float | None]:
        """The last step; means over the last fortieth of the steps; the last validation; None is unknown.

        MaxVio is that of the worst layer, entropy of the load that of the lowest one, tokens/s the median of the run.
        """
        curves = self.curves
        speeds = curves.tokens_per_second[np.isfinite(curves.tokens_per_second)]
        values = {
            "step": float(curves.step[-1]),
            "training": at_end(curves.cross_entropy),
            "validation": float(curves.validation[-1]) if len(curves.validation) else math.nan,
            "MaxVio": max((at_end(column) for column in curves.max_vio.T), default=math.nan),
            "entropy": min((at_end(column) for column in curves.entropy.T), default=math.nan),
            "dropped": at_end(curves.dropped.mean(axis=1)) if curves.layers else math.nan,
            "tokens/s": float(np.median(speeds)) if len(speeds) else math.nan,
        }
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


@dataclass(frozen=True)
class RunsReport:
    """Runs beside each other, and a line for the user about each damaged line of their metrics."""

    runs: tuple[FinishedRun, ...]
    problems: tuple[str, ...]

    @property
    def differences(self) -> list[Difference]:
        """The fields in which the configs differ, those equal in several layers as one."""
        return merged_over_layers([*differing_fields([run.config for run in self.runs])])

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the columns that a run has, without the name, and the texts of each run; `dropped` if a run drops."""
        ends = [run.end for run in self.runs]
        shown = [
            name for name in _FORMATS if any(end[name] is not None and (name != "dropped" or end[name]) for end in ends)
        ]
        return shown, [
            ["" if end[name] is None else format(end[name], _FORMATS[name]) for name in shown] for end in ends
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "runs": [{"name": run.name, "path": str(run.path), **run.end} for run in self.runs],
            "differences": {path: list(values) for path, values in self.differences},
        }

    def page(self) -> "RenderableType":
        """Return the tables."""
        from rich.console import Group

        columns, rows = self.table()
        table = new_table("run", *columns, right=range(1, 1 + len(columns)))
        table.columns[0].overflow = "fold"
        for run, row in zip(self.runs, rows, strict=True):
            table.add_row(run.name, *row)
        if len(self.runs) == 1:
            return table
        if not self.differences:
            return Group(table, "The configs do not differ.")
        differences = new_table("config", *(run.name for run in self.runs))
        for column in differences.columns:
            column.overflow = "fold"
        for path, values in self.differences:
            differences.add_row(path, *map(value_text, values))
        return Group(table, differences)


def read_runs(paths: Sequence[Path]) -> RunsReport:
    """Read configs and metrics of run folders. Raises RunError or SpecError: a folder that is not a run, or damaged."""
    names = [path.resolve().name for path in paths]
    problems: list[str] = []
    runs = [
        FinishedRun(
            name=name if names.count(name) == 1 else str(path),
            path=path,
            config=load_run_config(run.path).model_dump(mode="json"),
            curves=read_curves(run.metrics_path, problems),
        )
        for name, path, run in zip(names, paths, map(open_run, paths), strict=True)
    ]
    return RunsReport(tuple(runs), tuple(problems))
