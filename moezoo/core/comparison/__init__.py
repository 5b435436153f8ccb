"""Comparison of two models on the same text: how far they differ, and whether routing or arithmetic is the reason."""
