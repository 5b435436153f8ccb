"""Importance of each expert: the change of a model's loss on held-out text without it, all others in place."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moezoo.core.errors import SpecError
from moezoo.core.interventions.changes import Change, Changes, described
from moezoo.core.interventions.experts import Experts

_SHOWN_ROWS = 20
"""Rows at the beginning of a table, and at its end."""


def each_expert(experts: Experts) -> list[Experts]:
    """Return each of the experts as a set of its own. Raises SpecError: there are none."""
    if not experts:
        raise SpecError("no experts to measure; got a model without MoE layers; expected a mixture of experts.")
    return [{layer: (expert,)} for layer, ids in experts.items() for expert in ids]


def ranked(found: Changes) -> Changes:
    """Return the changes in falling order."""
    return replace(found, changes=tuple(sorted(found.changes, key=lambda row: (-row.change, *_place(row)))))


def importance_values(found: Changes) -> dict[str, Any]:
    """Return the changes without single experts as plain values for JSON."""
    return {
        "mode": found.mode,
        "loss": found.loss,
        "windows": found.windows,
        "sequence_length": found.sequence_length,
        "experts": [
            {"layer": layer, "expert": expert, "change": row.change, "standard_error": row.standard_error}
            for row in found.changes
            for layer, expert in [_place(row)]
        ],
    }


def _place(row: Change) -> tuple[int, int]:
    """Return layer and id of a single expert."""
    ((layer, (expert,)),) = row.experts.items()
    return layer, expert


def describe_importance(found: Changes) -> list[str]:
    """Describe the changes without single experts as a table: of many, the largest and the smallest."""
    how = {"silence": "silenced", "reroute": "rerouted around"}[found.mode]
    rows = [f"{layer:5}  {expert:6}  {described(row)}" for row in found.changes for layer, expert in [_place(row)]]
    hidden = len(rows) - 2 * _SHOWN_ROWS
    if hidden > 0:
        rows[_SHOWN_ROWS:-_SHOWN_ROWS] = [f"  ... {hidden:,} between"]
    return [
        f"importance: change of loss, in nats per token, with each expert {how} in turn; {found.loss:.4f} with all",
        "layer  expert  change" + (" ± standard error" if found.windows > 1 else ""),
        *rows,
        _note(found.changes),
    ]


def _note(changes: Sequence[Change]) -> str:
    """Say how many of the changes chance could explain."""
    if any(row.standard_error is None for row in changes):
        return "a single window has no standard error"
    unsure = sum(abs(row.change) <= 2 * (row.standard_error or 0.0) for row in changes)
    return f"{unsure:,} of {len(changes):,} changes are within two standard errors of zero"
