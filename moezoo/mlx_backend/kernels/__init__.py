"""Grouped matrix products, and kernels for x86 CPUs."""
