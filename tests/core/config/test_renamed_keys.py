"""Renamed config keys: users get an error with the new name, and a run that an earlier version saved still opens."""

import pytest

from moezoo.core.config.renamed_keys import RENAMED_KEYS, with_new_keys
from moezoo.core.config.run_config import dump_config, load_config, load_saved_config, parse_config
from moezoo.core.errors import SpecError
from moezoo.core.files import PACKAGE


def old_text() -> str:
    config = load_config(PACKAGE / "configs" / "tiny" / "sandwich_norm.yaml")
    text = dump_config(config)
    assert "norm_placement: sandwich" in text
    return text.replace("norm_placement:", "arrangement:")


def test_old_key_is_an_error_that_names_the_new_key():
    with pytest.raises(SpecError, match=r"model\.layers\[0\]\.arrangement is now called norm_placement \(x\.yaml\)"):
        parse_config(old_text(), "x.yaml")


def test_config_saved_by_an_earlier_version_opens(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(old_text())
    assert load_saved_config(path) == parse_config(old_text().replace("arrangement:", "norm_placement:"))


def test_keys_are_renamed_at_any_depth_and_values_stay():
    assert RENAMED_KEYS["arrangement"] == "norm_placement"
    raw = {"layers": [{"arrangement": "arrangement", "other": 1}]}
    assert with_new_keys(raw) == {"layers": [{"norm_placement": "arrangement", "other": 1}]}
