"""Quantized tensors of folders in transformers' layout, by `quant_method` of config.json.

    method               codes                      beside them                                        mode
    mxfp4                X_blocks     U8            X_scales      E8M0                                 mxfp4
    fp8, mxfp8           X            F8_E4M3       X_scale_inv   float, of blocks or the tensor       fp8
                         X            F8_E4M3       X_scale_inv   E8M0, of 32 numbers of a row         mxfp8
                         X            I8, E2M1      X_scale_inv   E8M0, of 32 numbers of a row         mxfp4
    fbgemm_fp8           X            F8_E4M3       X_scale       float, of rows                       fp8
    compressed-tensors   X            F8_E4M3       X_scale       float, of blocks, rows, the tensor   fp8
                         X            F8_E4M3       X_scale       E8M0, of 32 numbers of a row         mxfp8
                         X            I8            X_scale       float, of rows or the tensor         signed
                         X_packed     I32           X_scale       float, of groups or rows             signed
                         X_packed     I32           X_scale and X_zero_point                           affine
                         X_packed     U8, E2M1      X_scale       E8M0, of 32 numbers of a row         mxfp4
                         X_packed     U8, E2M1      X_scale       E4M3, and X_global_scale             fp4
    modelopt             as compressed-tensors' F8_E4M3, and
                         X            U8, E2M1      X_scale       E4M3, and X_scale_2                  fp4
    gptq, awq            see moezoo.core.huggingface.gptq_quantization

For `fp8`, X_scale_inv may be X_scale, and `M.scale` or `M.qscale_weight` beside X = `M.weight`. Which of these a tensor
is follows from the dtypes and shapes of the files; config.json must declare its kind.

Source: transformers 5.23, `FineGrainedFP8Config` and `Fp8Dequantize`; compressed-tensors 0.20, `compressors`;
DeepSeek-V4 (`.scale`, E2M1 in I8); Inkling 2 (X_scale, MXFP8); NVIDIA Model Optimizer, Unified Hugging Face Checkpoint
(`weight_scale_2`).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moezoo.core.errors import CheckpointError, SpecError
from moezoo.core.huggingface.codecs import FP8_BLOCK, are_of_rows, fp8_shape, mxfp4_shape
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.folder import StoredTensor
from moezoo.core.huggingface.gptq_quantization import awq_tensors, gptq_tensors
from moezoo.core.huggingface.ledger import FLOATS, Packing, Readable
from moezoo.core.quantization.formats import GROUP_SIZES, WORD_BITS, QuantizationFormat

Tensors = Mapping[str, StoredTensor]

BLOCKS, _SCALES = "_blocks", "_scales"  # MXFP4 of gpt-oss
_SCALE_INV, _SCALE, _PACKED = "_scale_inv", "_scale", "_packed"
_GLOBAL, _SECOND, _ZERO, _SHAPE = "_global_scale", "_scale_2", "_zero_point", "_shape"
_BYTES = ("U8", "F8_E8M0")  # of E8M0
_FP8_SCALES = ("F32", "BF16", "F8_E8M0")
_MXFP4, _MXFP8 = QuantizationFormat("mxfp4", 4, 32), QuantizationFormat("mxfp8", 8, 32)
_FP4, _FP8 = QuantizationFormat("fp4", 4, 16), QuantizationFormat("fp8", 8, FP8_BLOCK)
_FETCH = "Fetch the checkpoint again."


def _mxfp4(config: Fields, tensors: Tensors) -> dict[str, Readable]:
    found = {}
    for name, tensor in tensors.items():
        scales = name.removesuffix(BLOCKS) + _SCALES
        if name.endswith(BLOCKS) and tensor.dtype == "U8" and scales in tensors:
            _check_dtype(tensors, scales, _BYTES)
            shape = mxfp4_shape(_where(tensors, name), tensor.shape, tensors[scales].shape)
            found[name] = Readable("BF16", shape, (name, scales), _MXFP4, "blocks")
    return found


def _fp8(config: Fields, tensors: Tensors) -> dict[str, Readable]:
    size = None if config.null("weight_block_size") else config.get("weight_block_size", [FP8_BLOCK, FP8_BLOCK])
    if size not in (None, [FP8_BLOCK, FP8_BLOCK], [1, _MXFP8.group_size]):
        raise config.refuse("weight_block_size", "[128, 128], [1, 32] or null")
    found = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        spellings = (name + _SCALE_INV, name + _SCALE, f"{module}.scale", f"{module}.qscale_weight")
        scales = next((other for other in spellings if other in tensors), None)
        if scales is not None and tensor.dtype == "F8_E4M3":
            found[name] = _of_e4m3(tensors, name, scales)
        elif scales is not None and tensor.dtype == "I8":
            found[name] = _of_e2m1(tensors, name, (name, scales), _MXFP4)
    return found


def _fbgemm(config: Fields, tensors: Tensors) -> dict[str, Readable]:
    return {
        name: _of_e4m3(tensors, name, name + _SCALE)
        for name, tensor in tensors.items()
        if tensor.dtype == "F8_E4M3" and name + _SCALE in tensors
    }


def _modelopt(config: Fields, tensors: Tensors) -> dict[str, Readable]:
    known = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")
    config.expect("quant_algo", *known, None)
    found = _fbgemm(config, tensors)
    for name, tensor in tensors.items():
        scales, second = name + _SCALE, name + _SECOND
        if tensor.dtype == "U8" and scales in tensors and second in tensors:
            _check_number(tensors, second)
            found[name] = _of_e2m1(tensors, name, (name, scales, second), _FP4, "multiplied")
    return found


def _compressed_tensors(config: Fields, tensors: Tensors) -> dict[str, Readable]:
    declared = _declared(config)
    found: dict[str, Readable] = {}
    for name, tensor in tensors.items():
        own = name.removesuffix(_PACKED)
        if own != name and own in tensors:
            raise CheckpointError(f"{_where(tensors, name)} is beside {own}: codes and numbers of one tensor. {_FETCH}")
        if own + _SCALE not in tensors:
            if own != name:
                raise CheckpointError(f"{tensor.file} has {name}, but no {own}{_SCALE}. {_FETCH}")
            continue
        match tensor.dtype, own != name:
            case "F8_E4M3", False:
                _check_declared(declared, "float", 8, tensors, name)
                found[own] = _of_e4m3(tensors, name, own + _SCALE)
            case ("I8", False) | ("I32", True):
                found[own] = _of_integers(tensors, name, own, [each for each in declared if each.type == "int"])
            case "U8", True:
                _check_declared(declared, "float", 4, tensors, name)
                if tensors[own + _SCALE].dtype in _BYTES:
                    found[own] = _of_e2m1(tensors, own, (name, own + _SCALE), _MXFP4)
                else:
                    _check_number(tensors, own + _GLOBAL)
                    stored = (name, own + _SCALE, own + _GLOBAL)
                    found[own] = _of_e2m1(tensors, own, stored, _FP4, "divided")
    return found


METHODS: Mapping[str, Callable[[Fields, Tensors], dict[str, Readable]]] = {
    "mxfp4": _mxfp4,
    "fp8": _fp8,
    "mxfp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "gptq": gptq_tensors,
    "awq": awq_tensors,
}


def transformers_tensors(config: Fields, tensors: Tensors) -> dict[str, Readable]:
    """Return the tensors quantized according to a `quantization_config`, by the name that their numbers would have.

    Raises SpecError for an unsupported method, CheckpointError for codes and scales that do not belong together.
    """
    method = config.text("quant_method", "none")
    if method not in METHODS:
        raise SpecError(
            f"quantization_config.quant_method is {method!r:.80}; expected one of {', '.join(METHODS)}, or mlx-lm's "
            f"quantization ({config.where}). Use an unquantized version of the checkpoint, or mlx-lm's."
        )
    return METHODS[method](config, tensors)


def _of_e4m3(tensors: Tensors, name: str, scales: str) -> Readable:
    tensor, beside = tensors[name], tensors[scales]
    shape = tensor.shape
    groups = (*shape[:-1], -(-shape[-1] // _MXFP8.group_size)) if shape else ()
    if beside.dtype == "U8" or (beside.dtype == "F8_E8M0" and beside.shape == groups):
        if not shape or beside.shape != groups or shape[-1] % _MXFP8.group_size:
            raise _misfit(tensors, name, scales, "[..., out, in] and [..., out, in / 32]")
        return Readable("F32", shape, (name, scales), _MXFP8, "bytes")
    _check_dtype(tensors, scales, _FP8_SCALES)
    return Readable("F32", fp8_shape(_where(tensors, name), shape, beside.shape), (name, scales), _FP8, "fp8")


def _of_e2m1(
    tensors: Tensors, name: str, stored: tuple[str, ...], format: QuantizationFormat, packing: Packing = "bytes"
) -> Readable:
    """Return a tensor of two E2M1 codes per byte, low nibble first, with scales [..., out, groups]."""
    _check_dtype(tensors, stored[1], _BYTES if format == _MXFP4 else ("F8_E4M3",))
    shape, scales = tensors[stored[0]].shape, tensors[stored[1]].shape
    size = 2 * shape[-1] if shape else 0
    if len(shape) < 2 or size % format.group_size or scales != (*shape[:-1], format.groups(size)):
        expected = f"[..., out, in / 2] and [..., out, in / {format.group_size}]"
        raise _misfit(tensors, stored[0], stored[1], expected)
    return Readable("F32", (*shape[:-1], size), stored, format, packing)


class _Integers(NamedTuple):
    """Weights as a group of compressed-tensors' config declares them; `group_size`: None for scales of rows or more."""

    type: str
    num_bits: int
    group_size: int | None
    symmetric: bool


