"""NaN and infinity in weights: worth a warning with names, and no error (a model may live with a masked -inf)."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_PIECE = 1 << 16  # elements at a time, so that no second array of a parameter's size is made

# The bits of the exponent; all of them set is NaN or infinity.
_EXPONENT = {"bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}


def is_finite(array: Array) -> bool:
    """Whether a bfloat16, float16, float32 or float64 array, of any strides, has neither NaN nor infinity."""
    if array.dtype.name not in _EXPONENT:
        return bool(np.isfinite(array).all())
    unsigned, exponent = _EXPONENT[array.dtype.name]
    pieces = np.nditer(
        array.view(unsigned), flags=["external_loop", "buffered", "zerosize_ok"], order="K", buffersize=_PIECE
    )
    mask = unsigned(exponent)
    return not any(bool(np.any((np.asarray(piece) & mask) == mask)) for piece in pieces)


def nonfinite_names(parameters: Iterable[tuple[str, Array]]) -> list[str]:
    """The names of those that hold NaN or infinity."""
    return [name for name, array in parameters if not is_finite(array)]


def nonfinite_warning(names: list[str], where: str) -> str | None:
    """One line for a person; None where there is nothing to say."""
    if not names:
        return None
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{where} holds NaN or infinity in {', '.join(names[:5])}{more}; what the model says may be of no use."
