"""Typed wrappers of MLX functions whose type stubs are too general."""

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import mlx.core as mx
from mlx.utils import tree_flatten

Arguments = ParamSpec("Arguments")
Result_co = TypeVar("Result_co", covariant=True)
Gradient = TypeVar("Gradient", bound=Callable[..., Any])


class CustomFunction(Protocol[Arguments, Result_co]):
    """A function with a custom gradient."""

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result_co: ...

    def vjp(self, function: Gradient) -> Gradient:
        """Decorate the backward pass: `function(primals, cotangents, outputs)` returns the gradients of the primals."""
        ...


def custom_function(function: Callable[Arguments, Result_co]) -> CustomFunction[Arguments, Result_co]:
    """Decorate the forward pass of a function with a custom gradient, like `mx.custom_function`."""
    return cast(CustomFunction[Arguments, Result_co], mx.custom_function(function))


def flatten(tree: Any) -> list[tuple[str, mx.array]]:
    """Return the arrays of a tree with their paths, like `mlx.utils.tree_flatten`."""
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))


def to_int(x: mx.array) -> int:
    """Evaluate an integer scalar and return it."""
    return cast(int, x.item())


def to_ints(x: mx.array) -> list[int]:
    """Evaluate an integer vector and return it as a list."""
    return cast(list[int], x.tolist())


def to_float(x: mx.array) -> float:
    """Evaluate a floating-point scalar and return it."""
    return cast(float, x.item())
