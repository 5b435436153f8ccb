"""Links to lines of code: [`name`](../moezoo/core/reference/losses.py#L45) leads to where `name` is defined.

`make links` runs this file, which rewrites the numbers; a test checks them. A name is that of a function, class,
method, field or constant of the linked file. `Router.__call__` says whose; a name alone is looked for at the top level
and may stand deeper only once. `#L` without a number is a link still to be numbered.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[`([^`\n]+)`\]\(([^)\s#]+\.py)#L(\d*)\)")


def documents() -> list[Path]:
    pages = sorted((ROOT / "writings").rglob("*.md"))
    return [*pages, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "datasets" / "README.md"]


@cache
def definitions(path: Path) -> dict[str, list[int]]:
    """Line numbers of what a file defines, by dotted name: `dispatch`, `MoE.__call__`, `RouterSpec.score`.

    A variable inside a function is none.
    """
    found: dict[str, list[int]] = {}

    def visit(node: ast.AST, prefix: str, in_function: bool) -> None:
        for child in ast.iter_child_nodes(node):
            match child:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    found.setdefault(prefix + name, []).append(child.lineno)
                    visit(child, f"{prefix}{name}.", isinstance(child, ast.FunctionDef))
                case ast.Assign() | ast.AnnAssign() if not in_function:
                    targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                    for name in (
                        part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)
                    ):
                        found.setdefault(prefix + name, []).append(child.lineno)
                case _:
                    visit(child, prefix, in_function)

    visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), "", False)
    return found


def line_of(path: Path, name: str) -> int:
    """Where `name` is defined. Raises LookupError: it is not, or in several places."""
    if not path.is_file():
        raise LookupError(f"{path.name} is not there")
    found = definitions(path)
    lines = found.get(name) or [line for known, own in found.items() if known.endswith(f".{name}") for line in own]
    if len(lines) != 1:
        raise LookupError(f"{path.name} defines {name} {len(lines)} times" if lines else f"{path.name} has no {name}")
    return lines[0]


def line_links(document: Path) -> Iterator[tuple[str, Path, str]]:
    """Name, linked file and written number of each link to a line."""
    for name, target, number in LINK.findall(document.read_text(encoding="utf-8")):
        yield name, (document.parent / target).resolve(), number


def renumbered(document: Path) -> str:
    """The document's text with every link's number as it is now. Raises LookupError as `line_of`, with the document."""

    def link(match: re.Match[str]) -> str:
        name, target, _ = match.groups()
        try:
            return f"[`{name}`]({target}#L{line_of((document.parent / target).resolve(), name)})"
        except LookupError as error:
            raise LookupError(f"{document.relative_to(ROOT)}: {error}") from None

    return LINK.sub(link, document.read_text(encoding="utf-8"))


def main() -> int:
    problems = 0
    for document in documents():
        try:
            text = renumbered(document)
        except LookupError as error:
            print(error, file=sys.stderr)
            problems += 1
            continue
        if text != document.read_text(encoding="utf-8"):
            document.write_text(text, encoding="utf-8")
            print(f"renumbered {document.relative_to(ROOT)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
