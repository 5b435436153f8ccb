from pathlib import Path

import pytest

from moezoo.core.cost.memory import cache_bytes, largest_context
from moezoo.core.huggingface.checkpoint import open_checkpoint
from moezoo.core.huggingface.recipe import FormatRule, Recipe
from moezoo.core.reports.checkpoint_page import checkpoint_description
from moezoo.core.reports.storage import PROCESS_BYTES, context_in, storage_of
from moezoo.core.runs.convert_layout import convert_layout
from tests.support.fixtures import write_checkpoint

MLX_FOLDERS = Path(__file__).parents[2] / "data" / "mlx_folders"


def test_bits_and_bytes_by_role():
    storage = storage_of(open_checkpoint(MLX_FOLDERS / "qwen3_moe_4bit_router8"))
    bits = {role: each.bits_per_weight for role, each in storage.by_role.items()}
    assert bits == {
        **dict.fromkeys(("embeddings", "head", "attention", "feed-forward", "routed experts"), 4.5),
        "router": 8.5,
        "norms": 16.0,
    }
    assert storage.by_role["router"].formats == ("8-bit affine, groups of 64",)
    assert storage.total.memory_bytes == storage.total.file_bytes
    assert storage.warnings == ()


def test_floats_have_no_warnings(tmp_path):
    storage = storage_of(open_checkpoint(write_checkpoint("qwen3_moe", tmp_path / "floats")))
    assert {each.bits_per_weight for each in storage.by_role.values()} == {32.0}
    assert storage.warnings == ()


def test_low_bits_of_routers_and_float_experts_are_said(tmp_path):
    recipe = Recipe(bits=4, group_size=32, rules=(FormatRule(role=("router",), bits=4, group_size=32),))
    convert_layout(write_checkpoint("qwen3_moe", tmp_path / "floats"), tmp_path / "out", recipe=recipe)
    router, experts = storage_of(open_checkpoint(tmp_path / "out")).warnings
    assert router.startswith("the router has 4 bits")
    assert "2 parameters of routed experts in floats" in experts
    assert "layers.1.moe.experts.w_down [7, 20, 32]" in experts


@pytest.mark.parametrize("case", ["qwen3_moe", "gemma4_text"])
def test_largest_context_is_the_last_that_fits(tmp_path, case):
    spec = open_checkpoint(write_checkpoint(case, tmp_path)).spec
    for free in (0, 1, 10_000, 123_457, 10**9):
        tokens = largest_context(spec, free)
        assert cache_bytes(spec, tokens) <= free < cache_bytes(spec, tokens + 1)


def test_context_beside_the_weights(tmp_path):
    folder = write_checkpoint("qwen3_moe", tmp_path)
    known = checkpoint_description(folder, 2**30)
    assert known.context.tokens == 128
    assert known.context.words().endswith("context of 128 tokens, the model's maximum")
    spec = known.model.spec
    assert context_in(PROCESS_BYTES + 1000, 900, spec, None).tokens == 0
    assert "too little" in context_in(1000, 900, spec, None).words()
    assert context_in(PROCESS_BYTES + 10**6, 0, spec, None).tokens == largest_context(spec, 10**6)
    assert known.to_json()["context"]["largest_context"] == 128
