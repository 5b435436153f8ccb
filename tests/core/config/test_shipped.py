"""Configs by name, from any folder, and new ones made from them."""

import json

import pytest
import yaml
from click.testing import CliRunner

from moezoo.cli.main import main
from moezoo.core.config.new_config import new_config
from moezoo.core.config.run_config import load_config
from moezoo.core.config.shipped import SHIPPED, shipped_config, shipped_configs
from moezoo.core.errors import RunError, SpecError
from moezoo.core.huggingface.checkpoint import describe_checkpoint
from tests.support.fixtures import write_checkpoint


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [("fables", "fables"), ("moe_small", "shakespeare/moe_small"), ("tiny/switch", "tiny/switch")],
)
def test_a_config_is_found_by_its_name_from_any_folder(name, file):
    assert load_config(name) == load_config(SHIPPED / f"{file}.yaml")


def test_a_name_that_several_configs_have_lists_them():
    with pytest.raises(SpecError, match=r"several configs: shakespeare/switch, tiny/switch\. Use one"):
        load_config("switch")


def test_an_unknown_name_is_one_line_with_the_nearest():
    with pytest.raises(SpecError, match="no such config; got 'fabels'; did you mean fables"):
        load_config("fabels")


def test_a_name_without_its_suffix_leads_to_the_file(tmp_path):
    (tmp_path / "owls.yaml").touch()
    with pytest.raises(SpecError, match=r"did you mean \S+/owls\.yaml\?"):
        load_config(tmp_path / "owls")


def test_what_exists_here_is_not_a_shipped_config(tmp_path):
    (tmp_path / "fables").mkdir()
    assert shipped_config("fables") is None


@pytest.mark.parametrize("source", ["fables", "fine_tune", "shakespeare/muon"])
def test_a_new_config_has_the_values_of_its_source_and_comments(tmp_path, source):
    path, schema = new_config("mine", source)
    assert yaml.safe_load(path.read_text()) == yaml.safe_load(shipped_configs()[source].read_text())
    assert path.read_text().startswith(f"# yaml-language-server: $schema={schema.name}\n")
    assert "  # number of optimizer steps\n" in path.read_text()
    assert "$defs" in json.loads(schema.read_text())
    with pytest.raises(RunError, match=r"mine\.yaml exists and is not replaced"):
        new_config("mine", source)


def test_a_new_config_has_the_model_of_a_checkpoint(tmp_path):
    folder = write_checkpoint("gpt_oss", tmp_path / "published")
    result = CliRunner().invoke(main, ["init", str(tmp_path / "mine"), "--from", str(folder)])
    assert result.exit_code == 0, result.output
    model, published = load_config(tmp_path / "mine.yaml").model, describe_checkpoint(folder).spec
    assert model.all_layers == published.all_layers
    assert model.model_copy(update={"layers": published.layers}) == published
    assert "moe: *moe" in (tmp_path / "mine.yaml").read_text()  # a part that occurs again is not written again
    assert load_config(tmp_path / "mine.yaml").data == load_config("fables").data


def test_a_new_config_is_a_yaml_file():
    with pytest.raises(SpecError, match=r"expected NAME or NAME\.yaml"):
        new_config("mine.json")
