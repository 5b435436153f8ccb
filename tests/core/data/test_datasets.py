"""Dataset recipes: the built-in ones, verification of downloads and copies. No test needs a network."""

import hashlib
import http.client
import io
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from moezoo.core.data import datasets as recipes
from moezoo.core.data.datasets import (
    DownloadRecipe,
    GrammarRecipe,
    data_folder,
    dataset_grammar,
    dataset_path,
    datasets_folder,
    fetch,
    list_recipes,
    load_recipe,
)
from moezoo.core.errors import DataError, SpecError

TEXT = b"Once upon a time.\n" * 5000  # more than one chunk
OTHER = b"Another edition.\n"
RECIPE = f"""
kind: download
title: A tale
description: For tests.
language: en
licence: CC0-1.0
home: https://example.org/tale
characters: {len(TEXT)}
sources:
  - url: "https://example.org/tale.txt"
    bytes: {len(TEXT)}
    sha256: {hashlib.sha256(TEXT).hexdigest()}
    verified: null
    note: a
  - url: null
    bytes: {len(OTHER)}
    sha256: {hashlib.sha256(OTHER).hexdigest()}
    verified: 2026-11-22
    note: b
"""
GRAMMAR = 'end: "\\n\\n"\nstart: "A {beast}."\nlists: {beast: [fox, hen]}\n'
FABLES = """
kind: grammar
title: Tiny
description: For tests.
language: en
licence: CC0-1.0
home: https://example.org
characters: 40
grammar: grammar.yaml
seed: 1
sha256: SHA
"""


@pytest.fixture(autouse=True)
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a temporary data folder, and fail tests that access the network."""
    monkeypatch.setenv("MOEZOO_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("accessed the network"))
    return tmp_path / "data"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a datasets folder with two recipes."""
    folder = tmp_path / "datasets"
    for name, recipe in (("tale", RECIPE), ("fables", FABLES)):
        (folder / name).mkdir(parents=True)
        (folder / name / "recipe.yaml").write_text(recipe)
    (folder / "fables" / "grammar.yaml").write_text(GRAMMAR)
    monkeypatch.setattr(recipes, "datasets_folder", lambda: folder)
    return folder


def serve(monkeypatch: pytest.MonkeyPatch, answer: bytes | Exception) -> None:
    def urlopen(request: urllib.request.Request, timeout: float) -> io.BytesIO:
        assert request.full_url == "https://example.org/tale.txt"
        assert timeout > 0
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# --- built-in recipes ------------------------------------------------------------------------------------------------


def test_built_in_recipes_load() -> None:
    built_in = {recipe.name: recipe for recipe in list_recipes()}
    assert sorted(built_in) == ["fables", "panchatantra", "tiny_shakespeare"]
    assert isinstance(built_in["fables"], GrammarRecipe)
    tiny = built_in["tiny_shakespeare"]
    assert isinstance(tiny, DownloadRecipe)
    assert [source.bytes for source in tiny.sources] == [1115394, 1115390]


def test_fables_are_generated_on_first_use_and_reused(keep: Path) -> None:
    path = dataset_path("fables")
    assert path.parent == keep / "fables"
    grammar, recipe = dataset_grammar("fables"), load_recipe("fables")
    text = path.read_text()
    assert grammar is not None
    assert text.startswith(next(grammar.documents(seed=0)))
    assert len(text) >= recipe.characters
    written = path.stat().st_mtime_ns
    assert fetch("fables") == path
    assert path.stat().st_mtime_ns == written
    path.write_text("damaged")
    assert dataset_path("fables").read_text() == text
    assert kept(keep) == [path.name]


def test_downloaded_dataset_has_no_grammar() -> None:
    assert dataset_grammar("tiny_shakespeare") is None


def test_folder_of_recipes_is_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert datasets_folder().resolve() == Path(__file__).parents[3] / "datasets"
    monkeypatch.setattr(recipes, "PACKAGE", tmp_path)
    (tmp_path / "datasets").mkdir()
    with pytest.raises(DataError, match=r"recipes are missing; expected .*Install moezoo again"):
        datasets_folder()


def test_data_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEZOO_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", "/xdg")
    assert data_folder() == Path("/xdg/moezoo")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert data_folder() == Path.home() / ".local/share/moezoo"
    monkeypatch.setenv("MOEZOO_DATA", "~/texts")
    assert data_folder() == Path.home() / "texts"


# --- fetching --------------------------------------------------------------------------------------------------------


def test_download_is_verified_stored_and_not_repeated(shelf: Path, keep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, TEXT)
    seen: list[tuple[str, int, int | None]] = []
    path = fetch("tale", on_progress=lambda *row: seen.append(row))
    assert path == keep / "tale" / "tale.txt"
    assert path.read_bytes() == TEXT
    assert len(seen) > 1
    assert seen[-1] == ("downloading tale", len(TEXT), len(TEXT))
    serve(monkeypatch, AssertionError("downloaded twice"))
    assert fetch("tale") == dataset_path("tale") == path


