"""Other implementations, a small file each. None is a dependency; each is imported in its own process only."""
