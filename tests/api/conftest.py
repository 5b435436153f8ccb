"""A tiny model trained in a folder `runs/owls`, for tests of the Python API."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from moezoo.cli.main import main
from tests.support.small_run import write_config


@pytest.fixture(scope="session")
def owls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the config `owls.yaml` and its run `runs/owls`, trained for 8 steps on MLX."""
    pytest.importorskip("mlx.core")
    folder = tmp_path_factory.mktemp("api")
    config = write_config(folder).rename(folder / "owls.yaml")
    words = ["train", str(config), "--backend", "mlx", "--out", str(folder / "runs" / "owls")]
    assert CliRunner().invoke(main, words).exit_code == 0
    return folder
