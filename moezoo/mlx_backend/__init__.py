"""The MLX backend. Its BLAS is chosen before MLX is first imported."""

from moezoo.mlx_backend.blas import BLAS as BLAS
from moezoo.mlx_backend.memory import MEMORY as MEMORY
