"""Write each family in mlx-lm's layout, in floats and quantized, and compare with what mlx-lm makes of it.

    python tests/external/write_mlx.py [CASE ...] [--group-size 32] [--quantize 4bit] [--mode affine]

A case is a fixture of tests/data/huggingface, with the config.json of transformers 5; by default every one.
`moezoo convert` writes it twice, with `--layout mlx` and with `--quantize`; mlx-lm opens both folders in float32 on the
CPU. Prints a Markdown table: the largest difference between its logits and moezoo's on the same folder, and how many
stored tensors of the quantized folder differ from those that mlx-lm makes when it quantizes the float folder with the
same formats. Needs moezoo, mlx and mlx-lm in one environment. Fails if a difference is neither below the tolerance nor
explained in writings/huggingface.md.
"""

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import moezoo  # noqa: E402
from moezoo.cli.main import main as command  # noqa: E402
from tests.support.fixtures import cases, read_fixture, write_checkpoint  # noqa: E402

TOLERANCE = 5e-4
EXPLAINED = (  # in writings/huggingface.md
    *(
        "deepseek_v3",
        "deepseek_v3_fp8",
        "deepseek_v3_half_split",
        "dots1",
        "ernie4_5_moe",
        "glm4_moe_lite_no_query_rank",
    ),
    *("gpt_oss", "gpt_oss_mxfp4", "mimo_v2_flash", "olmoe", "phimoe", "qwen3_moe_rope_linear", "qwen3_moe_rope_llama3"),
    *("qwen3_moe_rope_longrope_short", "qwen3_moe_rope_yarn", "solar_open_yarn"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="*")
    parser.add_argument("--quantize", default="4bit")
    parser.add_argument("--mode", default="affine")
    parser.add_argument("--group-size", default="32")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    quantize = ["--quantize", options.quantize, "--mode", options.mode, "--group-size", options.group_size]
    print(f"| checkpoint | floats | {options.quantize} {options.mode} | other tensors |\n|---|---|---|---|")
    agree = True
    for case in options.case or cases():
        with tempfile.TemporaryDirectory() as folder:
            agree &= row(case, Path(folder), quantize)
    return 0 if agree else 1


def row(case: str, folder: Path, quantize: list[str]) -> bool:
    """Print a line of the table, and return whether everything agrees that should."""
    write_checkpoint(case, folder / "source")
    cells, agree = [], True
    for name, words in (("floats", ["--layout", "mlx"]), ("codes", quantize)):
        result = CliRunner().invoke(command, ["convert", str(folder / "source"), str(folder / name), *words])
        if result.exit_code:
            cells.append(f"moezoo refuses: {result.output.strip().splitlines()[-1][:120]}")
            continue
        try:
            difference = largest_difference(case, folder / name)
            cells.append(f"{difference:.1e}")
            agree &= difference < TOLERANCE or case in EXPLAINED
        except Exception as error:
            cells.append(f"mlx-lm refuses: {(str(error).splitlines() or [type(error).__name__])[0][:120]}")
    if not any("refuses" in cell for cell in cells):
        other, number = other_tensors(folder / "floats", folder / "codes")
        cells.append(f"{len(other)} of {number}" + (f": {other[0]}" if other else ""))
        agree &= not other
    print(f"| {case} | " + " | ".join(cells) + " |", flush=True)
    return agree


def largest_difference(case: str, folder: Path) -> float:
    """Return the largest difference between the logits of mlx-lm and moezoo on a folder."""
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model, load_model

    ids = read_fixture(case).expected["input_ids"]
    ours = moezoo.load(folder, backend="mlx").forward(ids).logits
    model = dequantize_model(load_model(folder)[0])  # rounds to the scales' dtype, as it computes in that
    model.apply(lambda x: x.astype(mx.float32) if x.dtype in (mx.float16, mx.bfloat16) else x)
    theirs = np.array(model(mx.array(ids)).astype(mx.float32))
    return float(np.nan_to_num(np.abs(theirs - ours), nan=np.inf).max())


def other_tensors(floats: Path, codes: Path) -> tuple[list[str], int]:
    """Return the tensors of a quantized folder that mlx-lm makes otherwise from the float folder, and their number."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model, quantize_model

    formats = dict(json.loads((codes / "config.json").read_text())["quantization"])
    outer = {name: formats.pop(name) for name in ("group_size", "bits", "mode")}
    written = {}
    for file in codes.glob("*.safetensors"):
        written |= mx.load(str(file))
    quantized = {name.removesuffix(".scales") for name in written if name.endswith(".scales")}

    def chosen(path: str, module: object) -> dict[str, object] | bool:
        return dict(formats.get(path, outer)) if path in quantized else False

    model, config = load_model(floats)
    model, _ = quantize_model(model, config, outer["group_size"], outer["bits"], outer["mode"], quant_predicate=chosen)
    made = dict(tree_flatten(model.parameters()))
    names = sorted({*written, *made})
    other = [name for name in names if name not in made or name not in written or not equal(made[name], written[name])]
    return other, len(names)


def equal(one: object, other: object) -> bool:
    import mlx.core as mx

    return one.dtype == other.dtype and one.shape == other.shape and bool(mx.array_equal(one, other).item())


if __name__ == "__main__":
    sys.exit(main())
