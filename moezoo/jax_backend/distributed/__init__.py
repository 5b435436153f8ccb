"""Several devices: how arrays are sharded, expert parallelism, and sharded checkpoints."""
