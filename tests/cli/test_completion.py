"""Completion in the shell: commands, options, names of configs, run folders, files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete, get_completion_class

from moezoo.cli.completion import PATH
from moezoo.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("runs/fables", "runs/other", "elsewhere/mine"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "zz_mine.yaml").touch()  # no config that ships begins so
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tr", ["train", "trace"]),
        ("train --res", ["--resume"]),
        ("train fab", ["fables"]),
        ("train shakespeare/moe_s", ["shakespeare/moe_small"]),
        ("plan moe_s", ["moe_small"]),
        ("preview zz_", ["zz_mine.yaml"]),
        ("init new --from fab", ["fables"]),
        ("generate ", ["runs/fables", "runs/other"]),
        ("eval fab", ["runs/fables"]),
        ("chat elsewhere/", ["elsewhere/mine"]),
        ("describe fab", ["runs/fables", "fables"]),
        ("eval runs/fables --mode s", ["silence"]),
        ("generate runs/fables --backend ", ["jax", "mlx"]),
        ("data tiny", ["tiny_shakespeare"]),
        ("bench st", ["startup"]),
        ("plan fables --accelerator h", ["H100", "H200"]),
    ],
)
def test_completion_finds(line: str, found: list[str]) -> None:
    *words, incomplete = line.split(" ")
    items = ShellComplete(main, {}, "moezoo", "_MOEZOO_COMPLETE").get_completions(words, incomplete)
    assert {item.type for item in items} == {"plain"}
    assert [item.value for item in items if item.value in found] == found  # more configs may begin so


@pytest.mark.parametrize(
    "line", ["train configs/", "analyze t", "eval runs/fables --data no", "trace runs/fables --out "]
)
def test_the_shell_completes_what_is_a_file(line: str) -> None:
    *words, incomplete = line.split(" ")
    items = ShellComplete(main, {}, "moezoo", "_MOEZOO_COMPLETE").get_completions(words, incomplete)
    assert [(item.type, item.value) for item in items] == [("file", incomplete)]


def test_no_path_is_without_completion() -> None:
    types = {parameter.type.name for command in main.commands.values() for parameter in command.params}
    assert PATH.name in types
    assert "Path" not in types  # `type=Path`


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_calls_moezoo(shell: str, folder: Path) -> None:
    script = get_completion_class(shell)(main, {}, "moezoo", "_MOEZOO_COMPLETE").source()
    assert f"_MOEZOO_COMPLETE={shell}_complete" in script
    if shell != "bash" or shutil.which("bash") is None:
        return
    command = folder / "moezoo"
    code = "from moezoo.cli.main import main; main(prog_name='moezoo')"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}"\n')
    command.chmod(0o755)
    tab = f'{script}\nCOMP_WORDS=(moezoo tr); COMP_CWORD=1; _moezoo_completion {command}; echo "${{COMPREPLY[@]}}"'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", tab], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout == "train trace\n", done.stderr
