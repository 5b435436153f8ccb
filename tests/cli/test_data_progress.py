"""Lines about the preparation of data reach the user."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from moezoo.cli.data import prepare_with_progress
from moezoo.core.config.run_config import load_config
from tests.support.small_run import write_config


@pytest.mark.parametrize("quiet", [False, True])
def test_a_damaged_token_cache_is_said(tmp_path: Path, monkeypatch, capsys, quiet: bool) -> None:
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    config, out = load_config(write_config(tmp_path)), io.StringIO()
    console = Console(file=out, width=40)
    first = prepare_with_progress(console, config, "small.yaml", None, quiet=quiet).train.batch(0, 3, 24, 0)
    assert "damaged" not in out.getvalue()
    [shard] = (tmp_path / "cache").glob("*/*.npy")
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    again = prepare_with_progress(console, config, "small.yaml", None, quiet=quiet)
    said = capsys.readouterr().err if quiet else out.getvalue()  # standard output may be JSON
    assert f"the content of {shard.name} differs from its SHA-256 ({shard.parent})" in said
    assert (first == again.train.batch(0, 3, 24, 0)).all()
