"""The language of the name tables: which tensor of theirs holds which parameters of ours, and how its axes stand.

Axes are letters; their sizes come from our parameter table, so a rule has no numbers:

    Tensor("model.layers.{layer}.self_attn.q_proj.weight", "(n h) d", "layers.{layer}.attention.w_query", "d n h")

is a transpose and a split of the first axis. `{expert}` in their name: one tensor an expert, stacked on our axis `e`.
In a tensor that holds several parameters, the axis `x` is the concatenation of what each of them takes of it:

    Fused("model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight", "x d", (
        Part("layers.{layer}.attention.w_latent", "z", "d z"),
        Part("layers.{layer}.attention.w_rope_key", "o", "d o"),
    ))

Where a layer of theirs is two of ours, ours are `{even}` and `{odd}` (2 i and 2 i + 1).
A part that takes "" has one place of it: `(f x)` with two such parts is gate and up interleaved. Every rule reads in
both directions and moves bits, never changes them.
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

CUT = "x"  # the axis along which the parts of a fused tensor stand
EXPERT = "e"


@dataclass(frozen=True)
class Part:
    """One of our parameters inside a tensor of theirs: what it takes of axis `x`, and how its own axes stand."""

    ours: str
    takes: str
    axes: str


@dataclass(frozen=True)
class Fused:
    """A tensor of theirs that holds several parameters of ours, or one.

    Fields:
        theirs: its name, with `{layer}` and `{expert}`.
        axes: how its axes are made, outer to inner: `(n h) d`.
        parts: the parameters, in the order in which they stand along axis `x`.
        sizes: parameters of ours that only tell sizes of axes, (name, axes); the rule is for layers that have them.
        copy: a second copy of what another tensor holds (the head of a tied model); it must be equal.
    """

    theirs: str
    axes: str
    parts: tuple[Part, ...]
    sizes: tuple[tuple[str, str], ...] = ()
    copy: bool = False

    @property
    def per_expert(self) -> bool:
        """Whether there is one such tensor for each expert."""
        return "{expert}" in self.theirs


def Tensor(
    theirs: str, axes: str, ours: str, our_axes: str, *, sizes: tuple[tuple[str, str], ...] = (), copy: bool = False
) -> Fused:
    """The rule of a tensor that holds one parameter."""
    return Fused(theirs, axes, (Part(ours, "", our_axes),), sizes, copy)


def beside(ours: str, axes: str, rules: Iterable[Fused]) -> tuple[Fused, ...]:
    """The rules, for those layers alone that have this parameter: where two kinds of layer share a name of ours."""
    return tuple(replace(rule, sizes=(*rule.sizes, (ours, axes))) for rule in rules)


@dataclass(frozen=True)
class Placed:
    """A rule with layer and expert filled in, and with the sizes of its axes: one tensor of theirs.

    `parts`: (canonical name, expert or None, part) of each.
    """

    rule: Fused
    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int | None, Part], ...]
    _sizes: Mapping[str, int]

    @property
    def ours(self) -> tuple[str, ...]:
        """The parameters' canonical names."""
        return tuple(name for name, _, _ in self.parts)

    @property
    def expert_count(self) -> int:
        """How many experts the parameters are stacked of."""
        return self._sizes[EXPERT]

    def expert_axis(self, place: int) -> int:
        """Along which axis of the parameter its experts are stacked."""
        return _groups(self.parts[place][2].axes).index((EXPERT,))

    def leading(self, place: int) -> tuple[str, int, int] | None:
        """By what their tensor can be read in pieces: the outermost letter of its first axis, how many rows one of it
        takes, and which of the part's axes it is; None where it is no axis of its own there."""
        letter, *inner = _groups(self.rule.axes)[0]
        ours = self._our_groups(place)
        if (letter,) not in ours or any(letter in part.takes.split() for _, _, part in self.parts):
            return None
        return letter, self._size(inner), ours.index((letter,))

    def resized(self, letter: str, size: int) -> "Placed":
        """The same rule for a piece with `size` of a letter."""
        return replace(self, _sizes={**self._sizes, letter: size})

    def holds(self, array: Array, place: int) -> Array:
        """The `place`-th part inside their tensor (a view where the axes allow), in our axes' order and shape."""
        view = self._view(array, place)
        return view.reshape([self._size(group) for group in self._our_groups(place)])

    def put(self, array: Array, place: int, value: Array) -> None:
        """Write a parameter (of one expert, where there is one tensor an expert) into their tensor."""
        view = self._view(array, place)
        assert np.shares_memory(view, array) or array.size == 0
        view[...] = value.reshape(view.shape)

    def _our_groups(self, place: int) -> Groups:
        groups = _groups(self.parts[place][2].axes)
        return tuple(group for group in groups if group != (EXPERT,)) if self.rule.per_expert else groups

    def _size(self, group: Iterable[str]) -> int:
        return math.prod(self._sizes[letter] for letter in group)

    def _view(self, array: Array, place: int) -> Array:
        """Their tensor seen with one axis for each letter of the part, in our order."""
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
        singles = tuple(place for place, letter in enumerate(letters) if letter == "1")
        view = view.squeeze(singles) if singles else view
        letters = [letter for letter in letters if letter != "1"]
        assert sorted(order) == sorted(letters), (self.rule, order, letters)
        return view.transpose([letters.index(letter) for letter in order])


