"""Low-rank adapters of matrices (LoRA): `x W` becomes `x W + scale (x A) B`."""

import functools
import zlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import autograd.numpy as np

from moezoo.core.random import ADAPTER_DROPOUT, Bits, fold_in, uniform
from moezoo.core.reference import Array, Parameters
from moezoo.core.spec import ModelSpec

_einsum = np.einsum  # its strings are made of those of the products with the whole matrix


@dataclass(frozen=True)
class AdaptedArray:
    """A matrix with an adapter, in place of the matrix.

    Fields:
        base: the matrix [*stack, *in, *out]; `stack` are axes of a stack of matrices (experts).
        lora_a: [*stack, *in, r].
        lora_b: [*stack, r, *out].
        scale: factor of the adapter's output.
        dropout: rate of dropout on the adapter's input.
        key: uint32 [2], of that dropout, or None.
    """

    base: Array
    lora_a: Array
    lora_b: Array
    scale: float
    dropout: float
    key: Bits | None

    def __getitem__(self, index: int) -> "AdaptedArray":
        """Return one matrix of a stack."""
        return replace(self, base=self.base[index], lora_a=self.lora_a[index], lora_b=self.lora_b[index])


def adapted(spec: ModelSpec, parameters: Parameters, key: Array | None) -> dict[str, Array]:
    """Return the parameters with an AdaptedArray in place of each matrix that has an adapter.

    `key`: of a training step, or None. A matrix's own key depends on its layer and on its name in it, so that no two
    have the same dropout; embedding and head count as a layer after the last one.
    """
    if spec.adapter is None:
        return dict(parameters)
    found = {}
    for name, value in parameters.items():
        if name.endswith((".lora_a", ".lora_b")):
            continue
        found[name] = value
        if f"{name}.lora_a" in parameters:
            of_layer, _, own = name.removeprefix("layers.").partition(".")
            index, own = (int(of_layer), own) if name.startswith("layers.") else (len(spec.all_layers), name)
            own_key = None if key is None else fold_in(key, index, ADAPTER_DROPOUT, number_of(own))
            factors = (parameters[f"{name}.lora_a"], parameters[f"{name}.lora_b"])
            found[name] = AdaptedArray(value, *factors, spec.adapter.scale, spec.adapter.dropout, own_key)
    return found


def number_of(name: str) -> int:
    """Return the number of a matrix among those of its layer, for its key: the CRC-32 of its name in the layer."""
    return zlib.crc32(name.encode())


def einsum(subscripts: str, x: Array, w: Array) -> Array:
    """Return `np.einsum(subscripts, x, w)`, a product of x with a matrix, or with a matrix and its adapter.

    `x W + scale (drop(x) A) B`, or, where x meets the outputs of W (a tied head, an absorbed matrix), `x W^T + scale
    (drop(x) B^T) A^T`. `drop` sets each element to zero with the adapter's rate and divides the others by 1 - rate.

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    Differs: `scale` is their alpha / r.
    """
    if not isinstance(w, AdaptedArray):
        return _einsum(subscripts, x, w)
    steps = steps_of(subscripts, w.lora_a.ndim + w.lora_b.ndim - 2 - w.base.ndim, w.lora_b.ndim)
    dropped = x
    if w.key is not None and w.dropout > 0:
        dropped = np.where(uniform(w.key, x.shape) >= np.float32(w.dropout), x / (1 - w.dropout), 0.0)
    first, second = (w.lora_a, w.lora_b) if steps.inputs_first else (w.lora_b, w.lora_a)
    low = _einsum(steps.first, dropped, first)
    return _einsum(subscripts, x, w.base) + w.scale * _einsum(steps.second, low, second)


class Steps(NamedTuple):
    """The two products of an adapter: their einsum strings, and True if that with A is the first."""

    first: str
    second: str
    inputs_first: bool


@functools.cache
def steps_of(subscripts: str, stack: int, lora_b_ndim: int) -> Steps:
    """Return the products that replace one with a matrix of `stack` stacked axes, where B has so many axes."""
    operands, _, out = subscripts.partition("->")
    of_x, of_w = operands.split(",")
    outputs = of_w[len(of_w) - (lora_b_ndim - stack - 1) :]
    inputs = of_w[stack : len(of_w) - len(outputs)]
    a, b = f"{of_w[:stack]}{inputs}r", f"{of_w[:stack]}r{outputs}"
    inputs_first = any(letter in of_x and letter not in out for letter in inputs)
    first, second = (a, b) if inputs_first else (b, a)
    low = "".join(letter for letter in of_x if letter not in first or letter in out) + "r"
    return Steps(f"{of_x},{first}->{low}", f"{low},{second}->{out}", inputs_first)


def take(w: Array, index: Array) -> Array:
    """Return the rows of an embedding with these indices: `W[index] + scale A[index] B`, without dropout."""
    if not isinstance(w, AdaptedArray):
        return w[index]
    return w.base[index] + w.scale * (w.lora_a[index] @ w.lora_b)


def merged(w: AdaptedArray) -> Array:
    """Return the matrix that has the adapter in it, `W + scale A B`."""
    stack = w.lora_a.ndim + w.lora_b.ndim - 2 - w.base.ndim
    axes = "abcdefgh"
    a, b = axes[: w.lora_a.ndim - 1], axes[:stack] + axes[w.lora_a.ndim - 1 : w.base.ndim]
    return w.base + w.scale * _einsum(f"{a}r,{b[:stack]}r{b[stack:]}->{axes[: w.base.ndim]}", w.lora_a, w.lora_b)
