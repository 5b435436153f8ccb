"""The `training` section of a config."""

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from moezoo.core.parameters.trained import Trainable
from moezoo.core.spec import Part, impossible

Rematerialize = Literal["none", "experts", "block"]

Layers = Literal["unrolled", "scanned"]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class TrainingConfig(Part):
    """Steps, batch size and memory options. A step has `batch_size` sequences in `gradient_accumulation` micro-batches.

    `rematerialize: block` is activation checkpointing: only the input of each attention, feed-forward block and n-gram
    embedding is saved, and the backward pass recomputes the rest, which takes less memory and about a third more
    compute. `experts` recomputes only the activations of the routed experts, not attention or the router.
    Source: Chen et al. 2016, arXiv 1604.06174.

    `batch_size` and `sequence_length` are at most 2**24 each: the longest published context has 10 million tokens.

    A validation has at most `validation_sequences` windows; the final one at most `final_validation_sequences`, null
    leaves it out.

    `only`: the roles of the parameters that are trained, or `all`; the others are frozen, without gradient and moments.
    `adapter` are the factors of the model's adapter, which are of no role here. Null is the adapter; without one, all.

    `layers: scanned` compiles a run of equal layers once and loops over it (`jax.lax.scan`), for deep models with long
    compile times. A model of few layers is slower with it. Results and checkpoints stay the same.
    """

    steps: PositiveInt
    batch_size: Annotated[int, Field(ge=1, le=1 << 24)]
    sequence_length: Annotated[int, Field(ge=1, le=1 << 24)]
    gradient_accumulation: PositiveInt = 1
    rematerialize: Rematerialize = "none"
    layers: Layers = "unrolled"
    only: Annotated[
        tuple[Trainable, ...] | None,
        BeforeValidator(_as_list, json_schema_input_type=Trainable | tuple[Trainable, ...] | None),
    ] = None
    seed: NonNegativeInt = 0
    log_every: PositiveInt = 10
    validate_every: PositiveInt | None = None
    validation_sequences: PositiveInt = 64
    final_validation_sequences: PositiveInt | None = 4096
    checkpoint_every: PositiveInt | None = None
    keep_checkpoints: PositiveInt = 2

    @model_validator(mode="after")
    def _trains(self) -> "TrainingConfig":
        if self.only == ():
            raise impossible("only", "is empty, so nothing is trained", "Name a role, or leave it out")
        return self

    @model_validator(mode="after")
    def _divides(self) -> "TrainingConfig":
        if self.batch_size % self.gradient_accumulation:
            raise impossible(
                "gradient_accumulation",
                f"is {self.gradient_accumulation}, which does not divide batch_size = {self.batch_size}",
                "Use a divisor of batch_size",
            )
        return self
