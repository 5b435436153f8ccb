"""Damaged and hostile quantized folders: an error of one line with names, or a model that computes; never a crash."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import moezoo
from moezoo.cli.main import main
from moezoo.core.errors import MoezooError
from moezoo.core.huggingface.checkpoint import open_checkpoint
from tests.huggingface.test_mlx_folders import FOLDERS, ROOT
from tests.support.hostile import at_most, json_mutant, mutant

Header = dict[str, Any]
GATE = "model.layers.1.mlp.gate"
NORM = "model.layers.0.self_attn.q_norm.weight"
UP = "model.layers.1.mlp.switch_mlp.up_proj"


def read_file(path: Path) -> tuple[Header, bytes]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def write_file(path: Path, header: Header, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def changed(
    tmp_path: Path, header: Callable[[Header], None] = lambda _: None, config: Callable[[Any], None] = lambda _: None
) -> Path:
    """Return a copy of a 4-bit folder with another header of its file, or another `quantization`.

    Data of removed tensors stays, in a tensor of bytes with the name of a buffer, so that the file is valid.
    """
    folder = tmp_path / "folder"
    shutil.copytree(ROOT / "qwen3_moe_4bit_router8", folder)
    entries, data = read_file(folder / "model.safetensors")
    before = dict(entries)
    header(entries)
    for name in before.keys() - entries.keys():
        start, end = before[name]["data_offsets"]
        if all(entry.get("data_offsets") != [start, end] for entry in entries.values()):
            spare = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
            entries[f"model.layers.{len(entries)}.rotary_emb.inv_freq"] = spare
    write_file(folder / "model.safetensors", entries, data)
    values = json.loads((folder / "config.json").read_text())
    config(values["quantization"])
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def renamed(old: str, new: str) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        header[new] = header.pop(old)

    return change


def with_form(name: str, dtype: str, shape: list[int]) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        header[name] |= {"dtype": dtype, "shape": shape}

    return change


HEADERS = {
    "no scales": (lambda header: header.pop(f"{UP}.scales"), f"has {UP}.biases, but no {UP}.scales"),
    "no biases": (lambda header: header.pop(f"{UP}.biases"), f"{UP}.scales in 4-bit affine, .* but no {UP}.biases"),
    "no codes": (lambda header: header.pop(f"{UP}.weight"), f"has {UP}.scales, but no {UP}.weight"),
    "biases alone": (renamed(NORM, "x.biases"), "has x.biases, but no x.scales"),
    "scales of a norm": (renamed(NORM, "model.norm.scales"), "has model.norm.scales .*, but no model.norm.biases"),
    "global scale": (renamed(NORM, f"{UP}.global_scale"), "global_scale scales a whole nvfp4 matrix"),
    "other words": (
        with_form(f"{UP}.weight", "U32", [8, 32, 16]),
        r"shape \[8, 32, 16\] and its scales \[8, 64, 1\]",
    ),
    "one axis": (with_form(f"{UP}.weight", "U32", [8 * 64 * 8]), r"has shape \[4096\] and its scales"),
    "other groups": (with_form(f"{UP}.scales", "BF16", [8, 32, 2]), r"scales is BF16 \[8, 32, 2\] and its biases BF16"),
    "codes of floats": (with_form(f"{UP}.weight", "F32", [8, 64, 8]), "is F32; expected U32 beside scales"),
    "integer scales": (with_form(f"{UP}.scales", "I16", [8, 64, 1]), "scales is I16 .* expected F32 or F16 or BF16"),
}

CONFIGS: dict[str, tuple[Callable[[Any], None], str]] = {
    "mode": (lambda own: own.update(mode="int4"), 'mode is "int4"; expected one of affine, mxfp4, mxfp8, nvfp4'),
    "mode of files": (lambda own: own.update(mode="fp8"), 'mode is "fp8"'),
    "bits": (lambda own: own.update(bits=7), "bits of quantization mode affine is 7; expected 2 or 3 or 4"),
    "group": (lambda own: own.update(group_size=48), "group_size of quantization mode affine is 48"),
    "other bits": (lambda own: own.update(bits=8), r"expected \[..., out, in \* 8 / 32\]"),
    "other group": (lambda own: own.update(group_size=32), r"expected .* \[..., out, in / 32\] in 4-bit affine"),
    "biases in mxfp4": (
        lambda own: own.update(mode="mxfp4", group_size=32),
        "in 4-bit mxfp4, groups of 32, but also .*biases",
    ),
    "false": (lambda own: own.update({GATE: False}), f"{GATE}.scales, but config.json says that it is not quantized"),
    "a number for a module": (lambda own: own.update({GATE: 3}), f"{GATE} is 3; expected an object or false"),
    "unknown option": (lambda own: own.update({GATE: {"bits": 8, "zero": 1}}), "zero 1"),
    "listed, not quantized": (
        lambda own: own.update({"model.norm": {"bits": 4, "group_size": 64}}),
        "has model.norm.weight, BF16 .*, but no model.norm.scales",
    ),
}


@pytest.mark.parametrize(("change", "message"), HEADERS.values(), ids=HEADERS)
def test_tensors_that_do_not_belong_together(change: Callable[[Header], None], message: str, tmp_path: Path) -> None:
    with pytest.raises(MoezooError, match=message) as refused:
        open_checkpoint(changed(tmp_path, change))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("change", "message"), CONFIGS.values(), ids=CONFIGS)
def test_declarations_that_do_not_fit(change: Callable[[Any], None], message: str, tmp_path: Path) -> None:
    with pytest.raises(MoezooError, match=message) as refused:
        open_checkpoint(changed(tmp_path, config=change))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", ["aqlm", "bitsandbytes", "quark"])
def test_other_quantizations_are_refused_by_name(method: str, tmp_path: Path) -> None:
    folder = changed(tmp_path)
    values = json.loads((folder / "config.json").read_text())
    del values["quantization"]
    values["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(MoezooError, match=f"quant_method is '{method}'; expected one of mxfp4, fp8, .*, or mlx-lm's"):
        open_checkpoint(folder)


def test_gguf_is_named(tmp_path: Path) -> None:
    shutil.copy(ROOT / "mixtral_8bit" / "config.json", tmp_path)
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(MoezooError, match="has its weights as GGUF"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("folder", "name", "data", "parameter"),
    [
        ("qwen3_moe_4bit_router8", f"{UP}.scales", b"\xc0\x7f", "layers.1.moe.experts.w_up"),
        ("qwen3_moe_4bit_router8", f"{GATE}.biases", b"\x80\xff", "layers.1.moe.router.w_router"),
        ("minimax_m2_mxfp4", "lm_head.scales", b"\xff", "head.w_head"),
        ("mellum_nvfp4", "lm_head.scales", b"\x7f", "head.w_head"),
    ],
)
def test_damaged_scales_are_named(folder: str, name: str, data: bytes, parameter: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / folder, tmp_path / "folder")
    header, content = read_file(tmp_path / "folder" / "model.safetensors")
    start, _ = header[name]["data_offsets"]
    content = content[:start] + data + content[start + len(data) :]
    write_file(tmp_path / "folder" / "model.safetensors", header, content)
    weights = open_checkpoint(tmp_path / "folder").weights
    weights.stored(parameter)
    assert list(weights.nonfinite) == [parameter]
    assert not np.isfinite(weights[parameter]).all()
    described = CliRunner().invoke(main, ["describe", str(tmp_path / "folder"), "--json"])
    assert f"NaN or infinity in {parameter}" in json.loads(described.output)["config"]["notes"][-1]


# --- mutations -------------------------------------------------------------------------------------------------------


def mutate(folder: Path, draw: random.Random) -> None:
    """Damage a folder: its declarations, the header of its file, or scales and codes."""
    path, config = folder / "model.safetensors", folder / "config.json"
    header, data = read_file(path)
    names = [name for name in header if name != "__metadata__"]
    one, other = draw.choice(names), draw.choice(names)
    match draw.randrange(8):
        case 0:
            config.write_bytes(json_mutant(config.read_bytes(), draw))
        case 1:
            values = json.loads(config.read_bytes())
            for name in ("quantization", "quantization_config"):
                values[name] = json.loads(json_mutant(json.dumps(values[name]).encode(), draw))
            config.write_text(json.dumps(values))
        case 2:
            header[one], header[other] = header[other], header[one]
        case 3:
            end = draw.choice([".scales", ".biases", ".weight", ".bias", ".global_scale", ""])
            header[one.rpartition(".")[0] + end] = header.pop(one)
        case 4:
            shape = header[one]["shape"]
            header[one]["shape"] = draw.choice([shape[::-1], [*shape, 1], [1, *shape], [int(np.prod(shape))]])
        case 5:
            widths = {"U8": ["I8", "F8_E4M3", "F8_E8M0", "BOOL"], "U32": ["F32", "I32"], "F32": ["U32"]}
            dtype = header[one]["dtype"]
            header[one]["dtype"] = draw.choice(widths.get(dtype, ["F16", "BF16", "U16", "I16"]))
        case 6:
            start, end = header[one]["data_offsets"]
            data = data[:start] + draw.randbytes(end - start) + data[end:]
        case _:
            path.write_bytes(mutant(path.read_bytes(), draw))
            return
    write_file(path, header, data)


def problem(folder: Path, backends: tuple[str, ...]) -> str | None:
    """Return why a folder is refused, or None if all backends load and compute with it."""
    ids = np.arange(8, dtype=np.int32)[None]
    try:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.weights:
            checkpoint.weights.stored(name)
        for backend in backends:
            assert moezoo.load(folder, backend=backend).forward(ids).logits.shape[:2] == (1, 8)
    except MoezooError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("attempts", "backends"),
    [
        pytest.param(100, (), id="opened"),
        pytest.param(2000, ("mlx",), id="mlx", marks=pytest.mark.release),
        pytest.param(2000, ("jax",), id="jax", marks=pytest.mark.release),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales are large
def test_mutated_folders_are_refused_or_read(attempts: int, backends: tuple[str, ...], tmp_path: Path) -> None:
    held = set()
    for attempt in range(attempts):
        draw = random.Random(f"{backends} {attempt}")
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT / draw.choice(FOLDERS), folder)
        mutate(folder, draw)
        with at_most(60):
            message = problem(folder, backends)
        held.add(message is None)
        assert message is None or ("\n" not in message and len(message) < 2000), message
    assert held == {True, False}
