"""A tiny model trained in a folder `runs/owls`, for tests of the Python API."""

from pathlib import Path

import pytest

import moezoo
from tests.support.small_run import write_config


@pytest.fixture(scope="session")
def owls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the config `owls.yaml` and its run `runs/owls`, trained for 8 steps on MLX."""
    pytest.importorskip("mlx.core")
    folder = tmp_path_factory.mktemp("api")
    config = write_config(folder, validate_every=4).rename(folder / "owls.yaml")
    moezoo.train(config, backend="mlx", out=folder / "runs" / "owls", progress=False)
    return folder
