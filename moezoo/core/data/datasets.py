"""Datasets by name: where a text comes from, its licence, size and checksum, and how it gets here.

A recipe is `datasets/<name>/recipe.yaml`. A text is kept in the data folder only if its size and SHA-256 are
what the recipe says; one that is not is never kept, and one that was damaged later is never returned.
"""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, assert_never

from pydantic import Field, NonNegativeInt, PositiveInt

from moezoo.core.config.validate import validate
from moezoo.core.config.yaml_file import read_mapping
from moezoo.core.data.grammar.grammar import Grammar, load_grammar
from moezoo.core.errors import DataError, SpecError, nearest
from moezoo.core.files import PACKAGE, make_folder, sha256_of, write_atomically
from moezoo.core.progress import Progress
from moezoo.core.spec import Part

_TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 16

SHA256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Source(Part):
    """One exact file that is accepted as the dataset's text.

    `url` is null where no address is known to give these bytes: they come from a local copy. `verified` is
    the day on which we saw bytes of this checksum, null where the numbers are someone else's word.
    """

    url: Annotated[str, Field(pattern="^https://")] | None
    bytes: PositiveInt
    sha256: SHA256
    verified: date | None
    note: str


class _Described(Part):
    name: str
    title: str
    description: str
    language: str
    licence: str
    home: str
    characters: PositiveInt


class DownloadRecipe(_Described):
    """A text that is fetched, or given as a local file. The first source is the preferred one."""

    kind: Literal["download"] = "download"
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]


class GrammarRecipe(_Described):
    """A text that a grammar writes here: at least `characters` characters, cut at the end of a document."""

    kind: Literal["grammar"] = "grammar"
    grammar: str
    seed: NonNegativeInt
    sha256: SHA256


Recipe = DownloadRecipe | GrammarRecipe


def list_recipes() -> list[Recipe]:
    """Every recipe, by name."""
    return [load_recipe(name) for name in _names()]


def load_recipe(name: str) -> Recipe:
    """The recipe of a dataset. Raises DataError for an unknown name, SpecError for a recipe that cannot be."""
    names = _names()
    if name not in names:
        raise DataError(f"no dataset is called {name!r}{nearest(name, names)} Known: {', '.join(names)}.")
    file = datasets_folder() / name / "recipe.yaml"
    raw = read_mapping(file, "recipe")
    if "name" in raw:
        raise SpecError(
            f"name is not a key of a recipe; got {raw['name']!r} ({file}). The folder names it: leave it out."
        )
    raw["name"] = name
    if raw.get("kind") == "grammar":
        return validate(GrammarRecipe, raw, str(file))
    return validate(DownloadRecipe, raw, str(file))


def fetch(name: str, file: Path | None = None, on_progress: Progress | None = None) -> Path:
    """Bring a dataset to this machine: from `file`, from the network, or by writing it. One that is here is kept.

    Returns the path of the text, whose size and SHA-256 are as the recipe says.

    Raises:
        DataError: unknown name, no network, a file that the recipe does not know. Nothing is kept then.
        RunError: the data folder cannot be written.
    """
    recipe = load_recipe(name)
    match recipe:
        case GrammarRecipe():
            if file is not None:
                raise DataError(f"dataset {name} is written on this machine; got --file {file}. Leave --file out.")
            return _written(recipe)
        case DownloadRecipe():
            path = _stored_at(recipe)
            if file is None and path.is_file() and _source_of(recipe, path.read_bytes()):
                return path
            content = _local(recipe, file) if file is not None else _downloaded(recipe, on_progress)
            make_folder(path.parent)
            write_atomically(path, content)
            return path
        case _:
            assert_never(recipe)


def dataset_path(name: str) -> Path:
    """The text of a dataset, checked. One with a grammar is written on first use; others must have been fetched.

    Raises DataError: unknown name, not on this machine, or not the bytes that the recipe knows.
    """
    recipe = load_recipe(name)
    match recipe:
        case GrammarRecipe():
            return _written(recipe)
        case DownloadRecipe():
            path = _stored_at(recipe)
            if not path.is_file():
                raise DataError(
                    f"dataset {name} is not on this machine; expected {path}. Bring it with: moezoo data {name}"
                )
            content = path.read_bytes()
            if not _source_of(recipe, content):
                problem = _unknown_bytes(recipe, content, str(path))
                raise DataError(f"{problem} Bring it again: moezoo data {name}")
            return path
        case _:
            assert_never(recipe)


def dataset_grammar(name: str) -> Grammar | None:
    """The grammar that a dataset is written by, so that a loss can be compared with its entropy; None without one."""
    recipe = load_recipe(name)
    return load_grammar(_grammar_file(recipe)) if isinstance(recipe, GrammarRecipe) else None


