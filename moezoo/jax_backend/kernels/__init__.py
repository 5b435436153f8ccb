"""Grouped products and blocks of experts, for platforms where XLA's own are slow."""