def places(rule: Fused, shapes: Shapes, num_layers: int) -> Iterator[Placed]:
    """Every tensor of theirs that a rule stands for in a model with these parameters.

    A rule stands for nothing in a layer that lacks its first parameter (a dense layer has no experts), or one that
    tells sizes.
    """
    for layer in range(num_layers) if "{layer}" in rule.theirs else (None,):
        names = [_in_layer(part.ours, layer) for part in rule.parts]
        told = [_in_layer(name, layer) for name, _ in rule.sizes]
        if any(name not in shapes for name in (names[0], *told)):
            continue
        sizes = _sizes(rule, names, shapes, layer)
        groups = _groups(rule.axes)
        shape = tuple(math.prod(sizes[letter] for letter in group) for group in groups)
        for expert in range(sizes[EXPERT]) if rule.per_expert else (None,):
            parts = tuple((name, expert, part) for name, part in zip(names, rule.parts, strict=True))
            yield Placed(rule, rule.theirs.format(layer=layer, expert=expert), shape, parts, sizes)


def _in_layer(ours: str, layer: int | None) -> str:
    """A name of ours for a layer of theirs."""
    return ours if layer is None else ours.format(layer=layer, even=2 * layer, odd=2 * layer + 1)


def _sizes(rule: Fused, names: list[str], shapes: Shapes, layer: int | None) -> dict[str, int]:
    """The size of each axis, from the shapes of our parameters."""
    known = {"1": 1}
    given = [(shapes[name], part.axes) for name, part in zip(names, rule.parts, strict=True)]
    given += [(shapes[_in_layer(name, layer)], axes) for name, axes in rule.sizes]
    for _ in range(2):  # a composed axis may need letters that a later parameter tells
        for shape, axes in given:
            groups = _groups(axes)
            assert len(groups) == len(shape), (rule, shape, axes)
            for group, size in zip(groups, shape, strict=True):
                unknown = [letter for letter in group if letter not in known]
                rest = math.prod(known[letter] for letter in group if letter in known)
                if len(unknown) == 1:
                    known[unknown[0]] = size // rest
                assert len(unknown) > 1 or math.prod(known[letter] for letter in group) == size, (rule, shape, axes)
    known[CUT] = sum(math.prod(known[letter] for letter in part.takes.split()) for part in rule.parts)
    return known


def _groups(axes: str) -> Groups:
    """`(n h) d` -> (("n", "h"), ("d",))."""
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
