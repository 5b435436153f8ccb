"""Every notebook runs, cell by cell and at its full length, in an empty folder and without a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.backends_available import require_backend
from tests.support.fixtures import write_checkpoint
from tests.support.printed import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.release]

NOTEBOOKS = ROOT / "writings" / "notebooks"
PUBLISHED = "ibm-granite/granite-3.0-1b-a400m-instruct"


def printed_by(notebook: str, folder: Path) -> str:
    """Run a notebook in a folder, and return what it prints."""
    require_backend("mlx")
    environment = os.environ | {
        "BACKEND": "mlx",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
    }
    words = [sys.executable, "-m", "tests.support.run_notebook", str(NOTEBOOKS / f"{notebook}.ipynb")]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("notebook", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_it_runs_without_a_network(notebook: str, tmp_path: Path) -> None:
    printed = printed_by(notebook, tmp_path)
    assert ("NOT ibm-granite" in printed) == (notebook == "published_checkpoint")


def test_a_published_checkpoint_is_opened_by_its_name(tmp_path: Path) -> None:
    write_tokenizer(write_checkpoint("granitemoe", tmp_path / PUBLISHED))
    printed = printed_by("published_checkpoint", tmp_path)
    assert f"<LoadedModel {PUBLISHED}: " in printed
    assert "NOT " not in printed
