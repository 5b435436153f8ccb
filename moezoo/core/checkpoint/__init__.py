"""Checkpoints: safetensors files, manifests, and the folder of a step."""
