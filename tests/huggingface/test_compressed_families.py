"""Options of DeepSeek-V4 beyond those in the fixture, and the names and dtypes of its files."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo.core.errors import CheckpointError, SpecError
from moezoo.core.huggingface.checkpoint import open_checkpoint
from moezoo.core.huggingface.family import family_of
from moezoo.core.huggingface.fields import Fields
from moezoo.core.spec import CompressedAttentionSpec, ModelSpec
from tests.support.fixtures import drawn_tensors, read_fixture, write_described, write_safetensors

SMALL = {"model_type": "deepseek_v4", "vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 6}


def spec_of(**changes: Any) -> ModelSpec:
    fields = Fields(SMALL | changes, "config.json")
    return family_of(fields).spec_of(fields)


def attentions(spec: ModelSpec) -> list[CompressedAttentionSpec]:
    found = [layer.attention for layer in spec.all_layers]
    assert all(isinstance(each, CompressedAttentionSpec) for each in found)
    return found  # type: ignore[return-value]


def ratios(spec: ModelSpec) -> list[int]:
    return [0 if each.compression is None else each.compression.ratio for each in attentions(spec)]


def test_layers_without_a_list_are_those_of_the_class() -> None:
    assert ratios(spec_of()) == [128, 128, 128, 4, 128, 4]
    assert ratios(spec_of(compress_ratios=[0, 0, 4, 128, 4, 128, 0])) == [0, 0, 4, 128, 4, 128]  # one of prediction
    kinds = [layer.moe.router.choice.kind for layer in spec_of(num_hash_layers=2).all_layers]
    assert kinds == ["hash"] * 2 + ["top_k"] * 4
    with pytest.raises(SpecError, match=r"compress_ratios is .*; expected each of 0, 4, 128"):
        spec_of(compress_ratios=[0, 0, 4, 64, 4, 64])


def test_only_layers_with_entries_are_scaled_and_attention_is_not_sharpened() -> None:
    scaling = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 4096}
    window, sparse = attentions(spec_of(compress_ratios=[0, 4, 4, 4, 4, 4], rope_scaling=scaling))[:2]
    assert (window.position.base, window.position.scaling) == (1e4, None)
    assert sparse.position.base == 1.6e5
    assert sparse.position.scaling is not None
    assert sparse.position.scaling.attention_factor == 1.0
    assert window.rope_head_dim == sparse.rope_head_dim == 64


@pytest.mark.parametrize(
    ("field", "value"),
    [("scoring_func", "softmax"), ("norm_topk_prob", False), ("num_key_value_heads", 2)],
)
def test_options_that_transformers_ignores_or_lacks_are_refused(field: str, value: Any) -> None:
    with pytest.raises(SpecError, match=f"{field} is "):
        spec_of(**{field: value})


def test_names_that_transformers_saves_are_read_as_those_of_deepseek(tmp_path: Path) -> None:
    description = read_fixture("deepseek_v4").description
    expected = open_checkpoint(write_described(description, tmp_path / "deepseek")).weights

    def renamed(name: str) -> str:
        name = re.sub(r"^hc_head_(\w+)", r"hc_head.hc_\1", re.sub("^embed", "embed_tokens", name))
        return name if name.startswith("head.") else "model." + name.replace("attn.kv_norm", "attn.norm")

    folder = write_described(description, tmp_path / "transformers")
    tensors = {renamed(name): tensor for name, tensor in drawn_tensors(description).items()}
    write_safetensors(folder / "model.safetensors", tensors)
    found = open_checkpoint(folder).weights
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], name)


def test_a_table_of_experts_is_integers(tmp_path: Path) -> None:
    description = read_fixture("deepseek_v4").description
    folder, table = write_described(description, tmp_path), "layers.0.ffn.gate.tid2eid"
    assert open_checkpoint(folder).weights["layers.0.moe.router.hash_table"].dtype == np.int64
    tensors = drawn_tensors(description)
    tensors[table] = ("F32", tensors[table][1].astype("<f4"))
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=rf"{table} in model.safetensors is F32; expected I64 or I32"):
        open_checkpoint(folder)
