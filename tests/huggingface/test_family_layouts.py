"""Layouts of the same tensors: in memory in transformers 5, and in a multimodal wrapper."""

import json
from pathlib import Path

import numpy as np
import pytest

import moezoo
from moezoo.core.huggingface.checkpoint import open_checkpoint
from tests.support.fixtures import drawn_tensors, read_fixture, write_safetensors

# Name in the files -> name in memory, where they differ.
RENAMED = {
    "qwen2_moe": {},
    "glm4_moe": {},
    "dots1": {},
    "solar_open": {},
    "mellum": {},
    "flex_olmo": {},
    "exaone_moe": {"mlp.e_score_correction_bias": "mlp.gate.e_score_correction_bias"},
    "ernie4_5_moe": {"mlp.moe_statics.": "mlp.gate.moe_statics."},
    "mixtral": {"block_sparse_moe.": "mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."},
    "minimax_m2": {"block_sparse_moe.": "mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."},
}
Tensors = dict[str, tuple[str, np.ndarray]]


def renamed(tensors: Tensors, case: str) -> Tensors:
    found = {}
    for name, value in tensors.items():
        for old, new in RENAMED[case].items():
            name = name.replace(old, new)
        found[name] = value
    return found


def fused(tensors: Tensors) -> Tensors:
    """Return tensors with experts stacked, gate and up concatenated."""
    found = {name: value for name, value in tensors.items() if ".mlp.experts." not in name}
    prefixes = sorted({name.split(".mlp.experts.")[0] for name in tensors if ".mlp.experts." in name})
    for prefix in prefixes:
        count = sum(name.startswith(f"{prefix}.mlp.experts.") for name in tensors) // 3
        each = [f"{prefix}.mlp.experts.{expert}" for expert in range(count)]

        def stacked(which: str, each: list[str] = each) -> np.ndarray:
            return np.stack([tensors[f"{name}.{which}.weight"][1] for name in each])

        both = np.concatenate([stacked("gate_proj"), stacked("up_proj")], axis=1)
        found[f"{prefix}.mlp.experts.gate_up_proj"] = ("F32", both)
        found[f"{prefix}.mlp.experts.down_proj"] = ("F32", stacked("down_proj"))
    return found


def written(folder: Path, config: dict, tensors: Tensors) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def assert_same(actual: Path, expected: Path) -> None:
    one, other = open_checkpoint(actual), open_checkpoint(expected)
    assert one.spec == other.spec
    for name, value in other.weights.items():
        np.testing.assert_array_equal(one.weights[name], value, err_msg=name)


@pytest.mark.parametrize("case", RENAMED)
def test_in_memory_layout_has_the_same_weights(case: str, tmp_path: Path) -> None:
    description = read_fixture(case).description
    config, tensors = description["config"], drawn_tensors(description)
    in_memory = fused(renamed(tensors, case))
    assert in_memory.keys() != tensors.keys()
    assert_same(written(tmp_path / "memory", config, in_memory), written(tmp_path / "files", config, tensors))


@pytest.mark.parametrize(
    ("model", "head"), [("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head.")]
)
def test_text_model_in_a_multimodal_wrapper_has_the_same_weights(model: str, head: str, tmp_path: Path) -> None:
    description = read_fixture("llama4_text").description
    config, tensors = description["config"], drawn_tensors(description)
    inside = {name.replace("model.", model, 1).replace("lm_head.", head, 1): value for name, value in tensors.items()}
    seen = {
        "multi_modal_projector.linear_1.weight": ("F32", np.ones((4, 4), np.float32)),
        "vision_model.class_embedding": ("F32", np.ones(4, np.float32)),
    }
    outer = {"model_type": "llama4", "text_config": config, "vision_config": {"hidden_size": 4}}
    wrapper = written(tmp_path / "wrapper", outer, inside | seen)
    assert_same(wrapper, written(tmp_path / "files", config, tensors))
    assert open_checkpoint(wrapper).ledger.counts() == {"mapped": len(tensors), "kept": 2}


@pytest.mark.parametrize(
    ("case", "outer", "text", "projector"),
    [
        ("deepseek_v3", "kimi_vl", {}, "multi_modal_projector.linear_1.weight"),
        ("deepseek_v3", "kimi_k25", {"model_type": "kimi_k2"}, "mm_projector.proj.0.weight"),
        ("kimi_linear", "kimi_k25", {}, "mm_projector.proj.0.weight"),
    ],
)
def test_kimi_inside_its_wrapper_computes_the_text_and_keeps_the_tower(
    case: str, outer: str, text: dict, projector: str, tmp_path: Path
) -> None:
    fixture = read_fixture(case)
    config, tensors = fixture.description["hub_config"], drawn_tensors(fixture.description)
    tower = {name: ("F32", np.ones((4, 4), np.float32)) for name in ("vision_tower.patch_embed.proj.weight", projector)}
    whole = {
        "model_type": outer,
        "text_config": config | text,
        "vision_config": {"hidden_size": 4},
        **{"ignore_index": -100, "media_placeholder_token_id": 9, "use_unified_vision_chunk": True},
        **{"video_placeholder": "<|video|>", "projection_hidden_size": 4, "projection_layer_norm_eps": 1e-5},
    }
    inside = {f"language_model.{name}": value for name, value in tensors.items()}
    model = moezoo.load(written(tmp_path / "wrapper", whole, inside | tower), backend="mlx")
    ids = fixture.expected["input_ids"].astype(np.int32)
    assert np.abs(model.forward(ids).logits - fixture.expected["logits"]).max() < 5e-5
    found = model.generate(ids[:1], max_new_tokens=4, temperature=0.0)
    np.testing.assert_array_equal(found, fixture.expected["greedy"][:1, :4])
    model.save(tmp_path / "saved", format="huggingface")
    saved = open_checkpoint(tmp_path / "saved").ledger
    assert {entry.name for entry in saved.entries if entry.status == "kept"} == set(tower)
