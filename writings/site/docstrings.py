"""Extension of griffe: examples in docstrings become blocks of code, and `Fields:` the attributes that they are."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> (?:.*\n?)(?:\1(?!\s*$).*\n?)*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Return a docstring with examples in fences, `Fields:` as `Attributes:`, and no `<word>` that reads as HTML."""
    text = re.sub(r"^Fields:$", "Attributes:", text, flags=re.MULTILINE)
    pieces = re.split(r"(`[^`]*`|^ *>>> .*$)", text, flags=re.MULTILINE)
    text = "".join(piece if index % 2 else re.sub(r"<(?=[a-z/])", "&lt;", piece) for index, piece in enumerate(pieces))
    return EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0].rstrip()}\n{found[1]}```\n", text)
