"""Streams: how MLX uses more than one core for elementwise work."""

import functools

import mlx.core as mx


@functools.cache
def streams() -> list[mx.Stream]:
    """Where work that falls into parts may take turns: two streams on the CPU, each with a thread; one on the GPU.

    MLX's elementwise operations on the CPU use one thread, and exponentials are most of a training step there.
    """
    if mx.default_device() == mx.Device(mx.gpu):
        return [mx.default_stream(mx.Device(mx.gpu))]
    return [mx.default_stream(mx.Device(mx.cpu)), mx.new_stream(mx.Device(mx.cpu))]
