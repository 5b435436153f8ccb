"""Parameter table rows of state-space layers, and of causal convolutions."""

import math
from collections.abc import Iterator

from moezoo.core.parameters.row import ONES, Initializer, Parameter, Rows
from moezoo.core.spec import LightningAttentionSpec, Mamba2Spec, MambaSpec

# Initial decays as in the authors' code: rates from 1 to 16, steps from 0.001 to 0.1.
RATE, STEP = Initializer("log_rate", value=16.0), Initializer("step_bias", value=0.1)


def mamba2_rows(rows: Rows, name: str, spec: Mamba2Spec) -> Iterator[Parameter]:
    """Yield every parameter of a Mamba-2 layer."""
    d, n, m, w = rows.embed_dim, spec.num_heads, spec.num_groups, spec.conv_width
    h, z = spec.state_dim, spec.head_dim
    for which, heads, width, axis in (
        ("gate", n, z, "head"),
        ("value", n, z, "head"),
        ("key", m, h, "kv_head"),
        ("query", m, h, "kv_head"),
    ):
        yield rows.matrix(f"{name}.w_{which}", (d, heads, width), ("embed", axis, "head_dim"), "attention")
        if spec.bias:
            yield rows.vector(f"{name}.b_{which}", (heads, width), (axis, "head_dim"), "attention")
        if which == "gate":
            continue
        shape, axes = (w, heads, width), ("source", axis, "head_dim")
        yield Parameter(f"{name}.conv_{which}", shape, axes, filters(w), True, "attention")
        if spec.conv_bias:
            yield rows.vector(f"{name}.b_conv_{which}", (heads, width), (axis, "head_dim"), "attention")
    yield rows.matrix(f"{name}.w_step", (d, n), ("embed", "head"), "attention")
    if spec.bias:
        yield rows.vector(f"{name}.b_step", (n,), ("head",), "attention")
    yield rows.vector(f"{name}.step_bias", (n,), ("head",), "attention", STEP)
    yield rows.vector(f"{name}.log_decay_rate", (n,), ("head",), "attention", RATE)
    yield rows.vector(f"{name}.skip", (n,), ("head",), "attention", ONES)
    yield rows.vector(f"{name}.norm_scale", (n, z), ("head", "head_dim"), "norms", ONES)
    yield rows.output(f"{name}.w_output", (n, z, d), ("head", "head_dim", "embed"), "attention", fan_in=2)
    if spec.bias:
        yield rows.vector(f"{name}.b_output", (d,), ("embed",), "attention")


def mamba_rows(rows: Rows, name: str, spec: MambaSpec) -> Iterator[Parameter]:
    """Yield every parameter of a Mamba-1 layer."""
    d, f, z, h, w = rows.embed_dim, spec.inner_dim, spec.state_dim, spec.step_rank, spec.conv_width
    rate = Initializer("log_rate", value=float(z))
    for which in ("value", "gate"):
        yield rows.matrix(f"{name}.w_{which}", (d, f), ("embed", "hidden"), "attention")
        if spec.bias:
            yield rows.vector(f"{name}.b_{which}", (f,), ("hidden",), "attention")
    yield Parameter(f"{name}.conv", (w, f), ("source", "hidden"), filters(w), True, "attention")
    if spec.conv_bias:
        yield rows.vector(f"{name}.b_conv", (f,), ("hidden",), "attention")
    for which, width in (("step_down", h), ("key", z), ("query", z)):
        yield rows.matrix(f"{name}.w_{which}", (f, width), ("hidden", "latent"), "attention")
        if spec.norm is not None:
            yield from rows.norm(f"{name}.{which}_norm", spec.norm, (width,), ("latent",))
    yield rows.matrix(f"{name}.w_step", (h, f), ("latent", "hidden"), "attention")
    yield rows.vector(f"{name}.step_bias", (f,), ("hidden",), "attention", STEP)
    yield rows.vector(f"{name}.log_decay_rate", (f, z), ("hidden", "latent"), "attention", rate)
    yield rows.vector(f"{name}.skip", (f,), ("hidden",), "attention", ONES)
    yield rows.output(f"{name}.w_output", (f, d), ("hidden", "embed"), "attention")
    if spec.bias:
        yield rows.vector(f"{name}.b_output", (d,), ("embed",), "attention")


def lightning_rows(rows: Rows, name: str, spec: LightningAttentionSpec) -> Iterator[Parameter]:
    """Yield every parameter of a lightning attention layer."""
    shape, axes = (spec.num_heads, spec.head_dim), ("head", "head_dim")
    for which in ("query", "key", "value", "gate"):
        yield rows.matrix(f"{name}.w_{which}", (rows.embed_dim, *shape), ("embed", *axes), "attention")
    yield from rows.norm(f"{name}.output_norm", spec.norm, shape, axes)
    yield rows.output(f"{name}.w_output", (*shape, rows.embed_dim), (*axes, "embed"), "attention", fan_in=2)


def filters(width: int) -> Initializer:
    """Return PyTorch's default initializer of a depthwise convolution over `width` tokens."""
    return Initializer("uniform", value=1 / math.sqrt(width))
