"""Parameter table rows of an MoE layer: router, routed experts, zero-computation experts, shared experts."""

from collections.abc import Iterator

from moezoo.core.parameters.feed_forward import feed_forward_rows
from moezoo.core.parameters.row import ONES, ZEROS, Initializer, Parameter, Rows
from moezoo.core.spec import (
    ExpertChoiceSpec,
    HashChoiceSpec,
    MoESpec,
    NoisyTopKChoiceSpec,
    ParallelFeedForwardSpec,
    RouterMLPSpec,
    ZeroComputationSpec,
)


def moe_rows(rows: Rows, name: str, spec: MoESpec, previous: int | None) -> Iterator[Parameter]:
    """Yield every parameter of one MoE layer; `previous`: number of logits of the previous router, or None."""
    d, z = rows.embed_dim, spec.latent_dim
    yield from router_rows(rows, f"{name}.router", spec, previous)
    if z is not None:
        yield rows.matrix(f"{name}.w_latent", (d, z), ("embed", "latent"), "routed experts")
        if spec.latent_bias:
            yield rows.vector(f"{name}.b_latent", (z,), ("latent",), "routed experts")
    yield from feed_forward_rows(
        rows, f"{name}.experts", spec.experts, "routed experts", num_experts=spec.num_experts, latent_dim=z
    )
    if z is not None:
        yield rows.output(f"{name}.w_output", (z, d), ("latent", "embed"), "routed experts")
    if spec.zero_computation is not None:
        yield from _constant_experts(rows, f"{name}.constant_experts", spec.zero_computation)
    if spec.output_norm is not None:
        yield from rows.norm(f"{name}.output_norm", spec.output_norm, (d,), ("embed",))
    if spec.output_bias:
        yield rows.vector(f"{name}.b_output", (d,), ("embed",), "routed experts")
    if spec.shared is not None:
        yield from feed_forward_rows(rows, f"{name}.shared", spec.shared_feed_forward, "shared experts")
        if isinstance(spec.shared, ParallelFeedForwardSpec):
            for which in ("shared_output", "routed_input", "routed_output"):
                yield from rows.norm(f"{name}.{which}_norm", spec.shared.norm, (d,), ("embed",))
        elif spec.shared.kind == "sigmoid_gated":
            yield rows.matrix(f"{name}.w_shared_gate", (d, 1), ("embed", "one"), "shared experts")


def router_rows(rows: Rows, name: str, spec: MoESpec, previous: int | None) -> Iterator[Parameter]:
    """Yield every parameter of a router; `previous` as of `moe_rows`."""
    router, d, e = spec.router, rows.embed_dim, spec.num_choices
    if router.input == "normalized":
        yield rows.vector(f"{name}.input_scale", (d,), ("embed",), "router", ONES)
    width, axis = (d, "embed") if router.mlp is None else (router.mlp.hidden_dim, "latent")
    if router.mlp is not None:
        yield from _router_mlp(rows, f"{name}.mlp", router.mlp, previous)
    outputs, output_axis = spec.num_router_outputs, "key" if router.product_keys else "expert"
    yield rows.matrix(f"{name}.w_router", (width, outputs), (axis, output_axis), "router")
    if spec.num_sinks:
        yield rows.matrix(f"{name}.w_shared", (width, spec.num_sinks), (axis, "constant"), "router")
    if router.bias:
        yield rows.vector(f"{name}.b_router", (outputs,), (output_axis,), "router")
    if router.gating_residual and previous is not None:
        yield rows.matrix(f"{name}.w_residual", (previous, e), ("expert", "expert"), "router", ZEROS)
    if router.learned_scale:
        yield rows.vector(f"{name}.scale", (1,), ("one",), "router", ONES)
    if router.per_expert_scale:
        yield rows.vector(f"{name}.expert_scale", (e,), ("expert",), "router", ONES)
    if router.selection_bias is not None:
        yield rows.state(f"{name}.selection_bias", (e,), ("expert",), "router")
    match router.choice:
        case NoisyTopKChoiceSpec():
            yield rows.matrix(f"{name}.w_noise", (width, e), (axis, "expert"), "router", ZEROS)
        case HashChoiceSpec():
            table = Initializer("hash_table", value=float(e))
            shape = (rows.spec.vocab, router.top_k)
            yield rows.state(f"{name}.hash_table", shape, ("vocab", "choice"), "router", table)
        case ExpertChoiceSpec():
            yield rows.state(f"{name}.cutoff", (e,), ("expert",), "router")
            yield rows.state(f"{name}.cutoff_weight", (1,), ("one",), "router")


def _router_mlp(rows: Rows, name: str, spec: RouterMLPSpec, previous: int | None) -> Iterator[Parameter]:
    z = spec.hidden_dim
    yield rows.matrix(f"{name}.w_down", (rows.embed_dim, z), ("embed", "latent"), "router")
    yield rows.vector(f"{name}.b_down", (z,), ("latent",), "router")
    if spec.depth_average and previous is not None:
        yield rows.vector(f"{name}.state_scale", (z,), ("latent",), "router", ONES)
    yield from rows.norm(f"{name}.norm", spec.norm, (z,), ("latent",))
    for layer in ("first", "second"):
        yield rows.matrix(f"{name}.w_{layer}", (z, z), ("latent", "latent"), "router")
        yield rows.vector(f"{name}.b_{layer}", (z,), ("latent",), "router")


def _constant_experts(rows: Rows, name: str, spec: ZeroComputationSpec) -> Iterator[Parameter]:
    if spec.num_constant:
        n, d = spec.num_constant, rows.embed_dim
        axes: tuple[str, ...] = ("constant", "embed")
        yield Parameter(f"{name}.constant", (n, d), axes, rows.matrix_initializer, True, "routed experts")
        yield rows.matrix(f"{name}.w_mix", (n, d, 2), (*axes, "two"), "routed experts", batch=1)
