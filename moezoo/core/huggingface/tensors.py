"""Rules of the tensor mapping: which checkpoint tensor contains which of our parameters, and in which axis order.

Names in a checkpoint are `theirs`, canonical names in moezoo are `ours`. Axes are letters; their sizes come from our
parameter table, so a rule has no numbers:

    Tensor("model.layers.{layer}.self_attn.q_proj.weight", "(n h) d", "layers.{layer}.attention.w_query", "d n h")

is a transpose and a split of the first axis. `{expert}` in their name: one tensor per expert, stacked on our axis `e`.
In a tensor that contains several parameters, axis `x` is their concatenation, each taking its part of it:

    Fused("model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight", "x d", (
        Part("layers.{layer}.attention.w_latent", "z", "d z"),
        Part("layers.{layer}.attention.w_rope_key", "o", "d o"),
    ))

If one of their layers is two of ours, ours are `{even}` and `{odd}` (2 i and 2 i + 1); `{next}` is i + 1.
A part that takes "" takes a single index of `x`: `(f x)` with two such parts is gate and up interleaved. Every rule
works in both directions and only moves bits, never changes values.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]
Groups = tuple[tuple[str, ...], ...]

CUT = "x"  # the axis along which the parts of a fused tensor are concatenated
EXPERT = "e"


@dataclass(frozen=True)
class Part:
    """One of our parameters inside a checkpoint tensor: the letters it takes of axis `x`, and its own axes."""

    ours: str
    takes: str
    axes: str


@dataclass(frozen=True)
class Fused:
    """Rule for a checkpoint tensor that contains one or several of our parameters.

    Fields:
        theirs: its name, with `{layer}` and `{expert}`.
        axes: its axes, composed ones outer to inner: `(n h) d`.
        parts: the parameters, in the order of their concatenation along axis `x`.
        sizes: parameters of ours that only determine axis sizes, (name, axes); the rule applies to layers with them.
        copy: a duplicate of another tensor (the head of a tied model); it must be equal.
        unless: a parameter of ours; the rule does not apply to layers with it.
        kept: indices of axis `x` after those of the parts, which are kept verbatim (those of experts for images).
    """

    theirs: str
    axes: str
    parts: tuple[Part, ...]
    sizes: tuple[tuple[str, str], ...] = ()
    copy: bool = False
    unless: str | None = None
    kept: int = 0

    @property
    def per_expert(self) -> bool:
        """True if there is one such tensor per expert."""
        return "{expert}" in self.theirs


def Tensor(
    theirs: str, axes: str, ours: str, our_axes: str, *, sizes: tuple[tuple[str, str], ...] = (), copy: bool = False
) -> Fused:
    """Return the rule for a tensor that contains one parameter."""
    return Fused(theirs, axes, (Part(ours, "", our_axes),), sizes, copy)


def beside(ours: str, axes: str, rules: Iterable[Fused]) -> tuple[Fused, ...]:
    """Restrict rules to layers that have this parameter, where two kinds of layer share a name of ours."""
    return tuple(replace(rule, sizes=(*rule.sizes, (ours, axes))) for rule in rules)


@dataclass(frozen=True)
class Placed:
    """A rule applied to one layer and expert: one checkpoint tensor, with its name, shape and axis sizes.

    `parts`: (canonical name, expert or None, part) of each parameter.
    """

    rule: Fused
    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int | None, Part], ...]
    _sizes: Mapping[str, int]

    @property
    def ours(self) -> tuple[str, ...]:
        """Canonical names of the parameters."""
        return tuple(name for name, _, _ in self.parts)

    @property
    def expert_count(self) -> int:
        """Number of experts stacked in the parameters."""
        return self._sizes[EXPERT]

    def expert_axis(self, place: int) -> int:
        """Return the axis of the parameter along which experts are stacked."""
        return _groups(self.parts[place][2].axes).index((EXPERT,))

    def leading(self, place: int) -> tuple[str, int, int] | None:
        """Return how the checkpoint tensor can be read in row pieces: the outermost letter of its first axis, the rows
        per index of that letter, and the index of the part's axis; None if the letter is not a separate axis there."""
        letter, *inner = _groups(self.rule.axes)[0]
        ours = self._our_groups(place)
        if (letter,) not in ours or any(letter in part.takes.split() for _, _, part in self.parts):
            return None
        return letter, self._size(inner), ours.index((letter,))

    def resized(self, letter: str, size: int) -> "Placed":
        """Return the same rule for a piece of `size` along an axis letter."""
        return replace(self, _sizes={**self._sizes, letter: size})

    def letters(self, place: int | None) -> Groups:
        """Return the letters of each axis: of a part as our parameter has them, experts included; None: the tensor."""
        return _groups(self.rule.axes if place is None else self.parts[place][2].axes)

    def lengths(self, letters: Iterable[str]) -> tuple[int, ...]:
        """Return the length of each letter."""
        return tuple(self._sizes[letter] for letter in letters)

    def with_lengths(self, lengths: Mapping[str, int]) -> "Placed":
        """Return the same rule with other lengths of some letters, none of which is part of axis `x`."""
        changed = replace(self, _sizes={**self._sizes, **lengths})
        return replace(changed, shape=tuple(changed._size(group) for group in _groups(self.rule.axes)))

    def packed(self, place: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return which axes of the parameter are axes of codes packed along the tensor's last axis, and which ones a
        row of them runs over, both in the codes' order; None if a row has several parts or only part of an axis."""
        *rows, row = _groups(self.rule.axes)
        part = self.parts[place][2]
        if not rows or CUT in row:
            return None
        stored = [letter for group in rows for letter in group]
        if CUT in stored:
            axis = stored.index(CUT)
            stored[axis : axis + 1] = part.takes.split()
        stored += row
        groups = _groups(part.axes)
        if any(0 < len(set(group) & set(row)) < len(group) for group in groups):
            return None
        # One tensor per expert: they are stacked outside of everything else.
        order = sorted(range(len(groups)), key=lambda a: -1 if groups[a] == (EXPERT,) else stored.index(groups[a][0]))
        letters = [letter for axis in order for letter in groups[axis] if letter in row]
        inner = tuple(axis for axis in order if groups[axis][0] in row)
        return None if letters != [*row] else (tuple(axis for axis in order if axis not in inner), inner)

    def in_words(self, place: int, words: int) -> "Placed":
        """Return the rule for codes or scales with `words` numbers per row, which puts the part in the codes' order:
        axes that are not packed, then the packed ones, of sizes `words`, 1, ..., 1."""
        axes, row = self.packed(place), _groups(self.rule.axes)[-1]
        assert axes is not None
        name, expert, part = self.parts[place]
        groups = _groups(part.axes)
        moved = " ".join(f"({' '.join(groups[axis])})" for axis in (*axes[0], *axes[1]))
        parts = (*self.parts[:place], (name, expert, replace(part, axes=moved)), *self.parts[place + 1 :])
        sizes = {**self._sizes, **dict.fromkeys(row, 1), row[0]: words}
        return replace(self, shape=(*self.shape[:-1], words), parts=parts, _sizes=sizes)

    def holds(self, array: Array, place: int) -> Array:
        """Return the `place`-th part of a checkpoint tensor in our axis order and shape, as a view if possible."""
        view = self._view(array, place)
        return view.reshape([self._size(group) for group in self._our_groups(place)])

    def put(self, array: Array, place: int, value: Array) -> None:
        """Write a parameter (of one expert, if there is one tensor per expert) into a checkpoint tensor."""
        view = self._view(array, place)
        assert np.shares_memory(view, array) or array.size == 0
        view[...] = value.reshape(view.shape)

    def _our_groups(self, place: int) -> Groups:
        groups = _groups(self.parts[place][2].axes)
        return tuple(group for group in groups if group != (EXPERT,)) if self.rule.per_expert else groups

    def _size(self, group: Iterable[str]) -> int:
        return math.prod(self._sizes[letter] for letter in group)

    def _view(self, array: Array, place: int) -> Array:
        """Return a view of the checkpoint tensor with one axis per letter of the part, in our order."""
        letters = [letter for group in _groups(self.rule.axes) for letter in group]
        view = array.reshape([self._sizes[letter] for letter in letters])
        if CUT in letters:
            axis = letters.index(CUT)
            taken = [tuple(other.takes.split()) for _, _, other in self.parts]
            start = sum(self._size(letters_of) for letters_of in taken[:place])
            inner = taken[place]
            window = view[(slice(None),) * axis + (slice(start, start + self._size(inner)),)]
            shape = (*view.shape[:axis], *(self._sizes[letter] for letter in inner), *view.shape[axis + 1 :])
            view = window.reshape(shape)
            letters[axis : axis + 1] = inner
        order = [letter for group in self._our_groups(place) for letter in group]
        singles = tuple(axis for axis, letter in enumerate(letters) if letter == "1")
        view = view.squeeze(singles) if singles else view
        letters = [letter for letter in letters if letter != "1"]
        assert sorted(order) == sorted(letters), (self.rule, order, letters)
        return view.transpose([letters.index(letter) for letter in order])


def places(rule: Fused, shapes: Shapes, num_layers: int) -> Iterator[Placed]:
    """Yield every checkpoint tensor that a rule matches in a model with these parameters.

    A rule matches nothing in a layer without its first parameter (a dense layer has no experts) or without one of the
    parameters in `sizes`, nor where its first parameter has another number of axes (a gate per head, or per feature).
    """
    for layer in range(num_layers) if "{layer}" in rule.theirs else (None,):
        names = [_in_layer(part.ours, layer) for part in rule.parts]
        required = [names[0], *(_in_layer(name, layer) for name, _ in rule.sizes)]
        if any(name not in shapes for name in required):
            continue
        if rule.unless is not None and _in_layer(rule.unless, layer) in shapes:
            continue
        if len(shapes[names[0]]) != len(_groups(rule.parts[0].axes)):
            continue
        sizes = _sizes(rule, names, shapes, layer)
        groups = _groups(rule.axes)
        shape = tuple(math.prod(sizes[letter] for letter in group) for group in groups)
        for expert in range(sizes[EXPERT]) if rule.per_expert else (None,):
            parts = tuple((name, expert, part) for name, part in zip(names, rule.parts, strict=True))
            yield Placed(rule, rule.theirs.format(layer=layer, expert=expert), shape, parts, sizes)


def _in_layer(ours: str, layer: int | None) -> str:
    """Return our parameter name for their layer index."""
    return ours if layer is None else ours.format(layer=layer, even=2 * layer, odd=2 * layer + 1, next=layer + 1)


def _sizes(rule: Fused, names: list[str], shapes: Shapes, layer: int | None) -> dict[str, int]:
    """Return the size of each axis, from the shapes of our parameters."""
    known = {"1": 1}
    known_shapes = [(shapes[name], part.axes) for name, part in zip(names, rule.parts, strict=True)]
    known_shapes += [(shapes[_in_layer(name, layer)], axes) for name, axes in rule.sizes]
    for _ in range(2):  # a composed axis may need letters whose size a later parameter determines
        for shape, axes in known_shapes:
            groups = _groups(axes)
            assert len(groups) == len(shape), (rule, shape, axes)
            for group, size in zip(groups, shape, strict=True):
                unknown = [letter for letter in group if letter not in known]
                rest = math.prod(known[letter] for letter in group if letter in known)
                if len(unknown) == 1:
                    known[unknown[0]] = size // rest
                assert len(unknown) > 1 or math.prod(known[letter] for letter in group) == size, (rule, shape, axes)
    known[CUT] = rule.kept + sum(math.prod(known[letter] for letter in part.takes.split()) for part in rule.parts)
    return known


def _groups(axes: str) -> Groups:
    """Parse `(n h) d` to (("n", "h"), ("d",))."""
    groups: list[tuple[str, ...]] = []
    for outside, inside in _tokens(axes):
        groups += [(letter,) for letter in outside.split()]
        if inside is not None:
            groups.append(tuple(inside.split()))
    return tuple(groups)


def _tokens(axes: str) -> Iterator[tuple[str, str | None]]:
    while axes:
        outside, opened, rest = axes.partition("(")
        inside, _, axes = rest.partition(")") if opened else ("", "", "")
        yield outside, inside if opened else None
