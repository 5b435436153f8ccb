"""Grouped products, and kernels for x86 CPUs."""
