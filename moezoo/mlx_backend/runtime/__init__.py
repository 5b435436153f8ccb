"""Runtime environment of MLX: BLAS library, streams, and typed wrappers."""
