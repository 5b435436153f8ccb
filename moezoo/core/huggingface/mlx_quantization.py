"""Quantization of mlx-lm's folders: formats declared in config.json; codes, scales and biases in the files.

    "quantization": {"group_size": 64, "bits": 4, "mode": "affine",
                     "model.layers.0.mlp.gate": {"group_size": 64, "bits": 8}, "lm_head": false}

A module listed by its path has its own format, or none if it is false. Any other module is quantized if and only if the
files have its scales, in the outer format. A quantized module has `PATH.weight` (codes), `PATH.scales` and, if affine,
`PATH.biases`.

Source: mlx-lm 0.32, `load_model`.
"""

from collections.abc import Mapping

from moezoo.core.errors import CheckpointError, SpecError
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.folder import StoredTensor
from moezoo.core.huggingface.ledger import FLOATS, Readable
from moezoo.core.quantization.formats import BITS, GROUP_SIZES, WORD_BITS, QuantizationFormat

MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
_OWN = ("group_size", "bits", "mode")
_DEFAULTS = {"affine": (4, 64)} | {mode: (BITS[mode][0], GROUP_SIZES[mode][0]) for mode in MODES[1:]}
_WEIGHT, _SCALES, _BIASES, _GLOBAL = ".weight", ".scales", ".biases", ".global_scale"
_FETCH = "Fetch the checkpoint again."

Formats = Mapping[str, QuantizationFormat | None]


def declared(fields: Fields) -> tuple[QuantizationFormat, Formats] | None:
    """Return the outer format and those of listed modules (None: not quantized), or None without a declaration.

    `quantization` is mlx-lm's field, and `quantization_config` its copy. Raises SpecError.
    """
    name = "quantization" if "quantization" in fields else "quantization_config"
    inner = fields.inside(name)
    if inner is None or (name == "quantization_config" and ("quant_method" in inner or "bits" not in inner)):
        return None
    outer = _format(inner)
    listed: dict[str, QuantizationFormat | None] = {}
    for path, value in inner.raw.items():
        if path in _OWN or value is None:
            continue
        if isinstance(value, bool):
            listed[path] = outer if value else None
        elif isinstance(value, Mapping):
            own = Fields(value, f"{inner.where}, {path}")
            listed[path] = _format(own)
            own.finish()
        else:
            raise inner.refuse(path, "an object or false for the module of that name")
    return outer, listed


def mlx_tensors(outer: QuantizationFormat, listed: Formats, tensors: Mapping[str, StoredTensor]) -> dict[str, Readable]:
    """Return the quantized tensors by the name of their codes. Raises CheckpointError if codes, scales and biases do
    not belong together, or have other shapes or dtypes than the declared format."""
    found: dict[str, Readable] = {}
    for name, tensor in tensors.items():
        if name.endswith(_GLOBAL):
            raise CheckpointError(
                f"{tensor.file}: {name} scales a whole nvfp4 matrix, which is not supported. Use a folder without it."
            )
        if name.endswith(_SCALES):
            path = name.removesuffix(_SCALES)
            format = listed.get(path, outer)
            if format is None or path + _WEIGHT not in tensors:
                why = "config.json says that it is not quantized" if format is None else f"no {path}{_WEIGHT}"
                raise CheckpointError(f"{tensor.file} has {name}, but {why}. {_FETCH}")
            found[path + _WEIGHT] = _readable(path, format, tensors)
        elif name.endswith(_BIASES) and name.removesuffix(_BIASES) + _SCALES not in tensors:
            raise CheckpointError(f"{tensor.file} has {name}, but no {name.removesuffix(_BIASES)}{_SCALES}. {_FETCH}")
    for name, tensor in tensors.items():
        path = name.removesuffix(_WEIGHT)
        declares = tensor.dtype == "U32" or listed.get(path) is not None
        if path != name and declares and name not in found:
            raise CheckpointError(f"{tensor.file} has {name}, {_a(tensor)}, but no {path}{_SCALES}. {_FETCH}")
    return found


def _format(fields: Fields) -> QuantizationFormat:
    mode = fields.text("mode", "affine")
    if mode not in MODES:
        raise fields.refuse("mode", f"one of {', '.join(MODES)}")
    bits, group_size = _DEFAULTS[mode]
    try:
        return QuantizationFormat(mode, fields.count("bits", bits), fields.count("group_size", group_size))  # type: ignore[arg-type]
    except CheckpointError as error:
        raise SpecError(f"{str(error).removesuffix('.')} ({fields.where}). {_FETCH}") from None


def _readable(path: str, format: QuantizationFormat, tensors: Mapping[str, StoredTensor]) -> Readable:
    codes, scales, biases = (tensors.get(path + end) for end in (_WEIGHT, _SCALES, _BIASES))
    assert codes is not None
    assert scales is not None
    if format.has_biases != (biases is not None):
        problem = f"no {path}{_BIASES}" if biases is None else f"also {path}{_BIASES}"
        raise CheckpointError(f"{scales.file} has {path}{_SCALES} in {format}, but {problem}. {_FETCH}")
    if codes.dtype != "U32":
        raise CheckpointError(f"{codes.file}: {path}{_WEIGHT} is {codes.dtype}; expected U32 beside scales. {_FETCH}")
    expected = tuple(FLOATS) if format.has_biases else ("U8",)
    like_biases = biases is None or (biases.dtype, biases.shape) == (scales.dtype, scales.shape)
    if scales.dtype not in expected or not like_biases:
        beside = "" if biases is None else f" and its biases {_a(biases)}"
        raise CheckpointError(
            f"{scales.file}: {path}{_SCALES} is {_a(scales)}{beside}; expected {' or '.join(expected)} in "
            f"{format}{', the same for both' if biases is not None else ''}. {_FETCH}"
        )
    *rows, words = codes.shape or (0,)
    size = words * WORD_BITS // format.bits
    fits = format.divides(size) and format.words(size) == words and scales.shape == (*rows, format.groups(size))
    if not rows or not fits:
        raise CheckpointError(
            f"{codes.file}: {path}{_WEIGHT} has shape {list(codes.shape)} and its scales {list(scales.shape)}; "
            f"expected [..., out, in * {format.bits} / {WORD_BITS}] and [..., out, in / {format.group_size}] in "
            f"{format}. {_FETCH}"
        )
    stored = (path + _WEIGHT, path + _SCALES, *((path + _BIASES,) if format.has_biases else ()))
    return Readable("F32", (*rows, size), stored, format)


def _a(tensor: StoredTensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
