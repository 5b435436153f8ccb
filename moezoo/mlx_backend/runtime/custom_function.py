"""`mx.custom_function` with types: MLX's own stub says that a call of one returns an object."""

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import mlx.core as mx

Arguments = ParamSpec("Arguments")
Result_co = TypeVar("Result_co", covariant=True)
Gradient = TypeVar("Gradient", bound=Callable[..., Any])


class CustomFunction(Protocol[Arguments, Result_co]):
    """A function whose gradient is written by hand."""

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result_co: ...

    def vjp(self, function: Gradient) -> Gradient:
        """Decorate the backward pass: `function(primals, cotangents, outputs)` returns the gradients of the primals."""
        ...


def custom_function(function: Callable[Arguments, Result_co]) -> CustomFunction[Arguments, Result_co]:
    """Decorate the forward pass of a function whose gradient is written by hand."""
    return cast(CustomFunction[Arguments, Result_co], mx.custom_function(function))
