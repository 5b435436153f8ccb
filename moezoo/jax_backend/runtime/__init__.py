"""Runtime environment of a JAX program: platform, processes, compilation cache, active placement."""
