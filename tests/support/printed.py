"""What the README and the guides print to be run or written: commands, Python, and files by name."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from moezoo.core.files import PACKAGE

ROOT = PACKAGE.parent
README = ROOT / "README.md"
GUIDES = sorted(path for path in (ROOT / "writings" / "guides").glob("*.md") if path.name != "README.md")

PLACEHOLDERS = {  # of the README, which does not name a checkpoint
    "org/model": "model",
    "path/to/model": "model",
    "HF_DIR": "model",
    '"RUN"': '"converted"',
    " OUT ": " converted ",
    '"OUT"': '"written"',
}
_FENCED = re.compile(r'^```(\w*)(?: title="([^"\n]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)
_COMMAND = re.compile(r"(?:^|\s)moezoo ")
_ENDS_COMMAND = {"|", "||", "&&", ";", ">"}


@dataclass(frozen=True)
class Block:
    """A fenced block: `console` is run by a shell, `python` by Python, and one with a title is a file of that name."""

    language: str
    title: str | None
    text: str

    @property
    def elsewhere(self) -> bool:
        """Return whether it needs what no test has: a network, other machines, a checkout."""
        return self.text.startswith("# needs ")


def blocks(page: Path) -> list[Block]:
    """Return what a page prints to be run or written, in order, with the README's placeholders filled."""
    text = page.read_text(encoding="utf-8")
    found = [Block(language or "console", title or None, body) for language, title, body in _FENCED.findall(text)]
    if page == README:
        found = [Block(block.language, block.title, _filled(block.text)) for block in found]
    return [block for block in found if block.title or block.language in ("console", "python")]


def commands(block: Block) -> list[list[str]]:
    """Return the words after `moezoo` of each command of a block that is one of ours."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "console" and _COMMAND.search(line):
            words = shlex.split(line, comments=True)
            words = words[words.index("moezoo") + 1 :]
            end = next((place for place, word in enumerate(words) if word in _ENDS_COMMAND), len(words))
            found.append(words[:end])
    return found


def _filled(text: str) -> str:
    for placeholder, value in PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    return text
