"""Memory of a parity check, whose reference computes in float64, and its limit."""

from moezoo.core.cost.memory import attention_widths
from moezoo.core.cost.parameters import parameter_counts
from moezoo.core.errors import SpecError
from moezoo.core.spec import ModelSpec

LIMIT_BYTES = 8 * 2**30
"""Limit for the estimated memory of a check."""


def reference_bytes(spec: ModelSpec, batch_size: int, length: int, num_backends: int) -> int:
    """Estimate the memory of a parity check.

    `n (96 + 40 * backends)` for n parameters: weights, gradients, moments and updates, in float64 and, per backend,
    in float32. And the float64 activations that autograd saves, with P = B T and R = P K: per layer `64 P N T` for
    attention scores, `80 P F` or `80 R F` for a feed-forward, `16 P R` for the combine, `64 P (2 N + 2 M) H` for
    projections, `160 P D` for the residual stream; and `64 P V` for logits.
    """
    parameters = parameter_counts(spec).total
    tokens, doubles = batch_size * length, 0
    for layer in spec.all_layers:
        moe, (heads, projected) = layer.moe, attention_widths(layer.attention, spec.embed_dim)
        doubles += 8 * heads * length + 16 * projected + 20 * spec.embed_dim
        if layer.feed_forward is not None:
            doubles += 10 * layer.feed_forward.hidden_dim
        if moe is not None:
            slots = moe.num_slots
            doubles += 10 * slots * moe.experts.hidden_dim + 2 * tokens * slots
            doubles += 10 * moe.shared_feed_forward.hidden_dim if moe.shared is not None else 0
    return parameters * (96 + 40 * num_backends) + 8 * tokens * (doubles + 8 * spec.vocab)


def check_reference_size(spec: ModelSpec, batch_size: int, length: int, num_backends: int) -> None:
    """Check that `reference_bytes` is at most LIMIT_BYTES, before anything is built. Raises SpecError otherwise."""
    needed = reference_bytes(spec, batch_size, length, num_backends)
    if needed > LIMIT_BYTES:
        raise SpecError(
            f"the float64 reference of this model would need about {needed / 2**30:.1f} GiB (parameters "
            f"{parameter_counts(spec).total:,}, tokens {batch_size} x {length}); expected at most "
            f"{LIMIT_BYTES / 2**30:.0f} GiB. Check a config with the same features and smaller sizes."
        )
