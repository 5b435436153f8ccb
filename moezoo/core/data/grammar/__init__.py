"""Probabilistic grammars that generate text with exactly known entropy."""
