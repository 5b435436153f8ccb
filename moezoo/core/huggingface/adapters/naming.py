"""Modules of other tools that have a model's matrices: in mlx-lm, in transformers with PEFT, and in vLLM.

The names are those of the family's tensor mapping. PEFT and vLLM address each expert by itself, with the names of
published files, or with `peft-fused` all experts at once, with the names of transformers 5.
"""

from collections.abc import Iterator
from typing import Literal, get_args

from moezoo.core.errors import SpecError
from moezoo.core.huggingface.adapters.matrices import StoredMatrix, stored_matrix
from moezoo.core.huggingface.layout import Description
from moezoo.core.huggingface.ledger import first_rules
from moezoo.core.huggingface.tensors import Fused, places
from moezoo.core.parameters import parameter_table
from moezoo.core.spec import ModelSpec

AdapterLayout = Literal["mlx", "peft", "peft-fused", "vllm"]

_RENAMED = (".moe.experts.", ".moe.router.")  # parts of a name of ours that transformers 5 names in another way


def adapter_layout(name: str) -> AdapterLayout:
    """Return the layout of that name. Raises SpecError: there is none."""
    for layout in get_args(AdapterLayout):
        if name == layout:
            found: AdapterLayout = layout
            return found
    raise SpecError(
        f"--adapter is {name!r:.80}; expected one of {', '.join(get_args(AdapterLayout))}, or with --merge a folder."
    )


def named_matrices(description: Description, layout: AdapterLayout) -> dict[str, StoredMatrix]:
    """Return the matrices of a model without adapter by their tensors' names, one for each of our parameters.

    Raises SpecError: mlx-lm does not have the family.
    """
    family = description.family
    match layout:
        case "mlx":
            if not family.mlx or description.fields.model_type in family.mlx_lm.without:
                raise SpecError(
                    f"mlx-lm 0.32 does not have model_type {description.fields.model_type}; expected a family that it "
                    "has. Use --adapter peft."
                )
            rules, prefix = family.mlx_tensors, _mlx_prefix(description)
        case "peft" | "vllm":
            rules, prefix = family.tensors, ""
        case "peft-fused":
            rules, prefix = (*(rule for rule in reversed(family.tensors) if _is_renamed(rule)), *family.tensors), ""
    placed = first_rules(rules, description.spec)
    rows = {row.name: row for row in parameter_table(description.spec)}
    found = {prefix + name: stored_matrix(prefix + name, rule, rows) for name, rule in placed.items()}
    return {name: matrix for name, matrix in found.items() if matrix is not None}


def every_matrix(description: Description) -> Iterator[StoredMatrix]:
    """Yield the matrices of a model without adapter under every name that files of transformers may have."""
    spec: ModelSpec = description.spec
    rows = {row.name: row for row in parameter_table(spec)}
    shapes = {name: row.shape for name, row in rows.items()}
    for rule in description.family.tensors:
        for placed in places(rule, shapes, len(spec.all_layers)) if not rule.copy else ():
            matrix = stored_matrix(placed.name, placed, rows)
            if matrix is not None:
                yield matrix


def _is_renamed(rule: Fused) -> bool:
    return any(part in rule.parts[0].ours for part in _RENAMED)


def _mlx_prefix(description: Description) -> str:
    wrapped = isinstance(description.fields.raw.get("text_config"), dict) or description.family.mlx_lm.wrapper
    return "language_model." if wrapped else ""
