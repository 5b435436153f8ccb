"""The machine that MLX runs on: its BLAS and its streams."""
