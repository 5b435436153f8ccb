"""`moezoo explore`: pages, notes, and one-line errors."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from moezoo.cli.main import main
from moezoo.core.traces.trace_file import save_trace
from tests.support.traces import synthetic_trace


def explore(*words: object) -> Result:
    return CliRunner().invoke(main, ["explore", *map(str, words)])


def test_demo_makes_a_page_at_once(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = explore("--demo", "-o", page)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert result.stdout == f"{page}: 876 tokens, {page.stat().st_size / 1024:.0f} KiB; open it in a browser\n"
    assert "<title>Routing of demo</title>" in page.read_text(encoding="utf-8")


def test_a_long_trace_is_cut_with_a_note_or_as_chosen(tmp_path: Path) -> None:
    trace, page = tmp_path / "long.safetensors", tmp_path / "page.html"
    save_trace(trace, synthetic_trace(2500, layers=(0,)))
    result = explore(trace, "-o", page)
    assert result.stderr == (
        "note: the page has the first 2,000 of 2,500 tokens; --tokens FIRST:LAST chooses others, 20,000 at most\n"
    )
    result = explore(trace, "-o", page, "--tokens", "2400:")
    assert (result.stderr, result.stdout[:25]) == ("", f"{page}: 100 tokens"[:25])


def test_two_traces_make_one_page(tmp_path: Path) -> None:
    names = ["bf16", "4bit"]
    for name in names:
        save_trace(tmp_path / f"{name}.safetensors", synthetic_trace())
    result = explore(*(tmp_path / f"{name}.safetensors" for name in names), "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "<title>Routing of bf16 and 4bit</title>" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "piece"),
    [
        ([], "explore takes one trace, two of the same tokens, or --demo; got nothing"),
        (["a.safetensors", "--demo"], "got a.safetensors --demo"),
        (["a", "b", "c"], "got a b c"),
        (["missing.safetensors"], "missing.safetensors"),
        (["--demo", "--tokens", "5"], "got '5'"),
    ],
)
def test_wrong_arguments_are_errors_of_one_line(tmp_path: Path, words: list[str], piece: str) -> None:
    result = explore(*words, "-o", tmp_path / "page.html")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert piece in result.stderr
    assert not list(tmp_path.iterdir())
