"""Formats of quantized weights: modes, widths and group sizes.

A format says how the numbers of a matrix row are stored: codes of `bits` bits, packed low bits first into uint32
words, and one scale per group of `group_size` numbers along the row.

| mode   | code                 | scale                     | value                  | group, bits                     |
|--------|----------------------|---------------------------|------------------------|---------------------------------|
| affine | unsigned integer     | float, may be negative    | scale * code + bias    | 32, 64, 128; 2, 3, 4, 5, 6, 8   |
| mxfp4  | E2M1                 | E8M0: 2^(scale - 127)     | scale * code           | 32; 4                           |
| mxfp8  | E4M3                 | E8M0                      | scale * code           | 32; 8                           |
| nvfp4  | E2M1                 | E4M3                      | scale * code           | 16; 4                           |
| fp8    | E4M3                 | float                     | scale * code           | 128; 8                          |
| fp4    | E2M1                 | float                     | scale * code           | 16; 4                           |
| signed | integer + 2^(bits-1) | float                     | scale * integer        | 32, 64, 128; 4, 8               |

Source: mlx 0.32, `mx.quantize`; OCP Microscaling Formats (MX) v1.0, sections 5.3.3 (E2M1) and 5.4.1 (E8M0);
Micikevicius et al. 2022, arXiv 2209.05433 (E4M3). Mode fp8 is DeepSeek-V3's, arXiv 2412.19437, section 3.3.2: its scale
of a block of 128 x 128 is repeated for each of the block's rows, and that of a row or tensor for each of its groups.
Modes fp4 and signed are those of compressed-tensors 0.20 (`nvfp4-pack-quantized`, whose second scale of a tensor is in
the groups' scales here, and `pack-quantized`): see moezoo.core.huggingface.stored_rows.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from moezoo.core.errors import CheckpointError

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4", "fp8", "fp4", "signed"]

MODES: tuple[Mode, ...] = get_args(Mode)
GROUP_SIZES = {
    **{"affine": (32, 64, 128), "mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)},
    **{"fp8": (128,), "fp4": (16,), "signed": (32, 64, 128)},
}
_LARGEST_CODE = {"mxfp4": 6.0, "mxfp8": 448.0, "nvfp4": 6.0, "fp8": 448.0, "fp4": 6.0}
BITS = {
    **{"affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,)},
    **{"fp8": (8,), "fp4": (4,), "signed": (4, 8)},
}
WORD_BITS = 32


@dataclass(frozen=True)
class QuantizationFormat:
    """Mode, bits per code, and numbers per scale. Raises CheckpointError for a combination that does not exist."""

    mode: Mode = "affine"
    bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise CheckpointError(f"quantization mode is {self.mode!r:.40}; expected one of {', '.join(MODES)}.")
        for name, got, known in (
            ("bits", self.bits, BITS[self.mode]),
            ("group_size", self.group_size, GROUP_SIZES[self.mode]),
        ):
            if isinstance(got, bool) or got not in known:
                expected = " or ".join(map(str, known))
                raise CheckpointError(f"{name} of quantization mode {self.mode} is {got!r:.40}; expected {expected}.")

    @property
    def has_biases(self) -> bool:
        """True if a group has a bias beside its scale."""
        return self.mode == "affine"

    @property
    def has_byte_scales(self) -> bool:
        """True if scales are floats of 8 bits, in uint8."""
        return self.mode in ("mxfp4", "mxfp8", "nvfp4")

    @property
    def largest_code(self) -> float:
        """Largest magnitude of a code's number."""
        return 2.0 ** (self.bits - 1) if self.mode == "signed" else _LARGEST_CODE.get(self.mode, 2.0**self.bits - 1)

    @property
    def is_only_read(self) -> bool:
        """True for the codes of files that are never made here, since their scales may be of more than a group."""
        return self.mode in ("fp8", "fp4", "signed")

    @property
    def has_nan_codes(self) -> bool:
        """True if a code can be NaN: 0x7F of either sign."""
        return self.mode in ("mxfp8", "fp8")

    def words(self, size: int) -> int:
        """Return the number of uint32 words of a row of `size` numbers."""
        return size * self.bits // WORD_BITS

    def groups(self, size: int) -> int:
        """Return the number of groups of a row of `size` numbers; only those of files may have a partial last one."""
        return -(-size // self.group_size)

    def divides(self, size: int) -> bool:
        """Return True if a row of `size` numbers can be stored in this format."""
        return size * self.bits % WORD_BITS == 0 and (self.is_only_read or size % self.group_size == 0)

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.mode}, groups of {self.group_size}"
