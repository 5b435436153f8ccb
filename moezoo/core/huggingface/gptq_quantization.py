"""Quantized tensors of GPTQ and AWQ: codes of a column [in, out], packed along inputs (GPTQ) or outputs (AWQ).

    M.qweight   I32 [in * bits / 32, out]; AWQ: [in, out / 8]
    M.qzeros    I32 [groups, out * bits / 32]: the code of zero; in the format `gptq` (not `gptq_v2`) minus one
    M.scales    F16 or BF16 [groups, out]
    M.g_idx     I32 [in]: the group of each input; that of consecutive inputs, unless `desc_act` is true

    value = scale * (code - zero)

Eight codes of a word of AWQ are those of outputs 0, 2, 4, 6, 1, 3, 5, 7. Symmetric GPTQ has the code 2^(bits-1) as
zero: its codes are of mode signed. Others are affine, with the bias -scale * zero in float32, which is exact for 16-bit
scales.

Source: gptqmodel 7.7, `TorchLinear.dequantize_weight` and `dequantize_gemm`; Frantar et al. 2022, arXiv 2210.17323;
Lin et al. 2023, arXiv 2306.00978.
"""

from collections.abc import Mapping

from moezoo.core.errors import CheckpointError
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.folder import StoredTensor
from moezoo.core.huggingface.ledger import Packing, Readable
from moezoo.core.quantization.formats import GROUP_SIZES, WORD_BITS, QuantizationFormat

_CODES, _SCALES, _ZEROS, _GROUPS = ".qweight", ".scales", ".qzeros", ".g_idx"
_FETCH = "Fetch the checkpoint again."


def gptq_tensors(config: Fields, tensors: Mapping[str, StoredTensor]) -> dict[str, Readable]:
    """Return the tensors quantized by GPTQ, by the name that their numbers would have.

    Raises SpecError for what is not supported, CheckpointError for tensors that do not belong together.
    """
    config.expect("bits", 4, 8)
    config.expect("pack_dtype", "int32")
    config.expect("is_marlin_format", False)
    dynamic = config.inside("dynamic")
    if dynamic is not None and any(not name.startswith("-") for name in dynamic.raw):
        raise config.refuse("dynamic", "only modules that are not quantized, which begin with -:")
    packing = config.choice("checkpoint_format", {"gptq": "gptq", "gptq_v2": "gptq v2"}, "gptq")
    by_activation = config.flag("desc_act", False)
    return _tensors(config, tensors, packing, symmetric=config.flag("sym", True), reordered=by_activation)


def awq_tensors(config: Fields, tensors: Mapping[str, StoredTensor]) -> dict[str, Readable]:
    """Return the tensors quantized by AWQ, as `gptq_tensors`."""
    config.expect("bits", 4)
    config.expect("version", "gemm", "GEMM")
    config.expect("zero_point", True)
    return _tensors(config, tensors, "awq", symmetric=False)


def _tensors(
    config: Fields, tensors: Mapping[str, StoredTensor], packing: Packing, *, symmetric: bool, reordered: bool = False
) -> dict[str, Readable]:
    bits, size = config.count("bits", 4), config.get("group_size", 128)
    known = GROUP_SIZES["signed"]
    if size not in (*known, -1):
        raise config.refuse("group_size", f"{' or '.join(map(str, known))}, or -1, a row")
    found = {}
    for name in tensors:
        if name.endswith(_CODES):
            module = name.removesuffix(_CODES)
            readable = _readable(module, tensors, packing, bits, size, symmetric=symmetric)
            found[f"{module}.weight"] = readable._replace(reordered=reordered and size != -1)
            if reordered and module + _GROUPS not in tensors:
                raise CheckpointError(
                    f"{tensors[name].file} has {name}, but no {_GROUPS}: desc_act is true ({config.where}). {_FETCH}"
                )
    return found


def _readable(
    module: str, tensors: Mapping[str, StoredTensor], packing: Packing, bits: int, size: int, *, symmetric: bool
) -> Readable:
    codes, scales, zeros, groups = (tensors.get(module + end) for end in (_CODES, _SCALES, _ZEROS, _GROUPS))
    assert codes is not None
    if scales is None or zeros is None or module + ".weight" in tensors:
        problem = "also .weight" if scales and zeros else f"no {_SCALES if scales is None else _ZEROS}"
        raise CheckpointError(f"{codes.file} has {module}{_CODES}, but {problem}. {_FETCH}")
    per_word = WORD_BITS // bits
    inputs, outputs = codes.shape if len(codes.shape) == 2 else (0, 0)
    inputs, outputs = (inputs, outputs * per_word) if packing == "awq" else (inputs * per_word, outputs)
    number = 1 if size == -1 else inputs // size
    expected = {
        _CODES: (("I32",), codes.shape),
        _SCALES: (("F16", "BF16"), (number, outputs)),
        _ZEROS: (("I32",), (number, outputs // per_word)),
        _GROUPS: (("I32",), (inputs,)),
    }
    for end, tensor in ((_CODES, codes), (_SCALES, scales), (_ZEROS, zeros), (_GROUPS, groups)):
        dtypes, shape = expected[end]
        if tensor is not None and (tensor.dtype not in dtypes or tensor.shape != shape or not outputs):
            raise CheckpointError(
                f"{tensor.file}: {module}{end} is {tensor.dtype} {list(tensor.shape)}; expected {' or '.join(dtypes)} "
                f"{list(shape)} beside {_CODES} {list(codes.shape)}, {bits} bits and groups of {size}. {_FETCH}"
            )
    if inputs % per_word or inputs % max(1, size) or outputs % per_word:
        raise CheckpointError(
            f"{codes.file}: {module}{_CODES} {list(codes.shape)} has parts of words or groups. {_FETCH}"
        )
    whole = next((group for group in reversed(GROUP_SIZES["signed"]) if inputs % group == 0), GROUP_SIZES["signed"][-1])
    format = QuantizationFormat("signed" if symmetric else "affine", bits, whole if size == -1 else size)
    stored = (module + _CODES, module + _SCALES, module + _ZEROS, *([module + _GROUPS] if groups is not None else []))
    return Readable("F32", (outputs, inputs), stored, format, packing)
