"""The commands that the README prints, with its placeholders replaced."""

import re
from pathlib import Path

from moezoo.core.files import PACKAGE

ROOT = PACKAGE.parent
PLACEHOLDERS = {
    "org/model": "model",
    "path/to/model": "model",
    "some.txt": "some.txt",
    "HF_DIR": "model",
    '"RUN"': '"converted"',
    " OUT ": " converted ",
    '"OUT"': '"written"',
}


def blocks(document: Path = ROOT / "README.md") -> list[str]:
    """Return the blocks of commands of a page, in order; `make` is left out, which sets up its own environment."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in found if language in ("", "console")]
    return [_filled(block) for block in blocks if not block.startswith("make ")]


def commands(block: str) -> list[list[str]]:
    """Return the words of each `moezoo` line of a block."""
    import shlex

    lines = [line for line in block.splitlines() if line.startswith("moezoo ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def _filled(block: str) -> str:
    for placeholder, value in PLACEHOLDERS.items():
        block = block.replace(placeholder, value)
    return block
