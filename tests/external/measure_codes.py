"""Memory of models whose published files are codes (gpt-oss, DeepSeek, ...), in codes and decoded; Linux only.

    python tests/external/measure_codes.py [FAMILY ...] [--backend jax mlx]

Writes a folder of each family with random codes, and loads it in a process of its own as `moezoo.load` does, and with
every parameter decoded when it is loaded. Prints a Markdown table: the size of the files, memory after loading and its
peak until eight tokens are computed, minus the memory of the process before, in MiB; and seconds to load.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.external.measure_memory import status_bytes  # noqa: E402
from tests.support.fixtures import read_fixture  # noqa: E402

COMMON = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 4, "vocab_size": 32_000}
QWEN3 = {
    **{"intermediate_size": 2048, "moe_intermediate_size": 512, "num_local_experts": 64, "head_dim": 64},
    **{"num_key_value_heads": 4},
}


def compressed(format, **weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    declared = {"quant_method": "compressed-tensors", "format": format, "config_groups": groups}
    return {"quantization_config": declared}


SIZES = {
    "gpt_oss_mxfp4": {
        **{"intermediate_size": 1024, "head_dim": 64, "num_key_value_heads": 4, "num_local_experts": 32},
        **{
            "num_experts_per_tok": 4,
            "experts_per_token": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    },
    "deepseek_v3_fp8": {
        **{"intermediate_size": 2048, "moe_intermediate_size": 512, "n_routed_experts": 64, "num_key_value_heads": 16},
        **{"kv_lora_rank": 256, "q_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64},
        **{"qk_head_dim": 96, "head_dim": 32, "num_nextn_predict_layers": 0},
    },
    "qwen3_moe_fp8_channels": QWEN3,
    "qwen3_moe_int4": QWEN3 | compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    "qwen3_moe_nvfp4": QWEN3 | compressed("nvfp4-pack-quantized", num_bits=4, type="float"),
}


def tensors_of(case, config):
    """Return dtype and shape of each stored tensor by name."""
    from moezoo.core.huggingface.family import family_of
    from moezoo.core.huggingface.fields import Fields
    from moezoo.core.huggingface.ledger import first_rules

    fields = Fields(config, "config.json")
    family = family_of(fields)
    rules = sorted(family.tensors, key=lambda rule: not rule.theirs.endswith("_blocks"))
    found = {}
    for name, placed in first_rules(rules, family.spec_of(fields)).items():
        *rows, size = placed.shape
        if name.endswith("_blocks"):
            found[name] = ("U8", (*rows, size // 32, 16))
            found[name.replace("_blocks", "_scales")] = ("U8", (*rows, size // 32))
        elif case.endswith("channels") and name.endswith("_proj.weight"):
            found[name] = ("F8_E4M3", placed.shape)
            found[f"{name}_scale"] = ("BF16", (placed.shape[0], 1))
        elif case.endswith(("int4", "nvfp4")) and name.endswith("_proj.weight"):
            is_float = case.endswith("nvfp4")
            found[f"{name}_packed"] = ("U8", (*rows, size // 2)) if is_float else ("I32", (*rows, size // 8))
            found[f"{name}_scale"] = ("F8_E4M3", (*rows, size // 16)) if is_float else ("BF16", (*rows, size // 32))
            if is_float:
                found[f"{name}_global_scale"] = ("F32", (1,))
        elif case.endswith("fp8") and name.endswith(("_proj.weight", "_with_mqa.weight")):
            found[name] = ("F8_E4M3", placed.shape)
            found[f"{name}_scale_inv"] = ("F32", tuple(-(-each // 128) for each in placed.shape))
        else:
            found[name] = ("F32" if name.endswith("correction_bias") else "BF16", placed.shape)
    return found


def write(case, folder):
    import ml_dtypes

    from moezoo.core.checkpoint.safetensors_file import write_stream
    from moezoo.core.checkpoint.safetensors_header import encode_header

    config = read_fixture(case.replace("_int4", "").replace("_nvfp4", "")).description["config"] | COMMON | SIZES[case]
    (folder / "config.json").write_text(json.dumps(config))
    tensors, draw = tensors_of(case, config), np.random.default_rng(0)

    def array(name, dtype, shape):
        if name.endswith(("_scales", "_scale_inv", "_scale")):
            known = {"U8": (120, np.uint8), "F32": (0.01, np.float32), "BF16": (0.01, ml_dtypes.bfloat16)}
            return np.full(shape, *known.get(dtype, (1, ml_dtypes.float8_e4m3fn)))
        if dtype in ("U8", "I32"):
            low, high = (0, 256) if dtype == "U8" else (-(2**31), 2**31)
            return draw.integers(low, high, shape, np.uint8 if dtype == "U8" else np.int32)
        values = np.resize(0.02 * draw.standard_normal(1 << 16, np.float32), shape)
        if dtype == "F8_E4M3":
            return (values * 100).astype(ml_dtypes.float8_e4m3fn)
        return values if dtype == "F32" else values.astype(ml_dtypes.bfloat16)

    stream = ((name, array(name, *form)) for name, form in tensors.items())
    write_stream(folder / "model.safetensors", encode_header(tensors, {"format": "pt"}), stream)


def measure(folder, backend, kind):
    """Load a folder in this process, and print the measurements as one line of JSON."""
    import moezoo
    from moezoo.backends import load_backend
    from moezoo.core.huggingface.checkpoint import LazyWeights

    if kind == "floats":
        LazyWeights.stored = LazyWeights.__getitem__
        LazyWeights.stored_bytes = lambda weights, name: None
    load_backend(backend)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, start = status_bytes()["VmRSS"], time.perf_counter()
    model = moezoo.load(folder, backend=backend)
    seconds, loaded = time.perf_counter() - start, status_bytes()
    model.forward(np.arange(8)[None])
    numbers = {"loaded": loaded["VmRSS"], "peak of loading": loaded["VmHWM"], "peak": status_bytes()["VmHWM"]}
    print(json.dumps({name: (value - before) / 2**20 for name, value in numbers.items()} | {"seconds": seconds}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", default=[*SIZES])
    parser.add_argument("--backend", nargs="+", default=["jax", "mlx"], choices=["jax", "mlx"])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(*given.measure)
        return
    print("| checkpoint | files, MiB | backend | held as | after loading | peak of loading | peak | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for case in given.case:
        with tempfile.TemporaryDirectory() as folder:
            write(case, Path(folder))
            size = (Path(folder) / "model.safetensors").stat().st_size / 2**20
            for backend in given.backend:
                for kind in ("floats", "codes"):
                    command = [sys.executable, __file__, "--measure", folder, backend, kind]
                    result = subprocess.run(command, capture_output=True, text=True, check=True)
                    told = json.loads(result.stdout.splitlines()[-1])
                    numbers = [size, *(told[name] for name in ("loaded", "peak of loading", "peak"))]
                    files, *cells = (f"{number:.0f}" for number in numbers)
                    cells = [f"`{case}`", files, backend, kind, *cells, f"{told['seconds']:.1f}"]
                    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