@pytest.mark.parametrize("answer", [TEXT[:-1], TEXT + b"x", TEXT[:-1] + b"x", b"", b"x" * 10 * len(TEXT)])
def test_damaged_download_raises_and_is_not_stored(
    shelf: Path, keep: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    serve(monkeypatch, answer)
    with pytest.raises(DataError, match=r"is not the text of tale; got \d+ bytes with SHA-256 .*Nothing was stored"):
        fetch("tale")
    assert kept(keep) == []


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("Name or service not known"),
        TimeoutError("timed out"),
        ConnectionResetError(104, "reset by peer"),
        http.client.IncompleteRead(b"x"),
    ],
)
def test_no_network_error_has_advice(
    shelf: Path, keep: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    serve(monkeypatch, failure)
    with pytest.raises(DataError, match=r"got no connection \(.+\).* by hand .*moezoo data tale --file PATH"):
        fetch("tale")
    assert kept(keep) == []


def test_http_error_has_the_status(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = http.client.HTTPMessage()
    with urllib.error.HTTPError("https://example.org", 404, "Not Found", headers, io.BytesIO()) as failure:
        serve(monkeypatch, failure)
        with pytest.raises(DataError, match=r"got HTTP 404 Not Found.*--file PATH"):
            fetch("tale")


def test_local_copy_of_any_known_edition_is_accepted(shelf: Path, tmp_path: Path) -> None:
    for edition in (TEXT, OTHER):
        (tmp_path / "mine.txt").write_bytes(edition)
        assert fetch("tale", file=tmp_path / "mine.txt").read_bytes() == edition
        assert dataset_path("tale").read_bytes() == edition


def test_local_copy_of_another_text_raises(shelf: Path, keep: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"mine.txt is not the text of tale; got 4 bytes"):
        fetch("tale", file=tmp_path / "mine.txt")
    with pytest.raises(DataError, match=r"none.txt cannot be read \(no such file or directory\)"):
        fetch("tale", file=tmp_path / "none.txt")
    assert kept(keep) == []


def test_dataset_without_url_needs_a_local_copy(shelf: Path) -> None:
    file = shelf / "tale" / "recipe.yaml"
    file.write_text(RECIPE.replace('"https://example.org/tale.txt"', "null"))
    with pytest.raises(DataError, match=r"no download URL.*moezoo data tale --file PATH"):
        fetch("tale")


# --- reading ---------------------------------------------------------------------------------------------------------


def test_missing_dataset_error_has_the_command(shelf: Path) -> None:
    with pytest.raises(DataError, match=r"dataset tale is not on this machine; .*moezoo data tale$"):
        dataset_path("tale")


def test_text_damaged_after_the_download_raises(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, TEXT)
    path = fetch("tale")
    path.write_bytes(TEXT[:100])
    with pytest.raises(DataError, match=r"tale.txt is not the text of tale.*Download it again: moezoo data tale"):
        dataset_path("tale")
    assert fetch("tale").read_bytes() == TEXT


def test_unknown_dataset_error_suggests_a_name() -> None:
    with pytest.raises(DataError, match=r"got 'fable'; did you mean fables\?; expected one of fables, "):
        load_recipe("fable")
    with pytest.raises(DataError, match="no dataset has this name"):
        fetch("../fables")


def test_changed_grammar_does_not_match_the_recipe(shelf: Path, keep: Path) -> None:
    file = shelf / "fables" / "recipe.yaml"
    file.write_text(FABLES.replace("SHA", "f" * 64))
    with pytest.raises(
        DataError, match=r"the generated text of dataset fables has SHA-256 [0-9a-f]{64}; expected f{64}.*update"
    ) as caught:
        dataset_path("fables")
    assert kept(keep) == []
    file.write_text(FABLES.replace("SHA", str(caught.value).split("SHA-256 ")[1][:64]))
    first = dataset_path("fables")
    assert first.read_text().count("\n\n") >= 5
    with pytest.raises(DataError, match="generated, not copied; got --file"):
        fetch("fables", file=first)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("licence:", "license:", r"license is not a known key; did you mean licence\?"),
        ("https://example.org/tale.txt", "ftp://example.org/tale.txt", r"sources\[0\].url"),
        ("title:", "name: tale\ntitle:", "name is not a key of a recipe"),
        ("kind: download", "kind: grammar", "sha256 is missing"),
    ],
)
def test_invalid_recipe_raises(shelf: Path, old: str, new: str, message: str) -> None:
    (shelf / "tale" / "recipe.yaml").write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(SpecError, match=message):
        load_recipe("tale")
