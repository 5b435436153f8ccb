"""Transformations of the compiled step: recomputation (activation checkpointing) and scanned layers."""
