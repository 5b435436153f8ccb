"""Names of the parameters that a run trains (`training.only`); the others are frozen.

Writing: writings/fine_tuning.md.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Literal

from moezoo.core.errors import SpecError
from moezoo.core.parameters.model import parameter_table
from moezoo.core.parameters.row import Parameter
from moezoo.core.spec import ModelSpec

RoleWord = Literal["attention", "experts", "shared", "dense", "router", "embedding", "head", "norms"]
"""A role of parameters, as a config names it."""

Trainable = Literal["all", "adapter", RoleWord]
"""A role of parameters; all of them; or the model's adapter, whose factors are of no role here."""

_WORDS: dict[str, RoleWord] = {
    "attention": "attention",
    "routed experts": "experts",
    "shared experts": "shared",
    "feed-forward": "dense",
    "router": "router",
    "norms": "norms",
}


def trainable_role(row: Parameter) -> RoleWord:
    """Return the role of a row, or of the matrix of a factor, as a config names it: `embedding` or `head`, not both."""
    if row.base is not None:
        return trainable_role(replace(row, name=row.base, base=None))
    return _WORDS.get(row.role) or ("head" if row.name.startswith("head.") else "embedding")


def trained_rows(spec: ModelSpec, only: Sequence[Trainable] | None = None) -> tuple[Parameter, ...]:
    """Return the rows of the parameters that are trained, in the order of the parameter table.

    None: the adapter, if the model has one, else all. Raises SpecError: a role that is named has no parameters.
    """
    rows = tuple(row for row in parameter_table(spec) if row.trained)
    only = ("adapter",) if only is None and spec.adapter is not None else only
    found = {_word(row) for row in rows}
    for word in only or ():
        if word != "all" and word not in found:
            tied = ": a tied head is the embedding" if word == "head" else ""
            raise SpecError(
                f"training.only names {word}, but the model has no parameters of this role{tied}; it has "
                f"{', '.join(sorted(found))}. Remove it."
            )
    return rows if only is None or "all" in only else tuple(row for row in rows if _word(row) in only)


def _word(row: Parameter) -> Trainable:
    return trainable_role(row) if row.base is None else "adapter"


def trained_names(spec: ModelSpec, only: Sequence[Trainable] | None = None) -> frozenset[str]:
    """Return the canonical names of `trained_rows`."""
    return frozenset(row.name for row in trained_rows(spec, only))


def router_trains(spec: ModelSpec, trained: Collection[str]) -> bool:
    """Return True if the routers train: then a step updates their state too (`reference.router_state`).

    A frozen router keeps its selection bias and its cutoffs.
    """
    return any(row.role == "router" and row.name in trained for row in parameter_table(spec) if row.trained)


def sizes_by_role(rows: Iterable[Parameter]) -> dict[Trainable, int]:
    """Return the number of parameters of each role, in the order of the rows."""
    sizes: dict[Trainable, int] = {}
    for row in rows:
        role = trainable_role(row)
        sizes[role] = sizes.get(role, 0) + row.size
    return sizes
