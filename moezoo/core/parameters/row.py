"""One row of the parameter table, and what its makers share."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moezoo.core.spec import DepthScaledInitializerSpec, LayerNormSpec, ModelSpec, NormSpec, ZeroOutputInitializerSpec

Role = Literal["embeddings", "attention", "feed-forward", "router", "routed experts", "shared experts", "norms"]
ROLES: tuple[Role, ...] = (
    "embeddings",
    "attention",
    "feed-forward",
    "router",
    "routed experts",
    "shared experts",
    "norms",
)


@dataclass(frozen=True)
class Initializer:
    """How a parameter starts: `normal` with a standard deviation, `constant` with a value, or as below.

    A `hash_table` [V, K] gives each row K different numbers below `value`, each number equally often in a column.
    `uniform` lies between -`value` and `value`. Two set how fast a recurrent state forgets: `log_rate` is the logarithm
    of a number uniform between 1 and `value`; `step_bias` has a softplus whose logarithm is uniform between those of
    `value` / 100 and `value`.
    """

    kind: Literal["normal", "constant", "hash_table", "uniform", "log_rate", "step_bias"]
    std: float = 0.0
    value: float = 0.0


ONES, ZEROS = Initializer("constant", value=1.0), Initializer("constant", value=0.0)


@dataclass(frozen=True)
class Parameter:
    """One row. `axes` are axis words of the dimension alphabet, one a dimension; `decay`: weight decay acts on it.

    A row that is not `trained` is state: it has no gradient and no optimizer moments, and a step may change it in
    another way (a selection bias, an expert's cutoff).
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    initializer: Initializer
    decay: bool
    role: Role
    trained: bool = True

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Rows:
    """Makes rows for one model: its width, and how its matrices start."""

    def __init__(self, spec: ModelSpec):
        self.spec = spec
        self.embed_dim = spec.embed_dim
        self.matrix_start = Initializer("normal", spec.initializer.std)
        match spec.initializer:
            case DepthScaledInitializerSpec(std=std):
                self.output_start = Initializer("normal", std / math.sqrt(2 * len(spec.all_layers)))
            case ZeroOutputInitializerSpec():
                self.output_start = ZEROS
            case _:
                self.output_start = self.matrix_start

    def matrix(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], role: Role) -> Parameter:
        """A matrix: normal, decayed."""
        return Parameter(name, shape, axes, self.matrix_start, True, role)

    def output(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], role: Role) -> Parameter:
        """A matrix that writes into the residual stream."""
        return Parameter(name, shape, axes, self.output_start, True, role)

    def vector(
        self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], role: Role, start: Initializer = ZEROS
    ) -> Parameter:
        """A bias or a scale: not decayed."""
        return Parameter(name, shape, axes, start, False, role)

    def state(
        self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], role: Role, start: Initializer = ZEROS
    ) -> Parameter:
        """Not trained by gradients."""
        return Parameter(name, shape, axes, start, False, role, trained=False)

    def norm(self, name: str, spec: NormSpec, shape: tuple[int, ...], axes: tuple[str, ...]) -> Iterator[Parameter]:
        """What a norm over these axes has."""
        if isinstance(spec, LayerNormSpec):
            yield self.vector(f"{name}.scale", shape, axes, "norms", ONES)
            if spec.bias:
                yield self.vector(f"{name}.bias", shape, axes, "norms")
        elif spec.scale != "none":
            yield self.vector(f"{name}.scale", shape, axes, "norms", ONES if spec.scale == "learned" else ZEROS)
