"""Rows of the parameter table, and helpers that build them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from moezoo.core.spec import DepthScaledInitializerSpec, LayerNormSpec, ModelSpec, NormSpec, ZeroOutputInitializerSpec

Item = TypeVar("Item")

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
    """Initial distribution of a parameter: `normal` with a standard deviation, `constant` with a value, or as below.

    Each row of a `hash_table` [V, K] has K different numbers below `value`, and each number is equally frequent in a
    column. `uniform` is between -`value` and `value`. Two initialize the decay of a recurrent state: `log_rate` is the
    logarithm of a number uniform between 1 and `value`; the softplus of `step_bias` is log-uniform between
    `value` / 100 and `value`.
    """

    kind: Literal["normal", "constant", "hash_table", "uniform", "log_rate", "step_bias"]
    std: float = 0.0
    value: float = 0.0


ONES, ZEROS = Initializer("constant", value=1.0), Initializer("constant", value=0.0)


class MatrixAxes(NamedTuple):
    """Axes of a matrix: the first `batch` number the matrices of a stack (experts), the next `fan_in` are inputs.

    All other axes are outputs: [D, N, H] with a fan-in of 1 is one matrix from D inputs to N * H outputs.
    """

    batch: int
    fan_in: int

    def split(self, shape: tuple[Item, ...]) -> tuple[tuple[Item, ...], tuple[Item, ...], tuple[Item, ...]]:
        """Return the parts of a shape, or of its axes: those of the stack, the inputs, and the outputs."""
        end = self.batch + self.fan_in
        return shape[: self.batch], shape[self.batch : end], shape[end:]

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the number of matrices, inputs and outputs of a shape."""
        stack, inputs, outputs = self.split(shape)
        return math.prod(stack), math.prod(inputs), math.prod(outputs)


@dataclass(frozen=True)
class Parameter:
    """One row. `axes` has one axis word of the dimension alphabet per dimension; `decay`: weight decay applies.

    A row that is not `trained` is state: it has no gradient and no optimizer moments, but a step may update it in
    another way (a selection bias, an expert's cutoff). `matrix`: which axes are inputs and outputs, of a row that is a
    linear map or an embedding; None for biases, scales, filters of a convolution, constants and state. `base`: name of
    the matrix that a factor of an adapter is for; the factor's role is that matrix's.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    initializer: Initializer
    decay: bool
    role: Role
    trained: bool = True
    matrix: MatrixAxes | None = None
    base: str | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Rows:
    """Builds the rows of one model, with its width and its initializers."""

    def __init__(self, spec: ModelSpec):
        self.spec = spec
        self.embed_dim = spec.embed_dim
        self.matrix_initializer = Initializer("normal", spec.initializer.std)
        match spec.initializer:
            case DepthScaledInitializerSpec(std=std):
                self.output_initializer = Initializer("normal", std / math.sqrt(2 * len(spec.all_layers)))
            case ZeroOutputInitializerSpec():
                self.output_initializer = ZEROS
            case _:
                self.output_initializer = self.matrix_initializer

    def matrix(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        role: Role,
        initializer: Initializer | None = None,
        *,
        batch: int = 0,
        fan_in: int = 1,
    ) -> Parameter:
        """Return the row of a matrix, with weight decay; `batch` and `fan_in`: its MatrixAxes."""
        initializer = self.matrix_initializer if initializer is None else initializer
        return Parameter(name, shape, axes, initializer, True, role, matrix=MatrixAxes(batch, fan_in))

    def output(
        self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], role: Role, *, batch: int = 0, fan_in: int = 1
    ) -> Parameter:
        """Return the row of a matrix that writes into the residual stream."""
        return self.matrix(name, shape, axes, role, self.output_initializer, batch=batch, fan_in=fan_in)

    def vector(
        self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], role: Role, initializer: Initializer = ZEROS
    ) -> Parameter:
        """Return the row of a bias or scale, without weight decay."""
        return Parameter(name, shape, axes, initializer, False, role)

    def state(
        self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], role: Role, initializer: Initializer = ZEROS
    ) -> Parameter:
        """Return the row of state, which is not trained by gradients."""
        return Parameter(name, shape, axes, initializer, False, role, trained=False)

    def norm(self, name: str, spec: NormSpec, shape: tuple[int, ...], axes: tuple[str, ...]) -> Iterator[Parameter]:
        """Yield the rows of a norm over these axes."""
        if isinstance(spec, LayerNormSpec):
            yield self.vector(f"{name}.scale", shape, axes, "norms", ONES)
            if spec.bias:
                yield self.vector(f"{name}.bias", shape, axes, "norms")
        elif spec.scale != "none":
            yield self.vector(f"{name}.scale", shape, axes, "norms", ONES if spec.scale == "learned" else ZEROS)
