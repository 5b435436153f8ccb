"""The commands of the README and the guides exist, with these options, on these files, not in each other's way."""

import re
from pathlib import Path

import click
import pytest

from moezoo.cli.main import main
from moezoo.core.config.run_config import load_config
from moezoo.core.config.shipped import SHIPPED, config_file
from moezoo.core.huggingface.family import families
from tests.support.printed import GUIDES, README, ROOT, blocks, commands

PAGES = [README, *GUIDES]
CONFIG_FOLDERS = {path for path in SHIPPED.iterdir() if path.is_dir()}
PRINTED = [
    pytest.param(page, words, id=f"{page.stem}-{' '.join(words)}")
    for page in PAGES
    for block in blocks(page)
    for words in commands(block)
]


def given_to(words: list[str]) -> dict[str, object]:
    """The values of a command's options and arguments. Raises click.ClickException: it has no such option."""
    return main.commands[words[0]].make_context(words[0], words[1:]).params


def is_made_by(page: Path, name: str) -> bool:
    """Whether a page prints the file, or a command that writes it."""
    made = {block.title for block in blocks(page)}
    made |= {f"{words[1]}.yaml" for block in blocks(page) for words in commands(block) if words[0] == "init"}
    return name in made


@pytest.mark.parametrize(("page", "words"), PRINTED)
def test_a_printed_command_has_these_options(page: Path, words: list[str]) -> None:
    given = given_to(words)
    if words[0] == "launch":
        nproc, inner = given["nproc"], given["words"]
        given = given_to(list(inner))
        assert load_config(given["config_path"]).training.batch_size % nproc == 0
    if "config_path" in given and not is_made_by(page, str(given["config_path"])):
        path = given["config_path"]
        assert config_file(ROOT / path if path.suffix else path).is_file()
    for word in words:
        if not Path(word).suffix and (SHIPPED / word).parent in CONFIG_FOLDERS:
            assert config_file(word).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_printed_run_needs_the_folder_of_another(page: Path) -> None:
    folders = []
    for words in [words for block in blocks(page) if not block.elsewhere for words in commands(block)]:
        words = words[words.index("train") :] if "train" in words else words
        if words[0] == "train" and "--resume" not in words:
            given = given_to(words)
            folders.append(given["out"] or Path("runs") / given["config_path"].stem)
    assert len(set(folders)) == len(folders)


def test_the_readme_says_how_many_families_there_are() -> None:
    said = {int(number) for number in re.findall(r"(\d+) families", README.read_text(encoding="utf-8"))}
    assert said == {len({family.name for family in families().values()})}


def test_the_pages_print_what_is_checked() -> None:
    assert len(GUIDES) >= 8
    assert len(PRINTED) > 90
    elsewhere = [block for page in PAGES for block in blocks(page) if block.elsewhere]
    assert elsewhere
    assert all(commands(block) or "mlx_lm" in block.text for block in elsewhere)


def test_a_wrong_option_is_noticed() -> None:
    with pytest.raises(click.ClickException):
        given_to(["train", "fables", "--steps", "3"])
    with pytest.raises(KeyError):
        given_to(["retrain", "fables"])
