"""Low-rank adapters of a model's matrices (LoRA)."""

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moezoo.core.spec.base import Part, impossible

AdapterRole = Literal["attention", "experts", "shared", "dense", "router", "embedding", "head"]

DEFAULT_ROLES: tuple[AdapterRole, ...] = ("attention", "experts", "shared", "dense")
"""Roles that an adapter is on where a config names none, as far as the model has them."""


class AdapterSpec(Part):
    """Low-rank adapters: a matrix W becomes `W + scale A B`, with A of width `rank`; B is zero at first.

    `scale` is what other tools call `alpha / rank`. `dropout`: rate of dropout on the input of `A B` in training, not
    on that of W; routed experts have none. `on`: roles of the adapted matrices; null: attention, experts, shared and
    dense, as far as the model has them. `layers`: indices of the adapted layers; embedding and head are in no layer.
    `expert_sharing`: each expert has its own A and B.

    Source: Hu et al. 2021, arXiv 2106.09685; on routed experts: mlx-lm, PEFT (`target_parameters`).
    """

    rank: PositiveInt = 16
    scale: PositiveFloat = 2.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    on: tuple[AdapterRole, ...] | None = None
    layers: Literal["all"] | tuple[NonNegativeInt, ...] = "all"
    expert_sharing: Literal["none"] = "none"

    @model_validator(mode="after")
    def _names_something_once(self) -> "AdapterSpec":
        for field, named in (("on", self.on), ("layers", None if self.layers == "all" else self.layers)):
            if named is not None and not named:
                raise impossible(field, "is empty, so nothing would be adapted", f"Name some, or remove {field}")
            if named is not None and len(set(named)) < len(named):
                raise impossible(field, "names the same one twice", "Name each once")
        return self

    def has_layer(self, index: int) -> bool:
        """Return True if the matrices of this layer may be adapted."""
        return self.layers == "all" or index in self.layers

    def roles(self, existing: Collection[AdapterRole]) -> tuple[AdapterRole, ...]:
        """Return the roles of the adapted matrices, given those that the model has in these layers."""
        return tuple(role for role in DEFAULT_ROLES if role in existing) if self.on is None else self.on

    def check(self, depth: int, existing: Collection[AdapterRole]) -> None:
        """Raise for a layer or role that a model of `depth` layers does not have, or dropout of routed experts."""
        where = "the model"
        if self.layers != "all":
            where = f"layers {', '.join(map(str, self.layers))}"
            if max(self.layers) >= depth:
                problem = f"has {max(self.layers)}, but the last layer is {depth - 1}"
                raise impossible("adapter.layers", problem, f"Use indices up to {depth - 1}")
        for role in self.roles(existing):
            if role not in existing and role == "head":
                advice = "Use embedding, whose matrix a tied head has"
                raise impossible("adapter.on", "has head, but the head is tied to the embedding", advice)
            if role not in existing:
                raise impossible("adapter.on", f"has {role}, of which {where} has no matrix", f"Remove {role}")
        if self.dropout and "experts" in self.roles(existing):
            advice = "Use dropout: 0, or name roles without experts in adapter.on"
            raise impossible("adapter.dropout", f"is {self.dropout}, but adapters of experts have none", advice)
