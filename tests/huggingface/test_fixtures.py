"""Checkpoints generated from fixtures are those that transformers computed the outputs for."""

import numpy as np
import pytest
from safetensors import numpy as safetensors

from tests.support import fixtures

EVERY = fixtures.cases() + fixtures.cases(refused=True)


@pytest.mark.parametrize("case", EVERY)
def test_drawn_weights_are_those_of_the_fixture(case):
    description = fixtures.read_fixture(case).description
    assert fixtures.digest(fixtures.drawn_tensors(description)) == description["sha256"]


# In KiB. A text of Doge has no token twice, so its vocabulary is large: equal tokens would be ties of its mask.
LARGEST = {"doge": 70, "doge_window": 60}


@pytest.mark.parametrize("case", EVERY)
def test_fixture_is_small_and_its_arrays_have_matching_shapes(case):
    fixture = fixtures.read_fixture(case)
    assert sum(
        (fixtures.FOLDER / f"{case}.{suffix}").stat().st_size for suffix in ("json", "npz")
    ) < 1024 * LARGEST.get(case, 45)
    expected = fixture.expected
    batch, length = expected["input_ids"].shape
    config = fixtures.text_config(fixture.description["config"])
    vocab = config.get("unpadded_vocab_size") or config["vocab_size"]
    assert expected["logits"].shape == (batch, length, vocab)
    assert expected["topk_idx"].shape == expected["topk_weight"].shape
    assert expected["topk_idx"].shape[:2] == (len(expected["moe_layers"]), batch * length)
    assert np.all(np.diff(expected["topk_idx"]) > 0)


def test_all_fixtures_together_stay_small():
    assert sum(path.stat().st_size for path in fixtures.FOLDER.iterdir()) < 4 * 2**20


@pytest.mark.parametrize("shards", [1, 3])
def test_written_checkpoint_opens_as_safetensors(tmp_path, shards):
    folder = fixtures.write_checkpoint("mixtral", tmp_path, shards=shards)
    opened = {}
    for path in folder.glob("*.safetensors"):
        opened |= safetensors.load_file(path)
    drawn = fixtures.drawn_tensors(fixtures.read_fixture("mixtral").description)
    assert {name: array.shape for name, (_, array) in drawn.items()} == {name: a.shape for name, a in opened.items()}
    assert all(np.array_equal(opened[name], array) for name, (_, array) in drawn.items())


def test_values_have_the_mean_and_standard_deviation_of_their_law():
    values = fixtures.drawn(0, "name", (20000,), "F32", {"mean": 1.0, "std": 0.5})
    np.testing.assert_allclose([values.mean(), values.std()], [1.0, 0.5], atol=0.01)


def test_bfloat16_and_e4m3_round_to_the_nearest():
    bits = fixtures.stored(np.array([1.0, 1.00390625, 1.01171875, -3.14159]), "BF16").astype("<u4") << 16
    assert bits.astype("<u4").view("<f4").tolist() == [1.0, 1.0, 1.015625, -3.140625]
    values = np.array([0.0, -1.06, 1.07, 500.0, 2.0**-10 * 1.1])
    codes = fixtures.stored(values, "F8_E4M3")
    assert fixtures.e4m3_values()[codes].tolist() == [0.0, -1.0, 1.125, 448.0, 2.0**-9]


@pytest.mark.parametrize(
    "names",
    [
        ["model.norm.weight"],
        ["a.0.b.0.w", "a.0.b.1.w", "a.1.b.0.w", "a.1.b.1.w"],
        ["a.1.w", "a.3.w"],
        ["a.0.b.0.w", "a.1.b.0.w", "a.1.b.1.w"],
    ],
)
def test_patterns_expand_to_exactly_the_names(names):
    patterns = fixtures.contracted(names)
    assert sorted(name for pattern in patterns for name in fixtures.expanded(pattern)) == names
