"""Everything that the README and the guides print is run as it stands, in its order; models train for two steps.

The README's commands run from the root of a checkout. A guide runs in a folder that is empty but for tiny checkpoints
under the names of those on the hub.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.backends_available import require_backend
from tests.support.fixtures import write_checkpoint
from tests.support.printed import GUIDES, README, ROOT, Block, blocks

pytestmark = [pytest.mark.slow, pytest.mark.release]

ON_THE_HUB = {"allenai/OLMoE-1B-7B-0125-Instruct": "olmoe", "Qwen/Qwen3-30B-A3B": "qwen3_moe"}

# Every Python process of the README's tour takes a text of this test's for the downloaded one.
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
    for value in ("steps=2", "validate_every=null", "checkpoint_every=1", "final_validation_sequences=4"):
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
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables with which `moezoo` and `python` are those of the tests, with short runs."""
    require_backend("jax")
    require_backend("mlx")
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "shortened.py").write_text(SHORTENED, encoding="utf-8")
    (scripts / "activate").write_text(f'export PATH="{scripts}:$PATH"\n', encoding="utf-8")
    for name, words in (("moezoo", f"{scripts}/shortened.py"), ("python", "")):
        (scripts / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n', encoding="utf-8")
        (scripts / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{scripts}",
        "MOEZOO_CACHE": str(tmp_path / "cache"),
        "MOEZOO_DATA": str(tmp_path / "data"),
        "HF_HUB_OFFLINE": "1",
    }


def run_or_write(block: Block, folder: Path, environment: dict[str, str]) -> None:
    """Do with a block what its reader does."""
    if block.title:
        (folder / block.title).write_text(block.text, encoding="utf-8")
        return
    program = ["bash", "-exc"] if block.language == "console" else ["python", "-c"]
    done = subprocess.run(
        [*program, block.text], cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def test_the_commands_of_the_readme_run_in_order(tmp_path: Path, environment: dict[str, str]) -> None:
    """In a folder that looks like a checkout with an environment, and a published checkpoint."""
    (tmp_path / ".venv" / "bin" / "sitecustomize.py").write_text(OTHER_TEXT, encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "text.txt").write_text(
        "".join(f"ROMEO: To be, or not to see {n} owls.\n" for n in range(800)), encoding="utf-8"
    )
    (tmp_path / "some.txt").write_text("the cat sat on the mat and the dog ran to the cat. " * 20, encoding="utf-8")
    write_tokenizer(write_checkpoint("qwen3_moe", tmp_path / "model"))
    (tmp_path / "data" / "tiny_shakespeare").mkdir(parents=True)
    (tmp_path / "data" / "tiny_shakespeare" / "tiny_shakespeare.txt").write_bytes((tmp_path / "text.txt").read_bytes())
    for block in blocks(README):
        if not block.text.startswith("make "):  # which sets up its own environment
            run_or_write(block, tmp_path, environment)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_a_guide_runs_as_printed(guide: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    folder, environment = tmp_path / "empty", environment | {"BACKEND": "mlx"}  # which compiles nothing
    for name, case in ON_THE_HUB.items():
        write_tokenizer(write_checkpoint(case, folder / name))
    for block in blocks(guide):
        if not block.elsewhere:
            run_or_write(block, folder, environment)
