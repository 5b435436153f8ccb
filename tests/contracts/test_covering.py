"""The gate's models on JAX have every feature of the zoo, and each of them is needed for it."""

from functools import cache
from pathlib import Path

import pytest

from moezoo.core.config.run_config import dump_config, load_config, parse_config
from moezoo.core.parity.zoo import all_features, features
from tests.support.covering import COMBINATIONS, COVERING, TINY


@cache
def features_of(path: Path) -> set[str]:
    return features(load_config(path).model)


def missing(paths: list[Path]) -> dict[str, list[str]]:
    """Features that no model of `paths` has, each with the tiny configs that have it."""
    covered = set().union(*map(features_of, paths))
    return {
        feature: [path.stem for path in TINY if feature in features_of(path)]
        for feature in all_features()
        if feature not in covered
    }


def test_every_feature_runs_on_jax_in_the_gate():
    lacking = missing(COVERING)
    assert not lacking, f"no model of tests/support/covering.py has {lacking}; add the feature to a combination"


@pytest.mark.parametrize("path", COMBINATIONS, ids=lambda path: path.stem)
def test_without_a_combination_a_feature_is_missing(path):
    assert missing([other for other in COVERING if other != path])


def test_routing_at_inference_and_accumulated_gradients_are_covered():
    """Both are compiled otherwise, though no single feature says so."""
    configs = [load_config(path) for path in COVERING]
    assert any(config.model.inference_differs for config in configs)
    assert any(config.training.gradient_accumulation > 1 for config in configs)
    assert any(not config.model.inference_differs for config in configs)


@pytest.mark.parametrize("path", COMBINATIONS, ids=lambda path: path.stem)
def test_combination_says_what_it_shows_and_survives_being_written_out(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")
    config = load_config(path)
    assert parse_config(dump_config(config)) == config
