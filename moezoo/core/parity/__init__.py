"""Parity: compare the reference and the backends on one model."""
