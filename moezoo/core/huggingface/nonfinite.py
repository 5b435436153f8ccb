"""Detection of NaN and infinity in weights: a warning with names, not an error (a masked -inf can be intended)."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.quantization.weight import QuantizedWeight

Array = npt.NDArray[Any]

_PIECE = 1 << 16  # elements at a time, to avoid a second array of a parameter's size

_NAN_E8M0, _NAN_E4M3 = np.uint8(255), np.uint8(0x7F)  # the latter of either sign
# Exponent bits; all of them set means NaN or infinity.
_EXPONENT = {"bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}


def is_finite(array: Array) -> bool:
    """Return True if a bfloat16, float16, float32 or float64 array of any strides has no NaN or infinity."""
    if array.dtype.name not in _EXPONENT:
        return bool(np.isfinite(array).all())
    unsigned, exponent = _EXPONENT[array.dtype.name]
    pieces = np.nditer(
        array.view(unsigned), flags=["external_loop", "buffered", "zerosize_ok"], order="K", buffersize=_PIECE
    )
    mask = unsigned(exponent)
    return not any(bool(np.any((np.asarray(piece) & mask) == mask)) for piece in pieces)


def is_finite_weight(weight: QuantizedWeight) -> bool:
    """Return True if no number of a weight is NaN or infinity; decoded only if the largest scale could make one."""
    pieces = _pieces(weight.codes.reshape(-1).view(np.uint8)) if weight.format.has_nan_codes else ()
    if any(bool((piece & _NAN_E4M3 == _NAN_E4M3).any()) for piece in pieces):
        return False
    return np.isfinite(weight.bound()) or is_finite(weight.values())


def are_finite_scales(format: QuantizationFormat, scales: Array) -> bool:
    """Return True if no stored scale or bias of this format is NaN or infinity."""
    match scales.dtype.name:
        case "float8_e4m3fn":
            has_nan = scales.view(np.uint8) & _NAN_E4M3 == _NAN_E4M3
        case "float8_e8m0fnu":
            has_nan = scales.view(np.uint8) == _NAN_E8M0
        case "uint8":
            has_nan = scales & _NAN_E4M3 == _NAN_E4M3 if format.mode == "nvfp4" else scales == _NAN_E8M0
        case _:
            return scales.dtype.kind == "i" or is_finite(scales)
    return not has_nan.any()


def _pieces(flat: Array) -> Iterator[Array]:
    return (flat[start : start + _PIECE] for start in range(0, len(flat), _PIECE))


def nonfinite_names(parameters: Iterable[tuple[str, Array]]) -> list[str]:
    """Return the names of the parameters that contain NaN or infinity."""
    return [name for name, array in parameters if not is_finite(array)]


def nonfinite_warning(names: list[str], where: str) -> str | None:
    """Return a one-line warning, or None if `names` is empty."""
    if not names:
        return None
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{where} has NaN or infinity in {', '.join(names[:5])}{more}; the model's outputs may be meaningless."
