"""Factors of an adapter in the axis order of a checkpoint's tensors, by the rules of the tensor mapping.

A stored matrix W has A [R, in] and B [out, R] beside it, and becomes W + scale B A: in the order of its own inputs and
outputs, with an axis for experts in front where they are stacked. Ours are in the order of our parameter: `NAME.lora_a`
[*stack, *in, r] and `NAME.lora_b` [*stack, r, *out]. A stored matrix that contains several of ours (gate and up) has
their A above each other and their B in blocks on the diagonal: R is the sum of their ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.huggingface.tensors import Placed
from moezoo.core.parameters import Parameter

Array = npt.NDArray[Any]

FACTORS = ("lora_a", "lora_b")


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A stored tensor that is a matrix, or experts' matrices stacked, with the rows of the parameters that it contains.

    Fields:
        name: of the tensor.
        placed: its rule.
        rows: of each part, in the rule's order.
        inputs: axis of the tensor that is its inputs.
    """

    name: str
    placed: Placed
    rows: tuple[Parameter, ...]
    inputs: int

    @property
    def module(self) -> str:
        """Path of the module that has the tensor as its weight; the tensor's own name if it is a plain parameter."""
        return self.name.removesuffix(".weight")

    @property
    def expert(self) -> int | None:
        """The expert whose matrix this is; None for one matrix, or all experts stacked."""
        return self.placed.parts[0][1]

    @property
    def is_stacked(self) -> bool:
        """True if all experts are in one tensor."""
        return len(self.placed.shape) == 3

    @property
    def sizes(self) -> tuple[tuple[int, ...], int, int]:
        """Shape of the stack, inputs and outputs."""
        shape = list(self.placed.shape)
        inputs = shape.pop(self.inputs)
        return tuple(shape[:-1]), inputs, shape[-1]

    def factors(self, weights: Mapping[str, Array]) -> tuple[Array, Array] | None:
        """Return A [*stack, R, in] and B [*stack, out, R] in float32; None if no part has factors in `weights`."""
        pieces = []
        for place, row in enumerate(self.rows):
            if f"{row.name}.lora_a" in weights:
                a, b = (self._own(weights[f"{row.name}.{factor}"]) for factor in FACTORS)
                pieces.append((self._stored_a(place, a), self._stored_b(place, b)))
        if not pieces:
            return None
        return np.concatenate([a for a, _ in pieces], axis=-2), np.concatenate([b for _, b in pieces], axis=-1)

    def parts(self, a: Array, b: Array) -> dict[str, tuple[Array, Array]]:
        """Return our factors, by the name of each part, from A [*stack, R, in] and B [*stack, out, R].

        A block of B that is zero outside of its part's outputs is taken alone, with its rows of A. Of one expert's
        matrix they lack the axis of experts.
        """
        count, rank = len(self.rows), a.shape[-2]
        blocks = [slice(None)] * count
        if count > 1 and rank % count == 0:
            each = [slice(place * rank // count, (place + 1) * rank // count) for place in range(count)]
            alone = [self._our_b(place, b) for place in range(count)]
            if all(_is_zero_outside(value, self._stack_axes, block) for value, block in zip(alone, each, strict=True)):
                blocks = each
        return {
            row.name: (
                self._our_a(place, a[..., block, :]),
                np.ascontiguousarray(self._our_b(place, b[..., block])),
            )
            for place, (row, block) in enumerate(zip(self.rows, blocks, strict=True))
        }

    @property
    def _stack_axes(self) -> int:
        return 1 if self.is_stacked else 0

    def _own(self, value: Array) -> Array:
        """Return the factor of this expert, or of all of them, as float32."""
        return np.asarray(value if self.expert is None else value[self.expert], np.float32)

    def _stored_a(self, place: int, a: Array) -> Array:
        stack, inputs, _ = self.sizes
        ours, theirs = self._input_letters(place)
        shape = self.placed.lengths(ours)
        order = [len(stack) + ours.index(letter) for letter in theirs]
        split = a.reshape(*stack, *shape, a.shape[-1])
        return split.transpose(*range(len(stack)), split.ndim - 1, *order).reshape(*stack, a.shape[-1], inputs)

    def _our_a(self, place: int, a: Array) -> Array:
        stack, row = a.shape[:-2], self.rows[place]
        assert row.matrix is not None
        ours, theirs = self._input_letters(place)
        split = a.reshape(*stack, a.shape[-2], *self.placed.lengths(theirs))
        order = [len(stack) + 1 + theirs.index(letter) for letter in ours]
        moved = split.transpose(*range(len(stack)), *order, len(stack))
        return np.ascontiguousarray(moved.reshape(*stack, *row.matrix.split(row.shape)[1], a.shape[-2]))

    def _stored_b(self, place: int, b: Array) -> Array:
        rank = b.shape[self._stack_axes]
        ranked = self._ranked(place, rank)
        stored = np.zeros(ranked.shape, np.float32)
        ranked.put(stored, place, b)
        return np.moveaxis(stored, self.inputs, -1)

    def _our_b(self, place: int, b: Array) -> Array:
        row, rank = self.rows[place], b.shape[-1]
        assert row.matrix is not None
        value = self._ranked(place, rank).holds(np.moveaxis(b, -1, self.inputs), place)
        return value.reshape(*b.shape[:-2], rank, *row.matrix.split(row.shape)[2])

    def _ranked(self, place: int, rank: int) -> Placed:
        """Return the rule of a tensor whose inputs are the numbers of a low rank."""
        first, *others = self._input_letters(place)[1]
        return self.placed.with_lengths({first: rank, **dict.fromkeys(others, 1)})

    def _input_letters(self, place: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the letters of the inputs in the order of our parameter, and in that of the tensor."""
        groups, matrix = self.placed.letters(place), self.rows[place].matrix
        assert matrix is not None
        ours = tuple(letter for group in matrix.split(groups)[1] for letter in group)
        return ours, self.placed.letters(None)[self.inputs]


def stored_matrix(name: str, placed: Placed, rows: Mapping[str, Parameter]) -> StoredMatrix | None:
    """Return a stored tensor as a matrix; None for a vector, or a matrix that has no inputs of its own in it.

    `rows`: the parameter table by name.
    """
    own = tuple(rows[ours] for ours in placed.ours)
    if any(row.matrix is None for row in own):
        return None
    groups = placed.letters(None)
    inputs: set[int] = set()
    for place, row in enumerate(own):
        assert row.matrix is not None
        letters = {letter for group in row.matrix.split(placed.letters(place))[1] for letter in group}
        inputs |= {axis for axis, group in enumerate(groups) if set(group) == letters}
    stacked = own[0].matrix is not None and own[0].matrix.batch > 0 and placed.parts[0][1] is None
    if len(inputs) != 1 or len(groups) != 2 + stacked or (stacked and groups[0] != ("e",)):
        return None
    return StoredMatrix(name, placed, own, inputs.pop())


def _is_zero_outside(b: Array, stack_axes: int, block: slice) -> bool:
    """Return whether our B [*stack, R, *out] is zero in the rows that are not of the block."""
    outside = np.ones(b.shape[stack_axes], bool)
    outside[block] = False
    return not np.any(np.compress(outside, b, axis=stack_axes))
