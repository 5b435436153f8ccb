"""Checkpoints: safetensors files, sharded tensors, manifests, and one folder per saved step."""
