"""Trackers of runs: TensorBoard, wandb and trackio log what metrics.jsonl has, on this machine unless told else."""
