"""Quantized weights: their formats, their representation as codes, and decoding."""
