"""Text models inside multimodal checkpoints: what belongs to other modalities is listed, and kept bit for bit."""

from pathlib import Path

import numpy as np
import pytest

from moezoo.core.errors import SpecError
from moezoo.core.huggingface.checkpoint import open_checkpoint
from moezoo.core.huggingface.export import export_checkpoint
from moezoo.core.huggingface.family import family_of
from moezoo.core.huggingface.fields import Fields
from moezoo.core.runs.convert import convert
from moezoo.core.runs.open import open_model
from moezoo.core.runs.save import save_run
from tests.support.fixtures import drawn_tensors, read_fixture, text_config, write_checkpoint, write_safetensors

OTHERS = {
    "ernie4_5_vl_moe": ("model.vision_model.", "model.resampler_model."),
    "glm4v_moe": ("model.visual.",),
    "qwen3_omni_moe": ("thinker.visual.", "thinker.audio_tower.", "talker.", "code2wav."),
    "qwen3_omni_moe_thinker": ("visual.", "audio_tower."),
    "qwen3_vl_moe": ("model.visual.",),
}
IMAGES = ".mlp.moe_statics.e_score_correction_bias"


@pytest.mark.parametrize("case", OTHERS)
def test_tensors_of_other_modalities_are_listed_as_kept(case: str, tmp_path: Path) -> None:
    ledger = open_checkpoint(write_checkpoint(case, tmp_path / case)).ledger
    kept = {entry.name for entry in ledger.entries if entry.status == "kept"}
    expected = {entry.name for entry in ledger.entries if entry.name.startswith(OTHERS[case])}
    if case == "ernie4_5_vl_moe":  # 7 experts for text, then 7 for images, in two layers
        expected |= {entry.name for entry in ledger.entries if entry.name.endswith(".mlp.gate.weight_1")}
        names = (f"experts.{expert}.{which}_proj" for expert in range(7, 14) for which in ("gate", "up", "down"))
        expected |= {f"model.layers.{layer}.mlp.{name}.weight" for name in names for layer in (1, 2)}
    assert kept == expected
    assert {prefix for prefix in OTHERS[case] if any(name.startswith(prefix) for name in kept)} == {*OTHERS[case]}


@pytest.mark.parametrize("case", OTHERS)
def test_a_prompt_of_a_fixture_has_ids_that_stand_for_images_or_sounds(case: str) -> None:
    """Without an image they are tokens like any other, in transformers' logits and in ours."""
    fixture = read_fixture(case)
    outer = fixture.description["config"]
    outer = outer.get("thinker_config", outer)
    assert {outer["image_token_id"], outer["video_token_id"]} & {*fixture.expected["input_ids"].flat}


def test_experts_are_read_in_the_axes_of_the_release_and_in_those_of_transformers(tmp_path: Path) -> None:
    source = write_checkpoint("qwen3_vl_moe", tmp_path / "released")
    tensors = drawn_tensors(read_fixture("qwen3_vl_moe").description)
    for name, (dtype, array) in tensors.items():
        if ".mlp.experts." in name:
            tensors[name] = (dtype, np.ascontiguousarray(array.swapaxes(1, 2)))
    other = tmp_path / "saved"
    other.mkdir()
    (other / "config.json").write_bytes((source / "config.json").read_bytes())
    write_safetensors(other / "model.safetensors", tensors)
    released, saved = open_checkpoint(source), open_checkpoint(other)
    for name in released.weights:
        np.testing.assert_array_equal(released.weights[name], saved.weights[name], err_msg=name)
    export_checkpoint(dict(saved.weights.items()), saved.layout, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("through_a_run", [False, True])
def test_a_changed_selection_bias_leaves_the_row_for_images_as_it_is(through_a_run: bool, tmp_path: Path) -> None:
    opened = open_model(write_checkpoint("ernie4_5_vl_moe", tmp_path / "source"))
    weights = {name: np.array(value) for name, value in opened.weights.items()}
    biases = [name for name in weights if name.endswith("selection_bias")]
    for name in biases:
        weights[name] += np.float32(1)
    assert opened.layout is not None
    if through_a_run:
        save_run(tmp_path / "run", opened.config, opened.tokenizer, weights, 1, opened.layout)
        convert(tmp_path / "run", tmp_path / "out")
    else:
        export_checkpoint(weights, opened.layout, tmp_path / "out")
    before, after = open_checkpoint(tmp_path / "source").folder, open_checkpoint(tmp_path / "out").folder
    changed = [name for name in before.tensors if before.read(name).tobytes() != after.read(name).tobytes()]
    assert changed == [name for name in before.tensors if name.endswith(IMAGES)]
    for name in changed:
        np.testing.assert_array_equal(after.read(name)[1], before.read(name)[1])
        np.testing.assert_array_equal(after.read(name)[0], before.read(name)[0] + np.float32(1))
    assert len(changed) == len(biases) == 2


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("qwen3_vl_moe", {"norm_topk_prob": False}, "norm_topk_prob is false; expected true"),
        ("qwen3_vl_moe", {"use_sliding_window": True}, "use_sliding_window is true; expected false"),
        ("qwen3_omni_moe", {"shared_expert_intermediate_size": 4}, "shared_expert_intermediate_size is 4; expected 0"),
        ("qwen3_omni_moe", {"use_qk_norm": False}, "use_qk_norm is false; expected true"),
        ("glm4v_moe", {"use_qk_norm": True}, "use_qk_norm is true; expected false"),
        ("ernie4_5_vl_moe", {"moe_intermediate_size": [20]}, r"moe_intermediate_size is \[20\]; expected two numbers"),
        (
            "ernie4_5_vl_moe",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters is .*; expected rope_type default",
        ),
    ],
)
def test_options_that_transformers_does_not_have_are_refused(case: str, changes: dict, message: str) -> None:
    config = read_fixture(case).description["config"]
    text_config(config).update(changes)
    fields = Fields(config, "config.json")
    with pytest.raises(SpecError, match=message):
        family_of(fields).spec_of(fields)


@pytest.mark.parametrize("where", ["", "thinker_config"])
def test_an_unknown_field_around_the_text_model_is_refused(where: str) -> None:
    config = read_fixture("qwen3_omni_moe").description["config"]
    (config[where] if where else config)["logit_trick"] = 3
    with pytest.raises(SpecError, match="unknown for this family: logit_trick 3"):
        Fields(config, "config.json")
