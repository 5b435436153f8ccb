"""A piece of a matrix in each format of compressed-tensors, ModelOpt, transformers and gptqmodel, and its numbers.

    python tests/external/make_quantized_pieces.py [--check]

Writes tests/data/huggingface/quantized_pieces.npz: per kind the stored arrays, `KIND ENDING` (floats of 8 and 16 bits
as unsigned integers), and `KIND values`, bfloat16 bits of the numbers that the other implementation decodes:
compressed-tensors by its compressors, transformers by `Fp8Dequantize` (E2M1 as DeepSeek-V4 has it, MXFP8 in bytes),
gptqmodel by `TorchLinear` (GPTQ) and `dequantize_gemm` (AWQ), and for ModelOpt torch's float8 and a table of E2M1.
`--check` compares with the file in place of writing it. Needs torch, transformers, compressed-tensors 0.20 and
gptqmodel 7.7.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

PATH = Path(__file__).parents[1] / "data/huggingface/quantized_pieces.npz"
ROWS, SIZE = 12, 64
COLUMNS, GROUP = 32, 32  # of GPTQ and AWQ, whose codes are of columns
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

INTEGERS = {"type": "int", "symmetric": True}
FLOATS = {"type": "float", "symmetric": True}
COMPRESSED = {
    "int4_group": ("pack-quantized", INTEGERS | {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int8_group": ("pack-quantized", INTEGERS | {"num_bits": 8, "strategy": "group", "group_size": 32}),
    "int4_row": ("pack-quantized", INTEGERS | {"num_bits": 4, "strategy": "channel"}),
    "int4_zero": (
        "pack-quantized",
        {"type": "int", "symmetric": False, "num_bits": 4, "strategy": "group", "group_size": 32},
    ),
    "int8": ("int-quantized", INTEGERS | {"num_bits": 8, "strategy": "channel"}),
    "int8_zero": ("int-quantized", {"type": "int", "symmetric": False, "num_bits": 8, "strategy": "channel"}),
    "nvfp4": ("nvfp4-pack-quantized", FLOATS | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}),
    "mxfp4": ("mxfp4-pack-quantized", FLOATS | {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "mxfp8": (
        "mxfp8-quantized",
        FLOATS | {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
}


def parameters_of(weight, kind, arguments):
    """Return scales and zero points of groups, rows, or both."""
    group = arguments.get("group_size") or SIZE
    groups = weight.float().reshape(ROWS, -1, group)
    low, high, largest = groups.amin(-1), groups.amax(-1), groups.abs().amax(-1)
    if kind in ("mxfp4", "mxfp8"):
        return {"weight_scale": 2.0 ** torch.ceil(torch.log2(largest / (6 if kind == "mxfp4" else 448)))}
    if kind == "nvfp4":
        factor = torch.tensor([6 * 448 / largest.max()])
        return {"weight_scale": (largest / 6 * factor).to(torch.float8_e4m3fn).float(), "weight_global_scale": factor}
    most = 2 ** (arguments["num_bits"] - 1)
    if arguments["symmetric"]:
        return {"weight_scale": (largest / (most - 0.5)).bfloat16()}
    scale = ((high - low) / (2 * most - 1)).bfloat16()
    zero = torch.clamp(torch.round(-most - low / scale.float()), -most, most - 1).to(torch.int8)
    return {"weight_scale": scale, "weight_zero_point": zero}


def compressed(kind, weight):
    """Return what compressed-tensors stores of a weight, and what it decodes that to."""
    name, arguments = COMPRESSED[kind]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    compressor = BaseCompressor.get_value_from_registry(name)
    stored = compressor.compress({"weight": weight, **parameters_of(weight, kind, arguments)}, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"]


def modelopt(weight):
    largest = weight.float().reshape(ROWS, -1, 16).abs().amax(-1)
    second = largest.max() / (6 * 448)
    scale = (largest / 6 / second).to(torch.float8_e4m3fn)
    codes = torch.randint(0, 256, (ROWS, SIZE // 2), dtype=torch.uint8)
    number = E2M1[torch.stack([codes & 15, codes >> 4], -1).long()].reshape(ROWS, -1, 16)
    values = (number * (scale.float() * second)[..., None]).reshape(ROWS, SIZE)
    return {"weight": codes, "weight_scale": scale, "weight_scale_2": second}, values


def of_transformers(codes):
    """Return codes with E8M0 scales of 32 numbers as bytes, and the numbers of `Fp8Dequantize`."""
    scale = torch.randint(110, 130, (ROWS, SIZE // 32), dtype=torch.uint8)
    values = Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=torch.bfloat16)
    return {"weight": codes, "weight_scale_inv": scale}, values


def words(*shape):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def gptq(bits, *, symmetric=False, version=1, reordered=False):
    """Return codes packed along inputs, and the numbers of gptqmodel; float32 scales, so that nothing is rounded.

    `reordered`: groups are of inputs in any order, as `desc_act` makes them.
    """
    groups, half = SIZE // GROUP, 2 ** (bits - 1)
    zero = sum((half - (version == 1)) << place for place in range(0, 32, bits))
    stored = {
        "qweight": words(SIZE * bits // 32, COLUMNS),
        "qzeros": words(groups, COLUMNS * bits // 32) & (0x77777777 if bits == 4 else 0x7F7F7F7F),
        "scales": (torch.rand(groups, COLUMNS) * 0.01 + 0.001).half(),
        "g_idx": torch.arange(SIZE, dtype=torch.int32) // GROUP,
    }
    if reordered:
        stored["g_idx"] = stored["g_idx"][torch.randperm(SIZE)]
    if symmetric:
        stored["qzeros"] = torch.full_like(stored["qzeros"], zero - 2**32 if zero >= 2**31 else zero)
    linear = TorchLinear(bits, GROUP, sym=symmetric, desc_act=reordered, in_features=SIZE, out_features=COLUMNS)
    for name, tensor in stored.items():
        setattr(linear, name, tensor.float() if name == "scales" else tensor.clone())
    if version == 1:
        convert_gptq_v1_to_v2_format_module(linear, bits, torch.int32)
    linear.post_init()
    return stored, linear.eval().dequantize_weight().T


def awq():
    groups = SIZE // GROUP
    stored = {"qweight": words(SIZE, COLUMNS // 8), "qzeros": words(groups, COLUMNS // 8)}
    stored["scales"] = (torch.rand(groups, COLUMNS) * 0.01 + 0.001).half()
    return stored, dequantize_gemm(stored["qweight"], stored["qzeros"], stored["scales"].float(), 4, GROUP).T


def pieces():
    torch.manual_seed(21)
    found = {}
    for kind in COMPRESSED:
        found[kind] = compressed(kind, torch.randn(ROWS, SIZE).mul(0.05).bfloat16())
    found["modelopt"] = modelopt(torch.randn(ROWS, SIZE) * 0.05)
    found["fp4"] = of_transformers(torch.randint(-128, 128, (ROWS, SIZE // 2), dtype=torch.int8))
    found["fp8_bytes"] = of_transformers(torch.randn(ROWS, SIZE).to(torch.float8_e4m3fn))
    found |= {"gptq": gptq(4), "gptq8": gptq(8), "gptq_symmetric": gptq(4, symmetric=True)}
    found |= {"gptq_v2": gptq(4, version=2), "awq": awq()}
    found |= {"gptq_reordered": gptq(4, reordered=True), "gptq8_reordered": gptq(8, symmetric=True, reordered=True)}
    arrays = {}
    for kind, (stored, values) in found.items():
        for name, tensor in (stored | {"values": values.bfloat16()}).items():
            tensor = tensor.detach().contiguous()
            if tensor.dtype == torch.float8_e4m3fn:
                tensor = tensor.view(torch.uint8)
            elif tensor.dtype == torch.bfloat16:
                tensor = tensor.view(torch.uint16)
            arrays[f"{kind} {name}"] = tensor.numpy()
    return arrays


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arrays = pieces()
    if not parser.parse_args().check:
        np.savez_compressed(PATH, **arrays)
        print(f"{PATH}: {len(arrays)} arrays, {PATH.stat().st_size} bytes")
        return
    with np.load(PATH) as known:
        different = [name for name in arrays if not np.array_equal(known[name], arrays[name])]
        sys.exit(f"differ: {', '.join(different)}" if different or set(known) != set(arrays) else 0)


if __name__ == "__main__":
    main()
