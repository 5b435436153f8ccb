"""Export of a model designed in moezoo as a family with the same computation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moezoo
from moezoo.backends import load_backend
from moezoo.core.config.run_config import load_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.errors import SpecError
from moezoo.core.huggingface.checkpoint import open_checkpoint
from moezoo.core.huggingface.export_as import export_as_family, exports, family_for
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.spec import ModelSpec
from tests.support.fixtures import write_checkpoint

MIXTRAL = {
    "vocab_size": 31,
    "embed_dim": 16,
    "layers": [
        {
            "repeat": 2,
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "window": 5},
            "moe": {
                "num_experts": 5,
                "router": {"top_k": 2},
                "experts": {"hidden_dim": 12},
                "losses": [{"kind": "switch_balance", "coefficient": 0.01}],
            },
        }
    ],
    "head": {"kind": "tied"},
}
NORMED = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "qk_norm": {}}
QWEN3 = MIXTRAL | {
    "layers": [
        {"attention": NORMED, "feed_forward": {"kind": "geglu", "hidden_dim": 9}},
        {
            "attention": NORMED,
            "moe": {
                "num_experts": 5,
                "router": {"top_k": 2, "renormalize": "none"},
                "experts": {"kind": "geglu", "hidden_dim": 12},
            },
        },
    ]
}
LATENT = {
    "kind": "latent",
    "num_heads": 2,
    "head_dim": 4,
    "rope_head_dim": 2,
    "value_head_dim": 3,
    "latent_dim": 5,
    "query_latent_dim": 7,
}
DEEPSEEK = MIXTRAL | {
    "head": {"kind": "untied"},
    "layers": [
        {"attention": LATENT, "feed_forward": {"hidden_dim": 9}},
        {
            "attention": LATENT,
            "moe": {
                "num_experts": 6,
                "router": {
                    "top_k": 2,
                    "score": "sigmoid",
                    "selection_bias": {"rate": 0.01},
                    "choice": {"kind": "grouped_top_k", "num_groups": 3, "keep": 2, "group_value": "top2"},
                    "renormalize_epsilon": 1e-20,
                    "scale": 1.5,
                },
                "experts": {"hidden_dim": 12},
                "shared": {"num_experts": 2, "hidden_dim": 12},
            },
        },
    ],
}


@pytest.mark.parametrize(("family", "raw"), [("mixtral", MIXTRAL), ("qwen3_moe", QWEN3), ("deepseek_v3", DEEPSEEK)])
def test_export_as_a_family_reads_back_the_same_model(family: str, raw: dict, tmp_path: Path) -> None:
    spec = ModelSpec.model_validate(raw)
    weights = initial_weights(spec, 0)
    notes = export_as_family(weights, spec, tmp_path / "out", max_length=64)
    assert notes == [f"written as {family}, which computes the same function"]
    back = open_checkpoint(tmp_path / "out")
    assert back.family.name == family
    assert all(np.array_equal(back.weights[name], value) for name, value in weights.items())
    tokens = np.arange(20, dtype=np.int32).reshape(2, 10)
    ours = load_backend("mlx").build(spec, weights).forward(tokens)
    np.testing.assert_array_equal(moezoo.load(tmp_path / "out", backend="mlx").forward(tokens).logits, ours.logits)


def test_the_same_layers_in_another_grouping_are_the_same_model() -> None:
    (layer,) = MIXTRAL["layers"][:1]
    for repeats in ((4,), (1, 3), (2, 2)):
        layers = [{**layer, "repeat": repeat} for repeat in repeats]
        family, _ = family_for(ModelSpec.model_validate({**MIXTRAL, "layers": layers}), 64)
        assert family.name == "mixtral"


def test_a_design_with_a_skipped_expert_has_the_bias_that_transformers_sets(tmp_path: Path) -> None:
    opened, random = open_checkpoint(write_checkpoint("zaya", tmp_path / "fixture")), np.random.default_rng(0)
    spec, weights = opened.spec, dict(opened.weights)
    biases = [name for name in weights if name.endswith("router.selection_bias")]
    weights |= {name: random.normal(0, 0.1, weights[name].shape).astype(np.float32) for name in biases}
    export_as_family(weights, spec, tmp_path / "out", max_length=64)
    back = open_checkpoint(tmp_path / "out").weights
    assert {float(back[name][-1]) for name in biases} == {-1.0}
    tokens = np.arange(20, dtype=np.int32).reshape(2, 10)
    ours = load_backend("mlx").build(spec, weights).forward(tokens)
    theirs = moezoo.load(tmp_path / "out", backend="mlx").forward(tokens)
    assert any((layer.expert == spec.moes[0][1].num_experts).any() for layer in ours.routing)  # some are skipped
    np.testing.assert_array_equal(theirs.logits, ours.logits)


def test_a_model_without_a_matching_family_is_refused(tmp_path: Path) -> None:
    config = with_vocab_size(load_config("configs/tiny/expert_choice.yaml"), 64)
    with pytest.raises(SpecError, match=r"The nearest is deepseek, which has model\.layers\[0\]\.moe\.router\.choice"):
        export_as_family({}, config.model, tmp_path / "out", max_length=64)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [
        ({"gate": "headwise"}, 'mixtral, which has model.layers[0].attention.gate null, not "headwise"'),
        ({"sinks": True}, "mixtral, which has model.layers[0].attention.sinks false, not true"),
        (
            {"dynamic_mask": {"keep": 3}},
            "mixtral, which has model.layers[0].attention.dynamic_mask null, not set",
        ),
    ],
)
def test_the_nearest_family_is_the_one_that_lacks_the_fewest_values(changes: dict[str, Any], nearest: str) -> None:
    """Also if it has no tensor for a part, where others have one but differ in more."""
    (layer,) = MIXTRAL["layers"]
    layers = [{**layer, "attention": {**layer["attention"], **changes}}]
    assert exports(ModelSpec.model_validate({**MIXTRAL, "layers": layers})).obstacles == nearest


def test_many_parameters_of_one_part_that_is_missing_count_once() -> None:
    residual = {"kind": "hyper_connections", "num_streams": 4}
    obstacles = exports(ModelSpec.model_validate({**MIXTRAL, "residual": residual})).obstacles
    assert obstacles == 'mixtral, which has model.residual "sum", not "hyper_connections"'
