"""Other MoE implementations as contenders. None is a dependency; each is imported only in its own process."""
