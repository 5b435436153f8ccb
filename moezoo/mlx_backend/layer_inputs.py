"""Per-layer inputs, beside the residual stream. Spec: moezoo.core.reference.layer_inputs."""

import math

import mlx.core as mx
from mlx import nn

from moezoo.core.spec import LayerInputsSpec, NormSpec
from moezoo.mlx_backend.arrays import Weights
from moezoo.mlx_backend.feed_forward import activate
from moezoo.mlx_backend.kernels import projection
from moezoo.mlx_backend.normalization import norm
from moezoo.mlx_backend.quantization import take


class LayerInputs(nn.Module):
    """Spec: moezoo.core.reference.layer_inputs.layer_inputs; adds in float32."""

    def __init__(self, spec: LayerInputsSpec, norm_spec: NormSpec, weights: Weights):
        super().__init__()
        self.spec = spec
        self.weight = weights.parameter("weight")
        self.w_context = weights.parameter("w_context")
        self.norm = norm(norm_spec, weights.inside("norm"))

    def __call__(self, tokens_BT: mx.array, x_BTD: mx.array) -> mx.array:
        context = projection.einsum("BTD,DLZ->BTLZ", x_BTD, self.w_context.astype(x_BTD.dtype))
        context = self.norm(context.astype(mx.float32) / math.sqrt(x_BTD.shape[-1]))
        own = math.sqrt(self.spec.dim) * take(self.weight, tokens_BT).astype(mx.float32)
        return ((context + own) / math.sqrt(2)).astype(x_BTD.dtype)


class LayerInput(nn.Module):
    """Spec: moezoo.core.reference.layer_inputs.layer_input."""

    def __init__(self, spec: LayerInputsSpec, norm_spec: NormSpec, weights: Weights):
        super().__init__()
        self.spec = spec
        self.w_gate = weights.parameter("w_gate")
        self.w_output = weights.parameter("w_output")
        self.norm = norm(norm_spec, weights.inside("norm"))

    def __call__(self, x_BTD: mx.array, input_BTZ: mx.array) -> mx.array:
        gate = projection.einsum("BTD,DZ->BTZ", x_BTD, self.w_gate.astype(x_BTD.dtype))
        gated = activate(self.spec.gated, gate, input_BTZ)
        return self.norm(projection.einsum("BTZ,ZD->BTD", gated, self.w_output.astype(x_BTD.dtype)))
