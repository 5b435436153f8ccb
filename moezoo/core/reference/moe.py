"""The MoE layer: Router -> Dispatch -> Experts -> Combine, plus shared ones and ones without computation."""

from typing import assert_never

import autograd.numpy as np

from moezoo.core.reference import Array, Parameters, Record, adapter, inside
from moezoo.core.reference.choice import NO_CONTEXT, RoutingContext
from moezoo.core.reference.dispatch import Dispatch, combine, dispatch, used_rows
from moezoo.core.reference.experts import experts
from moezoo.core.reference.feed_forward import feed_forward, sigmoid
from moezoo.core.reference.normalization import normalize
from moezoo.core.reference.routing import Routing, jittered_input, route
from moezoo.core.spec import MoESpec, ParallelFeedForwardSpec, SharedExpertsSpec, ZeroComputationSpec


def moe(
    spec: MoESpec,
    parameters: Parameters,
    x_BTD: Array,
    context: RoutingContext = NO_CONTEXT,
    *,
    raw_BTD: Array | None = None,
    record: Record | None = None,
    name: str = "moe",
) -> tuple[Array, Routing]:
    """[B, T, D] -> [B, T, D] and the Routing of its P = B * T tokens, numbered sequence by sequence.

    `out = sum over chosen experts of weight * expert(x)`, plus shared experts, which compute every token
    (`with_shared`), and experts that compute nothing (`without_computation`). With `apply_to: input` it is the sum of
    `expert(weight * x)`. With a `latent_dim` the experts see `x w_latent + b_latent`, and w_output follows their sum;
    the others and the router stay outside. Last come `output_norm` and `output_bias`. Biases and norm are optional.

    Args:
        spec: the MoE layer.
        parameters: its own.
        x_BTD: after the layer's norm.
        context: of its P tokens, as in `route`; at inference no capacity drops a token.
        raw_BTD: before the layer's norm, for `shared: {kind: parallel}`: router and routed experts start from there.
            None: as x_BTD.
        record: filled with named intermediates.

    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 1. Weighted inputs: Meta 2025 (Llama 4), released code. Latent
    experts: NVIDIA 2025 (Nemotron 3), released code. Norm of the output: SK Telecom 2026 (A.X-K1), released code.
    """
    x_PD = jittered_input(spec.router, x_BTD.reshape(-1, x_BTD.shape[-1]), context.key)
    raw_PD, routed_PD = x_PD, x_PD
    if isinstance(spec.shared, ParallelFeedForwardSpec):
        raw_PD = x_PD if raw_BTD is None else jittered_input(spec.router, raw_BTD.reshape(x_PD.shape), context.key)
        routed_PD = normalize(spec.shared.norm, inside(parameters, "routed_input_norm"), raw_PD)
    routing = route(spec.router, inside(parameters, "router"), raw_PD, context)
    dispatched = dispatch(spec, routing, num_sequences=x_BTD.shape[0], inference=context.inference)
    input_P = routed_PD
    if spec.latent_dim is not None:
        input_P = adapter.einsum("PD,DZ->PZ", routed_PD, parameters["w_latent"])
        input_P = input_P + parameters["b_latent"] if spec.latent_bias else input_P
    out_PD = run_experts(spec, inside(parameters, "experts"), input_P, dispatched)
    if spec.latent_dim is not None:
        out_PD = adapter.einsum("PZ,ZD->PD", out_PD, parameters["w_output"])
    if spec.zero_computation is not None:
        weight_PE = choice_weights(spec, routing, dispatched.kept_PK)
        own = inside(parameters, "constant_experts")
        out_PD = out_PD + without_computation(spec.zero_computation, own, routed_PD, weight_PE)
    if isinstance(spec.shared, ParallelFeedForwardSpec):
        out_PD = normalize(spec.shared.norm, inside(parameters, "routed_output_norm"), out_PD)
    if record is not None:
        record[f"{name}.router.logits"] = routing.logits_PE
        record[f"{name}.router.weight"] = routing.weight_PK
        record[f"{name}.routed"] = out_PD
    if spec.shared is not None:
        out_PD = with_shared(spec, parameters, x_PD, out_PD, routing.shared_weight_PE)
    if spec.output_norm is not None:
        out_PD = normalize(spec.output_norm, inside(parameters, "output_norm"), out_PD)
    if spec.output_bias:
        out_PD = out_PD + parameters["b_output"]
    return np.reshape(out_PD, x_BTD.shape), routing


