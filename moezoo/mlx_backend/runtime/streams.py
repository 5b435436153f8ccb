"""MLX streams, which run elementwise operations on more than one core."""

import functools

import mlx.core as mx


@functools.cache
def streams() -> list[mx.Stream]:
    """Return streams for work split into parts: two on the CPU, with a thread each; one on the GPU.

    On the CPU, MLX runs elementwise operations on one thread, and exponentials dominate the time of a training step.
    """
    if mx.default_device() == mx.Device(mx.gpu):
        return [mx.default_stream(mx.Device(mx.gpu))]
    return [mx.default_stream(mx.Device(mx.cpu)), mx.new_stream(mx.Device(mx.cpu))]
