"""Names and shapes of tensors as mlx-lm writes them, for every family that it has: each is mapped.

`tests/data/mlx_names.json`, written by tests/external/make_mlx_oracles.py, which also compares the answers.
"""

import json
from pathlib import Path

import pytest

from moezoo.core.huggingface import parts
from moezoo.core.huggingface.checkpoint import describe_checkpoint
from moezoo.core.huggingface.export_as import family_for
from moezoo.core.huggingface.family import families, family_of
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.layout import describe_config
from moezoo.core.huggingface.ledger import Ledger, Readable, first_rules, make_ledger, wrapping
from tests.support.fixtures import expanded

CASES = json.loads((Path(__file__).parents[1] / "data" / "mlx_names.json").read_text())
# families without an implementation in mlx-lm
NOT_THERE = {
    "aria_text",
    "axk1",
    "axk2",
    "beam",
    "cohere2_moe",
    "deepseek_v4",
    "doge",
    "dots3_note_text",
    "ernie4_5_vl_moe_text",
    "flex_olmo",
    "flint",
    "glm5_next_text",
    "granitemoe_swa",
    "hy_v3",
    "hy_v4",
    "inkling2_text",
    "inkling_text",
    "jetmoe",
    "kolibri1",
    "minimax",  # its model of this name is MiniMax-M2
    "qwen4_exp_text",
    "zaya",
}


def ledger_of(case: str, folder: Path) -> Ledger:
    (folder / "config.json").write_text(json.dumps(CASES[case]["config"]))
    shapes = {name: tuple(shape) for pattern, shape in CASES[case]["tensors"] for name in expanded(pattern)}
    description = describe_config(folder / "config.json").in_layout(shapes)
    assert description.rules == description.family.mlx_tensors
    assert description.family.mlx_lm.zero_centred == ("zero_centred" in description.spec.model_dump_json())
    readable = {name: Readable("BF16", shape, (name,)) for name, shape in shapes.items()}
    stored = {name: ("model.safetensors", "BF16", shape) for name, shape in shapes.items()}
    return make_ledger(description.family, description.rules, description.spec, readable, stored, "names")


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_mapped(case: str, tmp_path: Path) -> None:
    assert ledger_of(case, tmp_path).counts().keys() <= {"mapped", "kept"}


@pytest.mark.parametrize("case", CASES)
def test_an_export_has_these_names_and_shapes(case: str, tmp_path: Path) -> None:
    ledger = ledger_of(case, tmp_path)
    description = describe_config(tmp_path / "config.json").in_layout(ledger.placed)
    wrap = wrapping(description.family, ledger.placed)
    written = {wrap(name): rule.shape for name, rule in first_rules(description.rules, description.spec).items()}
    assert written == {name: rule.shape for name, rule in ledger.placed.items()}


# Fields that transformers ignores, derives or reads in another form, but mlx-lm needs.
NEEDED = {
    "deepseek_v32": {"first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_layer_end_index": 2},
    "gemma4_text": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_d_head": 16,
        "position_embedding_type": "nope",
        "time_step_limit": [0.0, 3.4028234663852886e38],
    },
    "llama4": {"interleave_moe_layer_step": 2},
    "mimo_v2_flash": {"n_shared_experts": None},
    "minimax_m2": {"rotary_dim": 6},
    "nemotron_h": {"n_shared_experts": 1, "time_step_limit": [0.001, 3.4028234663852886e38]},
}


@pytest.mark.parametrize("case", NEEDED)
def test_a_design_has_the_fields_that_mlx_lm_needs(case: str) -> None:
    fields = Fields(CASES[case]["config"], case)
    spec = family_of(fields).spec_of(fields)
    family, config = family_for(spec, 128)
    assert {name: config[name] for name in NEEDED[case]} == NEEDED[case]
    assert family.spec_of(Fields(json.loads(json.dumps(config, allow_nan=False)), case)) == spec


def test_a_plain_rotation_is_stated() -> None:
    """mlx-lm's GLM-4.5 has no default for `rope_scaling`."""
    assert parts.older_spellings({"rope_theta": 1e4}) == {"rope_scaling": None}
    assert parts.older_spellings({"rope_theta": 1e4, "rope_scaling": {"type": "yarn"}}) == {}


def test_a_selection_bias_that_mlx_lm_drops_is_no_part_of_the_model(tmp_path: Path) -> None:
    case = CASES["ernie4_5_moe"]
    (tmp_path / "config.json").write_text(json.dumps(case["config"]))
    names = [name for pattern, _ in case["tensors"] for name in expanded(pattern)]
    kept = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    for there, lacks in ((names, True), ([*names, kept], False)):
        description = describe_config(tmp_path / "config.json").in_layout(there)
        assert (description.spec.moes[0][1].router.selection_bias is None) == lacks
        assert any("lack selection_bias" in note for note in description.notes) == lacks


def test_every_family_of_mlx_lm_is_shown() -> None:
    shown = {families()[case_type(case)].name for case in CASES}
    assert shown == {family.name for family in families().values()} - NOT_THERE
    assert all(family.mlx for family in families().values() if family.name in shown)


def case_type(case: str) -> str:
    config = CASES[case]["config"]
    return config.get("text_config", config).get("model_type") or config["model_type"]


def test_a_folder_is_described_in_the_layout_of_its_names_before_its_weights_are_there(tmp_path: Path) -> None:
    """So a run that starts from a hub id has the norms of the files that it will read."""
    case = CASES["qwen3_next"]
    names = [name for pattern, _ in case["tensors"] for name in expanded(pattern)]
    (tmp_path / "config.json").write_text(json.dumps(case["config"]))
    assert "zero_centred" in describe_checkpoint(tmp_path).spec.model_dump_json()
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "zero_centred" not in describe_checkpoint(tmp_path).spec.model_dump_json()
