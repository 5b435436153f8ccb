"""Numbers with units, tables and plurals for pages."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from moezoo.core.errors import SpecError

if TYPE_CHECKING:
    from rich.table import Table

_BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS = _BINARY | {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def memory_bytes(text: str, option: str = "--memory") -> int:
    """Parse a memory size such as `80GiB`, the value of an option. Raises SpecError: not a number with a unit."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]i?B)", text)
    if found is None or found[2] not in _UNITS:
        raise SpecError(f"{option} is {text!r}; expected a number and a unit, one of {', '.join(_UNITS)}, e.g. 80GiB.")
    return int(float(found[1]) * _UNITS[found[2]])


def count(number: float, unit: str = "") -> str:
    """Format with three significant digits: `1.23 M`, `12.3 GFLOPs`, `512`; billions are B without a unit, else G."""
    value, prefixes = float(number), ["", "k", "M", "G" if unit else "B", "T", "P", "E", "Z"]
    return _scaled(value, 1000.0, prefixes, unit)


def bytes_text(number: float) -> str:
    """Format with three significant digits in binary units: `1.50 MiB`."""
    return _scaled(float(number), 1024.0, ["", "Ki", "Mi", "Gi", "Ti", "Pi"], "B")


def _scaled(value: float, base: float, prefixes: list[str], unit: str) -> str:
    place = 0
    # 999.5 would round to 1000 of the smaller prefix
    while value >= (999.5 if base == 1000 else base) and place + 1 < len(prefixes):
        value, place = value / base, place + 1
    digits = 0 if place == 0 else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {prefixes[place]}{unit}".rstrip()


def new_table(first: str, *others: str, right: Iterable[int] = ()) -> "Table":
    """Return an empty table in the style of all pages; columns at the indices `right` are right-aligned numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column(first)
    numbers = set(right)
    for index, name in enumerate(others, start=1):
        table.add_column(name, justify="right" if index in numbers else "left", no_wrap=index in numbers)
    return table
