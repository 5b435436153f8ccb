"""Diagnosis of runs and checkpoints: findings from config, metrics and tensors, and perhaps from a forward pass."""
