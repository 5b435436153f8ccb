"""The MLX backend. Its BLAS is chosen, and how memory is given to it, before MLX is first imported."""

from moezoo.core.malloc import keep_freed_memory
from moezoo.mlx_backend.runtime.blas import BLAS as BLAS

FREED_MEMORY = keep_freed_memory()
