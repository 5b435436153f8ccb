"""Notebooks: their first cells, size and links; their commands exist. tests/api/test_notebooks.py runs them."""

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from moezoo.cli.main import main
from tests.support.run_notebook import code_cells

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "writings" / "notebooks").glob("*.ipynb"))
BY_NAME = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)


def cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


@BY_NAME
def test_it_begins_with_a_link_to_colab_and_installs_moezoo_where_it_is_missing(notebook: Path) -> None:
    title, install, *_ = ("".join(cell["source"]) for cell in cells(notebook))
    assert title.startswith("# ")
    assert f"/github/moezoo/moezoo/blob/main/{notebook.relative_to(ROOT)})" in title
    assert install.index('find_spec("moezoo") is None') < install.index("%pip install")


@BY_NAME
def test_it_is_small_and_its_code_is_python(notebook: Path) -> None:
    assert notebook.stat().st_size < 150_000
    for source in code_cells(notebook):
        ast.parse(source)


@BY_NAME
def test_its_links_and_commands_exist(notebook: Path) -> None:
    text = "\n".join("".join(cell["source"]) for cell in cells(notebook))
    for target in re.findall(r"\]\(([^)\s:]+)\)", text):
        assert (notebook.parent / target.partition("#")[0]).is_file(), target
    for line in re.findall(r"^python -m moezoo ([^|\n]*)", text, flags=re.MULTILINE):
        name, *words = shlex.split(line)
        main.commands[name].make_context(name, words)


def test_each_is_in_the_index_once() -> None:
    index = (ROOT / "writings" / "README.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) >= 4
    assert [index.count(f"(notebooks/{notebook.name})") for notebook in NOTEBOOKS] == [1] * len(NOTEBOOKS)
