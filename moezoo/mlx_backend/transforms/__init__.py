"""Transformations of a training step: recomputation (activation checkpointing)."""
