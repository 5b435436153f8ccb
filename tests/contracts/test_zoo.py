"""Every part of the spec is shown by a tiny config, and the list of parts comes from the spec itself."""

from pathlib import Path

import pytest

from moezoo.core.errors import SpecError
from moezoo.core.parity.zoo import all_features, zoo

TINY = Path(__file__).parents[2] / "configs" / "tiny"


def test_every_part_is_shown_by_a_tiny_config():
    assert zoo(TINY).missing == ()


def test_every_part_that_a_config_has_is_in_the_list():
    assert set().union(*(config.features for config in zoo(TINY).configs)) <= set(all_features())


def test_parts_are_members_choices_switches_and_numbers_that_are_off():
    expected = {"attention: latent", "router.score: sigmoid", "router.bias", "model.dropout", "rope position.fraction"}
    assert expected <= set(all_features())
    assert not {feature for feature in all_features() if "hidden_dim" in feature or "epsilon: " in feature}


def test_a_config_named_after_a_part_shows_it():
    rows = {feature: config.name for feature, config in zoo(TINY).rows if config is not None}
    assert rows["dispatch: capacity"] == "capacity"
    assert rows["head: tied"] == "tied"


def test_a_folder_without_configs_is_named(tmp_path):
    with pytest.raises(SpecError, match="has no configs"):
        zoo(tmp_path)
