"""`python -m tests.support.run_notebook NOTEBOOK` runs the code cells of a notebook here, without Jupyter.

What a cell ends with, or displays, is printed, with the length of its HTML. A cell of `%%bash` is run by a shell, with
the values of the names that it takes (`-s "$NAME"`); `%pip` is not run.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def code_cells(notebook: Path) -> list[str]:
    """Return the code cells as Python: a command of the shell is a call of `shell`."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [as_python("".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]


def as_python(source: str) -> str:
    """Return a cell as Python."""
    head, _, rest = source.partition("\n")
    if head.startswith("%%bash"):
        names = re.findall(r'"\$(\w+)"', head)
        return f"shell({', '.join([repr(rest), *names])})"
    return re.sub(r"^(\s*)%pip .*", r"\1pass", source, flags=re.MULTILINE)


def shell(commands: str, *values: str) -> None:
    """Run commands with positional values, of which no part may fail."""
    words = ["bash", "-eo", "pipefail", "-c", commands, "bash", *values]
    done = subprocess.run(words, capture_output=True, text=True)
    print(done.stdout + done.stderr)
    assert done.returncode == 0, commands


def display(value: Any) -> None:
    """Print what a notebook would show."""
    if value is not None:
        page = value._repr_html_() if hasattr(value, "_repr_html_") else ""
        print(f"{value!r:.500}" + (f" [{len(page):,} characters of HTML]" if page else ""))


class Image:
    """A picture of a file, which has to be one."""

    def __init__(self, path: str | Path):
        self._path = Path(path)

    def __repr__(self) -> str:
        content = self._path.read_bytes()
        assert content.startswith(b"\x89PNG")
        return f"[picture {self._path}, {len(content):,} bytes]"


def main(notebook: Path) -> None:
    stub = ModuleType("IPython.display")
    stub.display, stub.Image = display, Image  # type: ignore[attr-defined]
    sys.modules["IPython.display"] = stub  # and no IPython, which Matplotlib would ask for more
    scope: dict[str, Any] = {"__name__": "__main__", "shell": shell}
    for number, source in enumerate(code_cells(notebook)):
        print(f"--- cell {number}", flush=True)
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), scope)
        if isinstance(last, ast.Expr):
            display(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), scope))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
