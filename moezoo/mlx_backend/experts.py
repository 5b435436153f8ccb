"""Routed experts. Spec: moezoo.core.reference.experts."""

from collections.abc import Callable

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import ExpertsSpec, PlainFeedForwardSpec
from moezoo.mlx_backend.adapter import held
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.feed_forward import activate
from moezoo.mlx_backend.kernels.codes import decodes_by_expert
from moezoo.mlx_backend.kernels.grouped_product import (
    are_frozen,
    group_rows,
    grouped_product,
    grouped_swiglu,
    is_plain_swiglu,
)

ExpertsCall = Callable[[mx.array, mx.array], mx.array]
"""Experts as a function: rows [R, D] sorted by expert, of which each has size_E -> outputs [R, D]."""


class Experts(nn.Module):
    """Spec: moezoo.core.reference.experts.experts."""

    def __init__(self, spec: ExpertsSpec, weights: Weights):
        super().__init__()
        self.spec = spec
        if not isinstance(spec, PlainFeedForwardSpec):
            self.w_gate = weights.parameter("w_gate")
        self.w_up = weights.parameter("w_up")
        self.w_down = weights.parameter("w_down")
        if spec.bias:
            if not isinstance(spec, PlainFeedForwardSpec):
                self.b_gate = weights.parameter("b_gate")
            self.b_up = weights.parameter("b_up")
            self.b_down = weights.parameter("b_down")

    def __call__(self, x_RD: mx.array, size_E: mx.array) -> mx.array:
        spec, dtype = self.spec, x_RD.dtype
        groups = group_rows(size_E, x_RD.shape[0], sliced=decodes_by_expert(self, dtype))
        groups = groups._replace(frozen=groups.ends is not None and are_frozen(self))
        if is_plain_swiglu(spec):
            return grouped_swiglu(x_RD, held(self.w_gate), held(self.w_up), held(self.w_down), groups)

        def linear(x_RD: mx.array, name: str) -> mx.array:
            product = grouped_product(x_RD, held(getattr(self, f"w_{name}")), groups)
            if not spec.bias:
                return product
            # In float32, so that the sum over an expert's rows which is the bias's gradient keeps its digits.
            bias_EF: mx.array = self[f"b_{name}"]
            return product + bias_EF.astype(mx.float32)[groups.expert_R].astype(dtype)

        gate = None if isinstance(spec, PlainFeedForwardSpec) else linear(x_RD, "gate")
        return linear(activate(spec, gate, linear(x_RD, "up")), "down")
