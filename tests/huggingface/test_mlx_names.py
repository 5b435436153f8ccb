"""Names and shapes of tensors as mlx-lm writes them, for every family that it has: each is mapped.

`tests/data/mlx_names.json`, written by tests/external/make_mlx_oracles.py, which also compares the answers.
"""

import json
from pathlib import Path

import pytest

from moezoo.core.huggingface.checkpoint import describe_checkpoint
from moezoo.core.huggingface.family import families
from moezoo.core.huggingface.layout import describe_config
from moezoo.core.huggingface.ledger import Ledger, Readable, make_ledger
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
