"""Both backends behind one small surface, so that a test of a layer is written once."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import autograd
import numpy as np

from moezoo.backends import load_backend
from moezoo.core.backend import Backend
from tests.support.backends_available import require_backend
from tests.support.tolerances import (
    FINITE_DIFFERENCE,
    FLOAT32,
    FLOAT32_GRADIENT,
    Tolerance,
    assert_all_close,
    assert_close,
)

# Dimensions that differ from each other and divide nothing by chance, so that a swapped axis fails.
B, T, M, G, H, D, F, E, K, V = 3, 5, 2, 4, 6, 20, 28, 7, 2, 31
N, P = M * G, B * T


def normal(seed: int, *shape: int) -> np.ndarray:
    """Normal float64 values that float32 represents exactly, so that both precisions start from the same numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)


Gradients = tuple[Any, dict[str, Any], list[Any]]


class Twin:
    """One backend: its files by stem, and arrays in and out."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def module(self, stem: str) -> ModuleType:
        """`moezoo.<name>_backend.<stem>`."""
        return importlib.import_module(f"moezoo.{self.name}_backend.{stem}")

    def backend(self) -> Backend:
        """The backend, as `moezoo.backends` gives it."""
        return load_backend(self.name)

    def weights(self, values: Mapping[str, np.ndarray]) -> Any:
        """A layer's view of its parameters."""
        return self.module("arrays").Weights({name: np.asarray(value, np.float32) for name, value in values.items()})

    def array(self, values: Any, dtype: str | None = None) -> Any:
        """A device array: float32 or int32 (bool and uint32, a random key, as they are), or the dtype named."""
        values = np.asarray(values)
        if values.dtype not in (np.bool_, np.uint32):
            values = values.astype(np.float32 if values.dtype.kind == "f" else np.int32)
        array = self._namespace().array(values)
        return array if dtype is None else array.astype(getattr(self._namespace(), dtype))

    def numpy(self, array: Any) -> np.ndarray:
        """Back to NumPy: float64 from any float, int64 from any integer."""
        kind = "f" if "float" in str(array.dtype) else "i"
        array = array.astype(self._namespace().float32) if kind == "f" else array
        return np.array(array).astype(np.float64 if kind == "f" else np.int64)

    def value_and_gradients(
        self, call: Callable[..., Any], probe: np.ndarray, layer: Any, *arrays: Any
    ) -> tuple[Any, dict[str, np.ndarray], list[np.ndarray]]:
        """`out = call(layer, *arrays)`; gradients of `sum(out * probe)`: of parameters by name, and of arrays."""
        on_device = self.array(probe)

        def loss(layer: Any, *arrays: Any) -> tuple[Any, Any]:
            out = call(layer, *arrays)
            return (out * on_device).sum(), out

        differentiate = self._jax_gradients if self.name == "jax" else self._mlx_gradients
        out, named, of_arrays = differentiate(loss, layer, arrays)
        return (
            out,
            {name: self.numpy(value) for name, value in named.items()},
            [self.numpy(value) for value in of_arrays],
        )

    def compiled(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        """The layer's call as JAX compiles it: one program for each shape, in place of one for each operation.

        Layers of one spec share their programs, also those of other tests (but see `forget_programs`).
        """
        if self.name != "jax":
            return layer
        from flax import nnx

        graph, state = nnx.split(layer)
        return lambda *arrays, **named: _layer_call()(graph, state, *arrays, **named)

    def compiled_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as JAX compiles it, of arrays alone."""
        if self.name != "jax":
            return function
        import jax

        return jax.jit(function)

    def _namespace(self) -> ModuleType:
        if self.name == "jax":
            import jax.numpy as namespace
        else:
            import mlx.core as namespace
        return namespace

    @staticmethod
    def _jax_gradients(
        loss: Callable[..., Any], layer: Any, arrays: Sequence[Any]
    ) -> tuple[Any, dict[str, Any], list[Any]]:
        import jax
        from flax import nnx

        graph, state, untrained = nnx.split(layer, nnx.Param, ...) if layer is not None else (None, {}, {})

        @jax.jit  # one compilation, in place of one for each operation
        def both(state: Any, arrays: list[Any]) -> Any:
            def of_both(state: Any, arrays: list[Any]) -> Any:
                return loss(None if graph is None else nnx.merge(graph, state, untrained), *arrays)

            return jax.value_and_grad(of_both, argnums=(0, 1), has_aux=True)(state, arrays)

        (_, out), (of_state, of_arrays) = both(state, list(arrays))
        leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(of_state) if graph is not None else {})
        return out, {".".join(str(key.key) for key in path): value for path, value in leaves}, of_arrays

    @staticmethod
    def _mlx_gradients(
        loss: Callable[..., Any], layer: Any, arrays: Sequence[Any]
    ) -> tuple[Any, dict[str, Any], list[Any]]:
        import mlx.core as mx
        from mlx.utils import tree_flatten

        before = {} if layer is None else layer.trainable_parameters()

        def of_both(both: tuple[Any, list[Any]]) -> Any:
            if layer is not None:
                layer.update(both[0])
            return loss(layer, *both[1])

        (_, out), (of_layer, of_arrays) = mx.value_and_grad(of_both)((before, list(arrays)))
        if layer is not None:
            layer.update(before)
        return out, dict(tree_flatten(of_layer)), of_arrays


def beside() -> Twin:
    """MLX, beside which JAX need not compile a second program."""
    require_backend("mlx")
    return Twin("mlx")


@cache
def _layer_call() -> Any:
    """Call the layer of a graph and a state, compiled for each graph."""
    import jax
    from flax import nnx

    return jax.jit(lambda graph, state, *arrays, **named: nnx.merge(graph, state)(*arrays, **named), static_argnums=0)


def forget_programs() -> None:
    """Compile layers anew: what they call is not what it was."""
    _layer_call.cache_clear()


def reference_gradients(
    loss: Callable[..., Any], values: Mapping[str, np.ndarray], *arrays: np.ndarray
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Gradients of `loss(values, *arrays)` in float64: of values by name, and of arrays."""
    named = autograd.grad(loss, 0)(dict(values), *arrays) if values else {}
    return named, [autograd.grad(loss, place + 1)(dict(values), *arrays) for place in range(len(arrays))]


def directional_difference(
    loss: Callable[[np.ndarray], float], x: np.ndarray, direction: np.ndarray, step: float = 1e-5
) -> float:
    """Derivative of a scalar function along a direction by a central difference, in float64."""
    return (float(loss(x + step * direction)) - float(loss(x - step * direction))) / (2 * step)


# --- the comparisons that every layer's test makes -------------------------------------------------------------------


def assert_layer_matches(
    twin: Twin,
    layer: Any,
    call: Callable[..., Any],
    reference: Callable[..., Any],
    values: Mapping[str, np.ndarray],
    *arrays: np.ndarray,
    dtype: str | None = None,
    tolerance: Tolerance = FLOAT32,
    gradient_tolerance: Tolerance = FLOAT32_GRADIENT,
) -> None:
    """`call(layer, *arrays)` equals `reference(values, *arrays)`, and so do all gradients of `sum(out * random)`."""
    expected = reference(values, *arrays)
    probe = normal(99, *np.shape(expected))
    on_device = [twin.array(array, dtype) for array in arrays]
    actual, named, of_arrays = twin.value_and_gradients(call, probe, layer, *on_device)
    assert dtype is None or dtype in str(actual.dtype)
    assert_close(twin.numpy(actual), expected, tolerance)
    expected_named, expected_of_arrays = reference_gradients(
        lambda values, *arrays: (reference(values, *arrays) * probe).sum(), values, *arrays
    )
    expected_named |= {f"argument {place}": value for place, value in enumerate(expected_of_arrays)}
    named |= {f"argument {place}": value for place, value in enumerate(of_arrays)}
    assert_all_close(named, expected_named, gradient_tolerance)


def assert_function_matches(
    twin: Twin,
    function: Callable[..., Any],
    reference: Callable[..., Any],
    *arrays: np.ndarray,
    dtype: str | None = None,
    tolerance: Tolerance = FLOAT32,
    gradient_tolerance: Tolerance = FLOAT32_GRADIENT,
) -> None:
    """`assert_layer_matches` for a function without parameters."""
    assert_layer_matches(
        twin,
        None,
        lambda _, *arrays: function(*arrays),
        lambda _, *arrays: reference(*arrays),
        {},
        *arrays,
        dtype=dtype,
        tolerance=tolerance,
        gradient_tolerance=gradient_tolerance,
    )


DIRECTIONS = 8


def assert_reference_gradient(reference: Callable[..., Any], *arrays: np.ndarray) -> None:
    """The reference's own gradients, of a random weighting of its result, agree with finite differences.

    Along random directions of length 1, two evaluations each, in place of two for each entry: every direction has every
    entry, and one that is wrong by 1e-4 of the largest fails.
    """
    probe = normal(99, *np.shape(reference(*arrays)))
    for place, array in enumerate(arrays):

        def loss(moved: Any, place: int = place) -> Any:
            return (reference(*arrays[:place], moved, *arrays[place + 1 :]) * probe).sum()

        gradient = autograd.grad(loss)(array)
        assert gradient.shape == array.shape
        along = normal(98, DIRECTIONS, *array.shape)
        along /= np.sqrt(np.sum(along**2, axis=tuple(range(1, along.ndim)), keepdims=True))
        assert_close(
            np.sum(gradient * along, axis=tuple(range(1, along.ndim))),
            np.array([directional_difference(loss, array, direction) for direction in along]),
            FINITE_DIFFERENCE,
            f"gradient of argument {place}",
        )
