"""The README's commands exist, with these options, on these files, and do not get in each other's way."""

from pathlib import Path

import pytest

from moezoo.cli.main import main
from moezoo.core.config.run_config import load_config
from moezoo.core.config.shipped import config_file
from tests.support.readme import ROOT, blocks, commands

COMMANDS = [words for block in blocks() for words in commands(block)]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_printed_command_has_these_options(words: list[str]) -> None:
    command = main.commands[words[0]]
    given = command.make_context(words[0], words[1:]).params
    if words[0] == "launch":
        nproc, (name, *inner) = given["nproc"], given["words"]
        given = main.commands[name].make_context(name, inner).params
        assert load_config(given["config_path"]).training.batch_size % nproc == 0
    if "config_path" in given:
        assert config_file(
            ROOT / given["config_path"] if given["config_path"].suffix else given["config_path"]
        ).is_file()


def test_no_printed_run_needs_the_folder_of_another() -> None:
    folders = []
    for words in COMMANDS:
        words = words[words.index("train") :] if "train" in words else words
        if words[0] == "train" and "--resume" not in words:
            given = main.commands["train"].make_context("train", words[1:]).params
            folders.append(given["out"] or Path("runs") / given["config_path"].stem)
    assert len(set(folders)) == len(folders)
    assert len(folders) > 3
