"""Replacements for operations that are slow in MLX's Linux wheel for x86, each with a custom gradient.

In that wheel, `exp` and all operations based on it (sigmoid, softmax, logsumexp, fused attention) take 14 to 20 ns per
element, `where` 6, and `power`, from the C library, 6; a sum or a product takes 0.3. So exponentials are computed as
powers of 2, masks are added, and gradients reuse the exponentials of the forward pass. On other platforms (Apple
silicon, for instance) this module is not used.
"""

import functools
import platform

import mlx.core as mx


@functools.cache
def is_x86_cpu() -> bool:
    """Return True on the platform that these kernels are for: an x86 CPU."""
    return mx.default_device() == mx.Device(mx.cpu) and platform.machine().lower() in ("x86_64", "amd64")