def _of_integers(tensors: Tensors, name: str, own: str, declared: list[_Integers]) -> Readable:
    """Return a tensor of integers plus half their range, packed densely, low bits first; or of I8."""
    tensor, scales, zero = tensors[name], own + _SCALE, own + _ZERO
    fitting = {
        format
        for each in declared
        if each.symmetric == (zero not in tensors)
        if (format := _fitting(tensor, tensors[scales].shape, each)) is not None
    }
    if len(fitting) != 1:
        kinds = ", ".join(f"{each.num_bits} bits, groups {each.group_size or 'of rows'}" for each in declared) or "none"
        which = "several" if fitting else "none"
        zeros = "with" if zero in tensors else "without"
        raise CheckpointError(
            f"{_where(tensors, name)} is {tensor.dtype} {list(tensor.shape)}, its scales {list(tensors[scales].shape)}"
            f", {zeros} zero points; {which} of the integers that config.json declares fit ({kinds}). {_FETCH}"
        )
    format = fitting.pop()
    _check_dtype(tensors, scales, tuple(FLOATS))
    shape = (*tensor.shape[:-1], _size(tensor, format.bits))
    told = (own + _SHAPE,) if own + _SHAPE in tensors else ()
    if zero not in tensors:
        return Readable("F32", shape, (name, scales, *told), format, "signed")
    # Products of 16-bit scales with integers are exact in float32: scale * code - scale * zero has no rounding.
    _check_dtype(tensors, scales, ("F16", "BF16"))
    of_words = tensor.dtype == "I32"
    rows = -(-shape[0] * format.bits // WORD_BITS) if of_words else shape[0]
    expected = ("I32" if of_words else "I8", (rows, *tensors[scales].shape[1:]))
    if len(shape) != 2 or (tensors[zero].dtype, tensors[zero].shape) != expected:
        got = f"{tensors[zero].dtype} {list(tensors[zero].shape)}"
        raise CheckpointError(f"{_where(tensors, zero)} is {got}; expected {expected[0]} {list(expected[1])}. {_FETCH}")
    affine = QuantizationFormat("affine", format.bits, format.group_size)
    return Readable("F32", shape, (name, scales, zero, *told), affine, "zero points")


def _fitting(tensor: StoredTensor, scales: tuple[int, ...], declared: _Integers) -> QuantizationFormat | None:
    """Return the format if codes and scales have the shapes of what is declared."""
    bits, size = declared.num_bits, _size(tensor, declared.num_bits)
    if len(tensor.shape) < 2 or (tensor.dtype == "I8" and bits != 8):
        return None
    if declared.group_size is None:
        fits = are_of_rows((*tensor.shape[:-1], size), scales)
    else:
        fits = size % declared.group_size == 0 and scales == (*tensor.shape[:-1], size // declared.group_size)
    if not fits:
        return None
    repeated = next(
        (group for group in reversed(GROUP_SIZES["signed"]) if size % group == 0), GROUP_SIZES["signed"][-1]
    )
    return QuantizationFormat("signed", bits, declared.group_size or repeated)


def _size(tensor: StoredTensor, bits: int) -> int:
    return tensor.shape[-1] * (WORD_BITS if tensor.dtype == "I32" else 8) // bits if tensor.shape else 0


def _declared(config: Fields) -> list[_Integers]:
    """Return what the groups of a config of compressed-tensors declare of weights. Raises SpecError by field."""
    formats = (
        *("float-quantized", "naive-quantized", "int-quantized", "pack-quantized", "nvfp4-pack-quantized"),
        *("mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision"),
    )
    groups = config.inside("config_groups")
    if config.get("format") not in formats or groups is None:
        raise config.refuse("format", f"one of {', '.join(formats)}, with config_groups")
    for other in ("transform_config", "sparsity_config"):
        inner = config.inside(other)
        if inner is not None and inner.raw and inner.get("format") != "dense":
            raise config.refuse(other, "none: rotated or sparse weights are not supported")
    return [_weights(groups, name) for name in groups.raw]


def _weights(groups: Fields, name: str) -> _Integers:
    inner = groups.inside(name)
    weights = None if inner is None else inner.inside("weights")
    if weights is None:
        raise groups.refuse(name, "an object with weights")
    kind, bits = weights.text("type", "int"), weights.count("num_bits", 8)
    weights.expect("type", "int", "float")
    weights.expect("num_bits", 4, 8)
    weights.expect("block_structure", [FP8_BLOCK, FP8_BLOCK], f"{FP8_BLOCK}x{FP8_BLOCK}")
    weights.expect("actorder", "weight", "static", False)
    symmetric = weights.flag("symmetric", True)
    if kind == "float":
        weights.expect("symmetric", True)
        return _Integers(kind, bits, None, symmetric)
    weights.expect("strategy", "tensor", "channel", "group")
    size = weights.get("group_size")
    if weights.get("strategy", "tensor" if size in (None, -1) else "group") != "group":
        return _Integers(kind, bits, None, symmetric)
    if size not in GROUP_SIZES["signed"]:
        raise weights.refuse("group_size", " or ".join(map(str, GROUP_SIZES["signed"])))
    return _Integers(kind, bits, size, symmetric)


def _check_declared(declared: list[_Integers], type: str, bits: int, tensors: Tensors, name: str) -> None:
    if not any((each.type, each.num_bits) == (type, bits) for each in declared):
        raise CheckpointError(
            f"{_where(tensors, name)} is {tensors[name].dtype}, but config.json declares no {type} weights of {bits} "
            f"bits. Use the config.json that belongs to these files."
        )


def _check_number(tensors: Tensors, name: str) -> None:
    """Raise unless a tensor is one float32 number."""
    there = tensors.get(name)
    if there is None or there.dtype != "F32" or there.shape not in ((), (1,)):
        got = "missing" if there is None else f"{there.dtype} {list(there.shape)}"
        raise CheckpointError(f"{name} is {got}; expected one F32 number, the scale of a tensor. {_FETCH}")


def _where(tensors: Tensors, name: str) -> str:
    return f"{tensors[name].file}: {name}"


def _misfit(tensors: Tensors, name: str, scales: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{_where(tensors, name)} has shape {list(tensors[name].shape)} and its scales {tensors[scales].dtype} "
        f"{list(tensors[scales].shape)}; expected {expected}. {_FETCH}"
    )


def _check_dtype(tensors: Tensors, scales: str, expected: tuple[str, ...]) -> None:
    if tensors[scales].dtype not in expected:
        raise CheckpointError(
            f"{_where(tensors, scales)} is {tensors[scales].dtype}; expected {' or '.join(expected)} for scales. Fetch "
            "the checkpoint again."
        )
