"""Each config opens with what it shows, where that comes from and how to run it."""

import re
from pathlib import Path

import pytest
import yaml

from moezoo.bench.configs import NAMES
from moezoo.core.config.mesh_option import load_mesh
from moezoo.core.config.run_config import dump_config, load_config, parse_config
from moezoo.core.runs.init_from import load_resolved_config

ROOT = Path(__file__).parents[2] / "configs"
MESHES = sorted((ROOT / "meshes").glob("*.yaml"))
CONFIGS = [path for path in sorted(ROOT.rglob("*.yaml")) if path not in MESHES]
TINY = sorted((ROOT / "tiny").glob("*.yaml"))
BENCH = sorted((ROOT / "bench").glob("*.yaml"))


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_tiny_config_opens_with_what_it_shows_its_source_and_its_command(path):
    header = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line)
    assert len(header[0]) > 30
    assert header[0].endswith(".")
    assert any(line.startswith("# source: ") and ("arXiv" in line or "20" in line) for line in header)
    assert f"# command: moezoo train configs/tiny/{path.name}" in header


@pytest.mark.parametrize("path", BENCH, ids=lambda path: path.stem)
def test_bench_config_opens_with_what_it_shows_its_source_and_its_command_and_is_known_by_name(path):
    (name,) = [name for name, stem in NAMES.items() if stem == path.stem]
    first, *header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert f"`moezoo bench`, {name}" in first
    assert any(line.startswith("# source: ") and "arXiv" in line for line in header)
    assert any(line.startswith(f"# command: moezoo bench --config {name} ") for line in header)
    assert load_config(path).model.vocab_size is not None  # random tokens are timed, so no data decides it


@pytest.mark.parametrize("path", MESHES, ids=lambda path: path.stem)
def test_mesh_opens_with_what_it_shows_its_source_and_its_command(path):
    first, *header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert first.endswith(".")
    assert any(line.startswith("# source: ") for line in header)
    assert f"# command: moezoo train CONFIG --backend jax --mesh configs/meshes/{path.name}" in header
    assert not load_mesh(str(path)).is_one_device


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_command_of_a_config_names_its_file_and_no_other(path):
    named = re.findall(r"^# command: .*\b(configs/[\w./]+\.yaml)", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= {f"configs/{path.relative_to(ROOT)}"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_config_is_valid_and_survives_being_written_out(path):
    config = load_resolved_config(path)
    assert parse_config(dump_config(config)) == config


@pytest.mark.parametrize("path", TINY, ids=lambda path: path.stem)
def test_tiny_config_trains_on_the_built_in_corpus_and_leaves_the_vocabulary_to_it(path):
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert "vocab_size" not in raw["model"]
    assert raw["data"]["sources"] == [{"kind": "dataset", "name": "fables"}]
    assert raw["training"]["steps"] <= 100