def data_folder() -> Path:
    """Where texts are kept: $MOEZOO_DATA, else `moezoo` in $XDG_DATA_HOME, else ~/.local/share/moezoo."""
    if given := os.environ.get("MOEZOO_DATA"):
        return Path(given).expanduser()
    home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(home).expanduser() / "moezoo"


def datasets_folder() -> Path:
    """Return the folder of the recipes, inside the package. Raises DataError: the installation lacks it."""
    folder = PACKAGE / "datasets"
    if not (folder / "fables" / "recipe.yaml").is_file():
        raise DataError(f"the recipes are missing; expected {folder}/fables/recipe.yaml. Install moezoo again.")
    return folder


# --- one source ---------------------------------------------------------------------------------------------


def _names() -> list[str]:
    return sorted(file.parent.name for file in datasets_folder().glob("*/recipe.yaml"))


def _stored_at(recipe: DownloadRecipe) -> Path:
    return data_folder() / recipe.name / f"{recipe.name}.txt"


def _source_of(recipe: DownloadRecipe, content: bytes) -> Source | None:
    """The source that these bytes are, or None."""
    sha256 = hashlib.sha256(content).hexdigest()
    known = (source for source in recipe.sources if (source.bytes, source.sha256) == (len(content), sha256))
    return next(known, None)


def _unknown_bytes(recipe: DownloadRecipe, content: bytes, where: str) -> str:
    expected = " or ".join(f"{source.bytes} bytes with SHA-256 {source.sha256}" for source in recipe.sources)
    sha256 = hashlib.sha256(content).hexdigest()
    return (
        f"{where} is not the text of {recipe.name}; got {len(content)} bytes with SHA-256 {sha256}; "
        f"expected {expected}."
    )


def _local(recipe: DownloadRecipe, file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DataError(
            f"--file {file} cannot be read ({reason}); expected the text of {recipe.name}. Check the path."
        ) from None
    if not _source_of(recipe, content):
        problem = _unknown_bytes(recipe, content, f"--file {file}")
        raise DataError(f"{problem} Nothing was kept. Give another copy.")
    return content


def _downloaded(recipe: DownloadRecipe, on_progress: Progress | None) -> bytes:
    """The bytes of the first source that has an address; checked, and held in memory until they are."""
    by_hand = f"pass it: moezoo data {recipe.name} --file PATH"
    source = next((source for source in recipe.sources if source.url), None)
    if source is None or source.url is None:
        raise DataError(
            f"dataset {recipe.name} has no address to download from; expected a local copy. See "
            f"{recipe.home}, and {by_hand}"
        )
    request = urllib.request.Request(source.url, headers={"User-Agent": "moezoo"})
    content = bytearray()
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            while len(content) <= source.bytes and (chunk := response.read(_CHUNK_BYTES)):
                content += chunk
                if on_progress is not None:
                    on_progress(f"downloading {recipe.name}", len(content), source.bytes)
    except urllib.error.HTTPError as error:
        raise DataError(
            f"{source.url} cannot be downloaded; got HTTP {error.code} {error.reason}. "
            f"Find the text elsewhere ({recipe.home}), and {by_hand}"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise DataError(
            f"{source.url} cannot be downloaded; got no connection ({reason}); expected a network. Connect, "
            f"or download it "
            f"by hand on another machine and {by_hand}"
        ) from None
    if not _source_of(recipe, bytes(content)):
        raise DataError(_unknown_bytes(recipe, bytes(content), source.url) + " Nothing was kept. Try again.")
    return bytes(content)


# --- one grammar --------------------------------------------------------------------------------------------


def _grammar_file(recipe: GrammarRecipe) -> Path:
    return datasets_folder() / recipe.name / recipe.grammar


def _written(recipe: GrammarRecipe) -> Path:
    """The text of a grammar, written if it is not here. Its name carries what it was written from."""
    grammar_file = _grammar_file(recipe)
    origin = f"{sha256_of(grammar_file)} {recipe.seed} {recipe.characters}"
    mark = hashlib.sha256(origin.encode()).hexdigest()[:12]
    path = data_folder() / recipe.name / f"{recipe.name}-{mark}.txt"
    if path.is_file() and sha256_of(path) == recipe.sha256:
        return path
    content = load_grammar(grammar_file).text(recipe.characters, recipe.seed).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != recipe.sha256:
        raise DataError(
            f"dataset {recipe.name} as written here has SHA-256 {sha256}; expected {recipe.sha256} "
            f"({grammar_file.parent / 'recipe.yaml'}). If you changed {recipe.grammar} or the seed, put the "
            f"new number there; "
            "if not, please report it."
        )
    make_folder(path.parent)
    write_atomically(path, content)
    return path
