"""Experts by name, as a user writes them: `layers[3].experts[5,7]`."""

import re
from collections.abc import Sequence

from moezoo.core.errors import SpecError, shown
from moezoo.core.spec import ModelSpec

EVERY_EXPERT = "layers[*].experts[*]"

_FORM = re.compile(r"layers\[([^\[\]]*)\]\.experts\[([^\[\]]*)\]")
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")

Experts = dict[int, tuple[int, ...]]
"""Ascending ids of experts by index of their MoE layer, in the order of the layers."""


def parse_experts(spec: ModelSpec, names: str | Sequence[str]) -> Experts:
    """Return the experts that are named, of all names together.

    A name is `layers[...].experts[...]`, or several separated by `;`. In the brackets are numbers and ranges separated
    by commas (`0-3,7`), or `*` for all. Layers are numbered as in the config, counting each repetition; experts
    include those without computation, which come last, but not shared ones.

    Raises SpecError: another form, a layer without experts, or an expert that the layer does not have.
    """
    found: dict[int, set[int]] = {}
    texts = [names] if isinstance(names, str) else names
    for text in (part.strip() for joined in texts for part in joined.split(";")):
        match = _FORM.fullmatch(re.sub(r"\s+", "", text))
        if match is None:
            raise SpecError(f"{shown(text)} names no experts; expected a name such as layers[3].experts[5,7].")
        known = dict(spec.moes)
        for layer in _numbers(match[1], list(known), text):
            if layer not in known:
                layers = f"expected one of {_joined(list(known))}" if known else "the model has none"
                raise SpecError(f"layer {layer} has no experts; got {shown(text)}; {layers}.")
            ids = range(known[layer].num_choices)
            for expert in _numbers(match[2], ids, text):
                if expert not in ids:
                    raise SpecError(
                        f"layer {layer} has no expert {expert}; got {shown(text)}; expected one of {_joined(ids)}."
                    )
                found.setdefault(layer, set()).add(expert)
    return {layer: tuple(sorted(found[layer])) for layer in sorted(found)}


def name_experts(experts: Experts) -> str:
    """Return the name of experts, as `parse_experts` reads it; layers with equal ones together."""
    layers: dict[tuple[int, ...], list[int]] = {}
    for layer, ids in experts.items():
        layers.setdefault(ids, []).append(layer)
    return "; ".join(f"layers[{_joined(own)}].experts[{_joined(ids)}]" for ids, own in layers.items())


def _numbers(text: str, every: Sequence[int], name: str) -> Sequence[int]:
    """Return the numbers of a bracket."""
    if text == "*":
        return every
    numbers: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (-1, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
        if not 0 <= first <= last:
            raise SpecError(
                f"{shown(part)} is no number; got {shown(name)}; expected numbers or ranges such as 0-3,7, or *."
            )
        if last > 1 << 20:  # of experts there are at most so many, and a range must not fill the memory
            return [last]
        numbers += range(first, last + 1)
    return numbers


def _joined(ids: Sequence[int]) -> str:
    """Return ascending numbers with ranges: `0-3,7`."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
