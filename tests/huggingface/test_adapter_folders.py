"""Adapter folders of mlx-lm, PEFT and vLLM: what is written is read back, and files that are wrong are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from moezoo.core.checkpoint.safetensors_file import SafetensorsFile, write_tensors
from moezoo.core.errors import CheckpointError, MoezooError, SpecError
from moezoo.core.huggingface.adapters.naming import AdapterLayout, adapter_layout
from moezoo.core.huggingface.adapters.read import read_adapter
from moezoo.core.huggingface.adapters.write import write_adapter
from moezoo.core.huggingface.checkpoint import describe_checkpoint
from moezoo.core.huggingface.layout import Description
from moezoo.core.parameters import parameter_table
from moezoo.core.spec import AdapterRole, AdapterSpec, ModelSpec
from tests.support.fixtures import write_checkpoint

LAYOUTS: tuple[AdapterLayout, ...] = get_args(AdapterLayout)
ROLES: tuple[AdapterRole, ...] = ("attention", "experts", "dense", "router")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Description:
    return describe_checkpoint(write_checkpoint("qwen3_moe", tmp_path_factory.mktemp("base")))


def factors(adapter: AdapterSpec, description: Description) -> tuple[ModelSpec, dict[str, np.ndarray]]:
    spec = ModelSpec.model_validate({**description.spec.model_dump(), "adapter": adapter.model_dump()})
    draw = np.random.default_rng(0)
    rows = [row for row in parameter_table(spec) if row.base is not None]
    return spec, {row.name: draw.normal(size=row.shape).astype(np.float32) for row in rows}


def written(folder: Path, adapter: AdapterSpec, description: Description, layout: AdapterLayout) -> Path:
    folder.mkdir(exist_ok=True)
    write_adapter(adapter, factors(adapter, description)[1], description, "org/base", layout, folder)
    return folder


@pytest.mark.parametrize("layers", ["all", (1, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_read_as_it_was_written(
    layout: AdapterLayout, layers: Any, base: Description, tmp_path: Path
) -> None:
    roles = ROLES if layers == "all" else ROLES[:2]
    adapter = AdapterSpec(rank=3, scale=1.5, on=roles, layers=layers)
    spec, weights = factors(adapter, base)
    read = read_adapter(written(tmp_path, adapter, base, layout), base)
    assert read.spec.adapter is not None
    assert read.spec.adapter.model_copy(update={"on": None}) == adapter.model_copy(update={"on": None})
    assert set(read.spec.adapted_roles) == set(spec.adapted_roles)
    assert read.notes == []
    assert read.weights.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(read.weights[name], value, err_msg=name)


def test_an_adapter_of_some_matrices_is_zero_on_the_others_of_their_roles(base: Description, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    name = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
    tensors = {}
    for layer, which, rank, out in ((0, "q", 2, 48), (2, "v", 4, 24)):
        tensors[name.format(layer, which, "A")] = draw.normal(size=(rank, 32)).astype(np.float32)
        tensors[name.format(layer, which, "B")] = draw.normal(size=(out, rank)).astype(np.float16)
    write_tensors(tmp_path / "adapter_model.safetensors", tensors, {})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"v_proj": 12.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    read = read_adapter(tmp_path, base)
    assert read.notes == ["6 matrices of the roles attention have no adapter in " + str(tmp_path) + ": theirs are zero"]
    adapter = read.spec.adapter
    assert adapter is not None
    assert (adapter.rank, adapter.on, adapter.layers) == (4, ("attention",), (0, 2))
    assert len([name for name in read.weights if name.endswith("lora_b")]) == 8
    for layer, ours, which, scale in ((0, "w_query", "q", 6 / 2**0.5), (2, "w_value", "v", 12 / 4**0.5)):
        a, b = (read.weights[f"layers.{layer}.attention.{ours}.{factor}"] for factor in ("lora_a", "lora_b"))
        product = adapter.scale * (a @ b.reshape(4, -1))
        stored_a, stored_b = (tensors[name.format(layer, which, letter)] for letter in "AB")
        np.testing.assert_allclose(product, scale * (stored_b.astype(np.float32) @ stored_a).T, rtol=1e-5, atol=1e-5)
    assert not np.any(read.weights["layers.0.attention.w_key.lora_b"])
    assert np.any(read.weights["layers.0.attention.w_key.lora_a"])


def changed(folder: Path, change: Callable[[dict[str, Any]], Any], tensors: dict[str, Any] | None = None) -> Path:
    """Change the config of an adapter folder, and replace some of its tensors; None removes one."""
    config = json.loads((folder / "adapter_config.json").read_text())
    change(config)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (path,) = folder.glob("*.safetensors")
    file = SafetensorsFile(path)
    every = {name: file.read(name) for name in file.entries} | (tensors or {})
    write_tensors(path, {name: value for name, value in every.items() if value is not None}, {})
    return folder


QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("change", "tensors", "problem"),
    [
        ({"peft_type": "LOHA"}, {}, "has peft_type 'LOHA'; expected LORA"),
        ({"use_dora": True}, {}, "has DoRA, which is not supported"),
        ({"bias": "all"}, {}, "has bias 'all'; expected none"),
        ({"modules_to_save": ["lm_head"]}, {}, r"has modules_to_save \['lm_head'\], which is not supported"),
        ({"init_lora_weights": "pissa"}, {}, "has init_lora_weights 'pissa', which changes the base model"),
        ({"lora_alpha": -1}, {}, "has lora_alpha -1,"),
        ({"lora_alpha": "much"}, {}, "has lora_alpha 'much',"),
        ({"alpha_pattern": {"q_(a|b)": 3}}, {}, r"has 'q_\(a\|b\)' in alpha_pattern, an expression"),
        ({}, {QUERY.format("A"): None}, "q_proj.lora_B.weight' without its other factor"),
        ({}, {QUERY.format("A"): np.ones((3, 31), np.float32)}, r"lora_A.weight' \[3, 31\] and lora_b \[48, 3\]"),
        ({}, {QUERY.format("A"): np.ones((3, 32), np.int32)}, r"of \['F32', 'I32'\]; expected floats"),
        ({}, {QUERY.format("A"): np.full((3, 32), np.nan, np.float32)}, "has NaN or infinity"),
        (
            {},
            {"base_model.model.other.lora_A.weight": np.ones((3, 32), np.float32)},
            "'base_model.model.other.*no fact",
        ),
        ({}, {"model.embed_tokens.weight": np.ones((3, 32), np.float32)}, "which is no factor of a matrix of this"),
    ],
)
def test_a_wrong_folder_of_peft_is_refused_in_one_line(
    change: dict[str, Any], tensors: dict[str, Any], problem: str, base: Description, tmp_path: Path
) -> None:
    folder = written(tmp_path, AdapterSpec(rank=3, on=("attention",)), base, "peft")
    changed(folder, lambda config: config.update(change), tensors)
    with pytest.raises(CheckpointError, match=problem) as error:
        read_adapter(folder, base)
    assert "\n" not in str(error.value)


def test_a_wrong_folder_of_mlx_lm_is_refused_in_one_line(base: Description, tmp_path: Path) -> None:
    folder = written(tmp_path, AdapterSpec(rank=3, on=("attention",)), base, "mlx")
    for change, problem in (
        ({"fine_tune_type": "dora"}, "has fine_tune_type 'dora'; expected lora"),
        ({"fine_tune_type": "lora", "lora_parameters": {"rank": 3}}, "expected a dict with a positive scale"),
        ({"lora_parameters": {"scale": True}}, "expected a dict with a positive scale"),
    ):
        with pytest.raises(CheckpointError, match=problem):
            read_adapter(changed(folder, lambda config, change=change: config.update(change)), base)
    (folder / "adapters.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    (folder / "adapter_config.json").write_text('{"lora_parameters": {"scale": 1}}')
    with pytest.raises(CheckpointError, match="has no tensors of an adapter"):
        read_adapter(folder, base)


def test_what_a_layout_cannot_have_is_refused(base: Description, tmp_path: Path) -> None:
    latent = describe_checkpoint(write_checkpoint("deepseek_v3", tmp_path / "latent"))
    with pytest.raises(SpecError, match=r"layout mlx of deepseek_v3 has no module for layers.0.attention.w_key.lora_a"):
        written(tmp_path / "a", AdapterSpec(rank=2, on=("attention",)), latent, "mlx")
    with pytest.raises(SpecError, match=r"--adapter is 'gguf'; expected one of mlx, peft, peft-fused, vllm"):
        adapter_layout("gguf")
    with pytest.raises(MoezooError, match="no factor of a matrix of this model"):
        read_adapter(written(tmp_path / "b", AdapterSpec(rank=2, on=("attention",)), base, "peft"), latent)
