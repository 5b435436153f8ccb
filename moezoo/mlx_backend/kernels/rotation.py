"""Choice of the form of rotations by position."""

from moezoo.mlx_backend.kernels.x86 import is_x86_cpu


def turns_by_matrix(num_positions: int) -> bool:
    """Return True for one position on x86: there, a product with a matrix takes less time than eight operations."""
    return is_x86_cpu() and num_positions == 1