def run_experts(spec: MoESpec, parameters: Parameters, x_PD: Array, dispatched: Dispatch) -> Array:
    """Sum over each token's rows of `weight * expert(x)`, or of `expert(weight * x)` with `apply_to: input`: [P, D].

    `parameters` are those of the experts. With a `latent_dim` D is that.
    """
    x_RD = x_PD[dispatched.token_R]
    match spec.router.apply_to:
        case "output":
            summed = dispatched
        case "input":
            x_RD = x_RD * dispatched.weight_R[:, None]
            summed = dispatched._replace(weight_R=used_rows(dispatched))
        case _:
            assert_never(spec.router.apply_to)
    return combine(summed, experts(spec.experts, parameters, x_RD, dispatched.size_E), x_PD.shape[0])


def with_shared(
    spec: MoESpec, parameters: Parameters, x_PD: Array, routed_PD: Array, weight_PE: Array | None = None
) -> Array:
    """Add the output of the shared experts, which compute every token, to that of the routed ones: [P, D].

    `sum`: `routed + shared(x)`. `sigmoid_gated`: `routed + sigmoid(x w_shared_gate) * shared(x)`. `average`: half of
    the sum. `sink`: `routed + sum over s of weight_s shared_s(x)`, by the router's weights of them. `parallel`:
    `routed + norm(shared(x))`; `routed` is already normalized.

    Source: Dai et al. 2024, arXiv 2401.06066, eq. 9 (sum); transformers 5.23, models qwen2_moe (gate), cohere2_moe
    (average), inkling (sink), gemma4 (parallel).
    """
    own, weight_PF = spec.shared_feed_forward, None
    if weight_PE is not None:
        weight_PF = np.repeat(weight_PE, own.hidden_dim // spec.num_sinks, axis=1)
    shared_PD = feed_forward(own, inside(parameters, "shared"), x_PD, weight_PF)
    match spec.shared:
        case SharedExpertsSpec(kind="sum" | "sink"):
            return routed_PD + shared_PD
        case SharedExpertsSpec(kind="sigmoid_gated"):
            gate_P = sigmoid(np.einsum("PD,D->P", x_PD, parameters["w_shared_gate"][:, 0]))
            return routed_PD + gate_P[:, None] * shared_PD
        case SharedExpertsSpec():
            return (routed_PD + shared_PD) / 2
        case ParallelFeedForwardSpec(norm=norm):
            return routed_PD + normalize(norm, inside(parameters, "shared_output_norm"), shared_PD)
        case _:
            raise ValueError("there are no shared experts")


def choice_weights(spec: MoESpec, routing: Routing, kept_PK: Array) -> Array:
    """Return the weights of the Z experts without computation, 0 where not chosen or dropped: [P, Z]."""
    hot_PKE = routing.expert_PK[..., None] == np.arange(spec.num_experts, spec.num_choices)
    return np.sum(routing.weight_PK[..., None] * (hot_PKE & kept_PK[..., None]), axis=1)


def without_computation(spec: ZeroComputationSpec, parameters: Parameters, x_PD: Array, weight_PE: Array) -> Array:
    """Return the weighted sum of the outputs of experts without a feed-forward, in float32: [P, D].

    In the order of their ids: a zero expert returns 0, a copy expert x, and a constant expert `a x + b v` with a
    learned v and `[a, b] = softmax(x w_mix)`. A softmax of two is a sigmoid of their difference.

    Args:
        spec: number of experts of each kind.
        parameters: `constant` [E, D] and `w_mix` [E, D, 2] of the E constant experts.
        x_PD: input of the routed experts, before any latent projection.
        weight_PE: of each expert for each token.

    Source: Jin et al. 2024 (MoE++), arXiv 2410.07348, eq. 3-5.
    """
    copies = slice(spec.num_zero, spec.num_zero + spec.num_copy)
    share_P = np.sum(weight_PE[:, copies], axis=-1)
    if not spec.num_constant:
        return share_P[:, None] * x_PD
    weight_PE = weight_PE[:, copies.stop :]
    mix_PE = sigmoid(np.einsum("PD,ED->PE", x_PD, parameters["w_mix"][..., 0] - parameters["w_mix"][..., 1]))
    share_P = share_P + np.sum(weight_PE * mix_PE, axis=-1)
    return share_P[:, None] * x_PD + np.einsum("PE,ED->PD", weight_PE * (1 - mix_PE), parameters["constant"])
