"""Probabilistic grammars: text whose entropy is known exactly."""
