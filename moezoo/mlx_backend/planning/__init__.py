"""Properties of computations that are planned and not run."""
