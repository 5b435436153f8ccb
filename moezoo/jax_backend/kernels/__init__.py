"""Grouped matrix products and blocked expert feed-forward, for platforms where XLA's own are slow."""
