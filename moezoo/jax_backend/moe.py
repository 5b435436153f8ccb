"""The MoE layer. Spec: moezoo.core.reference.moe."""

from collections.abc import Callable
from typing import assert_never

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import MoESpec, ParallelFeedForwardSpec, SharedExpertsSpec, ZeroComputationSpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.choice import NO_CONTEXT, RoutingContext
from moezoo.jax_backend.dispatch import Dispatch, combine, dispatch, used_rows
from moezoo.jax_backend.experts import Experts, ExpertsCall
from moezoo.jax_backend.feed_forward import FeedForward
from moezoo.jax_backend.kernels import projection
from moezoo.jax_backend.normalization import norm
from moezoo.jax_backend.quantization import as_array
from moezoo.jax_backend.routing import Router, Routing, jittered_input

Exchange = Callable[..., jax.Array]
"""`run_experts` with tokens and experts on several devices, which exchange tokens (expert parallelism).

Called with spec, experts, x_PD, routing and dispatch, and by name with num_sequences and inference.
"""


class MoE(nnx.Module):
    """Spec: moezoo.core.reference.moe.moe."""

    def __init__(self, spec: MoESpec, weights: Weights):
        self.spec = spec
        self.router = Router(spec.router, weights.inside("router"))
        self.experts = Experts(spec.experts, weights.inside("experts"))
        if spec.latent_dim is not None:
            self.w_latent = weights.parameter("w_latent")
            if spec.latent_bias:
                self.b_latent = weights.parameter("b_latent")
            self.w_output = weights.parameter("w_output")
        if spec.zero_computation is not None:
            self.constant_experts = ConstantExperts(spec.zero_computation, weights.inside("constant_experts"))
        if spec.output_norm is not None:
            self.output_norm = norm(spec.output_norm, weights.inside("output_norm"))
        if spec.output_bias:
            self.b_output = weights.parameter("b_output")
        if spec.shared is not None:
            self.shared = FeedForward(spec.shared_feed_forward, weights.inside("shared"))
        match spec.shared:
            case SharedExpertsSpec(kind="sigmoid_gated"):
                self.w_shared_gate = weights.parameter("w_shared_gate")
            case ParallelFeedForwardSpec():
                self.shared_output_norm = norm(spec.shared.norm, weights.inside("shared_output_norm"))
                self.routed_input_norm = norm(spec.shared.norm, weights.inside("routed_input_norm"))
                self.routed_output_norm = norm(spec.shared.norm, weights.inside("routed_output_norm"))
            case SharedExpertsSpec() | None:
                pass
            case _:
                assert_never(spec.shared)

    def __call__(
        self,
        x_BTD: jax.Array,
        context: RoutingContext = NO_CONTEXT,
        *,
        raw_BTD: jax.Array | None = None,
        exchange: Exchange | None = None,
        record: dict[str, jax.Array] | None = None,
        name: str = "moe",
    ) -> tuple[jax.Array, Routing, Dispatch]:
        x_PD = jittered_input(self.spec.router, x_BTD.reshape(-1, x_BTD.shape[-1]), context.key)
        raw_PD, routed_PD = x_PD, x_PD
        if isinstance(self.spec.shared, ParallelFeedForwardSpec):
            if raw_BTD is not None:
                raw_PD = jittered_input(self.spec.router, raw_BTD.reshape(x_PD.shape), context.key)
            routed_PD = self.routed_input_norm(raw_PD)
        routing = self.router(raw_PD, context)
        dispatched = dispatch(self.spec, routing, num_sequences=x_BTD.shape[0], inference=context.inference)
        spec, dtype = self.spec, x_BTD.dtype
        input_P = routed_PD
        if spec.latent_dim is not None:
            input_P = projection.einsum("PD,DZ->PZ", routed_PD, self.w_latent[...].astype(dtype))
            input_P = input_P + self.b_latent[...].astype(dtype) if spec.latent_bias else input_P
        if exchange is None:
            out_PD = run_experts(spec, self.experts, input_P, dispatched)
        else:
            options = {"num_sequences": x_BTD.shape[0], "inference": context.inference}
            out_PD = exchange(spec, self.experts, input_P, routing, dispatched, **options)
        if spec.latent_dim is not None:
            out_PD = projection.einsum("PZ,ZD->PD", out_PD, self.w_output[...].astype(dtype))
        if self.spec.zero_computation is not None:
            weight_PE = choice_weights(self.spec, routing, dispatched.kept_PK)
            out_PD = out_PD + self.constant_experts(routed_PD, weight_PE)
        if isinstance(self.spec.shared, ParallelFeedForwardSpec):
            out_PD = self.routed_output_norm(out_PD)
        if record is not None:
            record[f"{name}.router.logits"] = routing.logits_PE
            record[f"{name}.router.weight"] = routing.weight_PK
            record[f"{name}.routed"] = out_PD
        if self.spec.shared is not None:
            out_PD = self._with_shared(x_PD, out_PD, routing.shared_weight_PE)
        if self.spec.output_norm is not None:
            out_PD = self.output_norm(out_PD)
        if self.spec.output_bias:
            out_PD = out_PD + self.b_output[...].astype(dtype)
        return out_PD.reshape(x_BTD.shape), routing, dispatched

    def _with_shared(self, x_PD: jax.Array, routed_PD: jax.Array, weight_PE: jax.Array | None) -> jax.Array:
        """Spec: moezoo.core.reference.moe.with_shared."""
        weight_PF = None
        if weight_PE is not None:
            weight_PF = jnp.repeat(weight_PE, self.spec.shared_feed_forward.hidden_dim // self.spec.num_sinks, axis=1)
        shared_PD = self.shared(x_PD, weight_PF)
        match self.spec.shared:
            case SharedExpertsSpec(kind="sum" | "sink"):
                return routed_PD + shared_PD
            case SharedExpertsSpec(kind="sigmoid_gated"):
                logit_P = projection.einsum("PD,D->P", x_PD, as_array(self.w_shared_gate[...])[:, 0].astype(x_PD.dtype))
                gate_P = jax.nn.sigmoid(logit_P.astype(jnp.float32))
                return routed_PD + (gate_P[:, None] * shared_PD).astype(x_PD.dtype)
            case SharedExpertsSpec():
                return (routed_PD + shared_PD) / 2
            case ParallelFeedForwardSpec():
                return routed_PD + self.shared_output_norm(shared_PD)
            case _:
                raise ValueError("there are no shared experts")


def run_experts(spec: MoESpec, experts: ExpertsCall, x_PD: jax.Array, dispatched: Dispatch) -> jax.Array:
    """Spec: moezoo.core.reference.moe.run_experts."""
    x_RD = x_PD[dispatched.token_R]
    match spec.router.apply_to:
        case "output":
            summed = dispatched
        case "input":
            x_RD = (x_RD.astype(jnp.float32) * dispatched.weight_R[:, None]).astype(x_PD.dtype)
            summed = dispatched._replace(weight_R=used_rows(dispatched))
        case _:
            assert_never(spec.router.apply_to)
    return combine(summed, experts(x_RD, dispatched.size_E), x_PD.shape[0])


class ConstantExperts(nnx.Module):
    """Spec: moezoo.core.reference.moe.without_computation; back in the dtype of x_PD."""

    def __init__(self, spec: ZeroComputationSpec, weights: Weights):
        self.spec = spec
        if spec.num_constant:
            self.constant = weights.parameter("constant")
            self.w_mix = weights.parameter("w_mix")

    def __call__(self, x_PD: jax.Array, weight_PE: jax.Array) -> jax.Array:
        spec, dtype, x_PD = self.spec, x_PD.dtype, x_PD.astype(jnp.float32)
        copies = slice(spec.num_zero, spec.num_zero + spec.num_copy)
        share_P = jnp.sum(weight_PE[:, copies], axis=-1)
        if not spec.num_constant:
            return (share_P[:, None] * x_PD).astype(dtype)
        weight_PE = weight_PE[:, copies.stop :]
        w_mix = self.w_mix[...].astype(jnp.float32)
        mix_PE = jax.nn.sigmoid(jnp.einsum("PD,ED->PE", x_PD, w_mix[..., 0] - w_mix[..., 1]))
        share_P = share_P + jnp.sum(weight_PE * mix_PE, axis=-1)
        constant_PD = jnp.einsum("PE,ED->PD", weight_PE * (1 - mix_PE), self.constant[...].astype(jnp.float32))
        return (share_P[:, None] * x_PD + constant_PD).astype(dtype)


def choice_weights(spec: MoESpec, routing: Routing, kept_PK: jax.Array) -> jax.Array:
    """Spec: moezoo.core.reference.moe.choice_weights; float32."""
    hot_PKE = routing.expert_PK[..., None] == jnp.arange(spec.num_experts, spec.num_choices)
    return jnp.sum(routing.weight_PK[..., None] * (hot_PKE & kept_PK[..., None]), axis=1)
