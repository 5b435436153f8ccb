"""The JAX backend: Flax NNX modules, optax, compiled steps."""
