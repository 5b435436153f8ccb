"""Every command that the README prints, in its order and from the root of a checkout; models train for two steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.backends_available import require_backend
from tests.support.fixtures import write_checkpoint
from tests.support.readme import ROOT, blocks

pytestmark = [pytest.mark.slow, pytest.mark.release]

# Every Python process of the tour takes a text of this test's for the downloaded one.
OTHER_TEXT = """
import hashlib
from pathlib import Path
from moezoo.core.data import datasets

original = datasets.load_recipe

def load_recipe(name):
    recipe = original(name)
    if name != "tiny_shakespeare":
        return recipe
    text = Path("text.txt").read_bytes()
    source = recipe.sources[0].model_copy(update={"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()})
    return recipe.model_copy(update={"sources": (source,)})

datasets.load_recipe = load_recipe
"""
# `moezoo` with short runs.
SHORTENED = """
import sys
from moezoo.cli.main import main

words = sys.argv[1:]
if "train" in words:
    for value in ("steps=2", "validate_every=null", "checkpoint_every=1"):
        words += ["--set", "training." + value]
if words[0] == "bench":
    words += ["--smoke"]
try:
    main(words)
except SystemExit as end:
    if words[0] != "doctor" or end.code != 1:  # a run of two steps has findings
        raise
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a checkout with an environment, and a published checkpoint."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "text.txt").write_text(
        "".join(f"ROMEO: To be, or not to see {n} owls.\n" for n in range(800)), encoding="utf-8"
    )
    (tmp_path / "some.txt").write_text("the cat sat on the mat and the dog ran to the cat. " * 20, encoding="utf-8")
    write_tokenizer(write_checkpoint("qwen3_moe", tmp_path / "model"))
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "shortened.py").write_text(SHORTENED, encoding="utf-8")
    (scripts / "sitecustomize.py").write_text(OTHER_TEXT, encoding="utf-8")
    (scripts / "activate").write_text(f'export PATH="{scripts}:$PATH"\n', encoding="utf-8")
    for name, words in (("moezoo", f"{scripts}/shortened.py"), ("python", "")):
        (scripts / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n', encoding="utf-8")
        (scripts / name).chmod(0o755)
    return tmp_path


def test_the_printed_commands_run_in_order(checkout: Path) -> None:
    require_backend("jax")
    require_backend("mlx")
    scripts = checkout / ".venv" / "bin"
    environment = os.environ | {
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{scripts}",
        "MOEZOO_CACHE": str(checkout / "cache"),
        "MOEZOO_DATA": str(checkout / "data"),
    }
    (checkout / "data" / "tiny_shakespeare").mkdir(parents=True)
    (checkout / "data" / "tiny_shakespeare" / "tiny_shakespeare.txt").write_bytes((checkout / "text.txt").read_bytes())
    for block in blocks():
        done = subprocess.run(
            ["bash", "-exc", block], cwd=checkout, env=environment, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, done.stderr[-3000:]
