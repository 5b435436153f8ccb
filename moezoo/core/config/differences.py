"""Fields in which configs differ."""

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import yaml

MISSING = "(none)"
"""Value of a field that a config does not have, because its part is of another kind."""

Difference = tuple[str, tuple[Any, ...]]
"""Path of a field, and its value in each config."""

_FIRST_INDEX = re.compile(r"\[(\d+)\]")


def differing_fields(dumps: Sequence[Any], path: str = "") -> Iterator[Difference]:
    """Yield each field in which dumped configs (`model_dump(mode="json")`) differ, in their order; `kind` comes first.

    Parts are compared field by field, also those of different kinds; so are lists of parts.
    """
    if all(dump == dumps[0] for dump in dumps):
        return
    if all(isinstance(dump, dict) for dump in dumps):
        names = dict.fromkeys(name for dump in dumps for name in dump)
        for name in sorted(names, key=lambda name: name != "kind"):
            values = [dump.get(name, MISSING) for dump in dumps]
            yield from differing_fields(values, f"{path}.{name}" if path else name)
    elif all(isinstance(dump, list) and all(isinstance(item, dict) for item in dump) for dump in dumps):
        for index, items in enumerate(zip_longest(*dumps, fillvalue=MISSING)):
            yield from differing_fields(items, f"{path}[{index}]")
    else:
        yield path, tuple(dumps)


def merged_over_layers(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences, those equal in several layers as one: `model.layers[0,2].moe.num_experts`."""
    merged: dict[tuple[str, str], tuple[list[str], Difference]] = {}
    for path, values in differences:
        index = _FIRST_INDEX.search(path)
        key = (_FIRST_INDEX.sub("[]", path, count=1), repr(values))
        indices, _ = merged.setdefault(key, ([], (path, values)))
        indices += [index[1]] if index else []
    return [
        (_FIRST_INDEX.sub(f"[{','.join(indices)}]", path, count=1), values)
        for indices, (path, values) in merged.values()
    ]


def value_text(value: Any, limit: int = 60) -> str:
    """Return a value as a config has it, in one line of at most `limit` characters."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    text = text.removesuffix("...\n").strip()
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
