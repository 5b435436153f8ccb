"""Gated short convolutions. Spec: moezoo.core.reference.short_convolution."""

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import ShortConvolutionSpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.convolution import causal_convolution
from moezoo.jax_backend.kernels import projection
from moezoo.jax_backend.kv_cache import Attended, ConvolutionCache, empty_convolution_cache
from moezoo.jax_backend.positions import Documents, positions


class ShortConvolution(nnx.Module):
    """Spec: moezoo.core.reference.short_convolution.short_convolution; with a cache, for the next tokens."""

    def __init__(self, spec: ShortConvolutionSpec, weights: Weights, layer: int):
        del layer  # all layers are alike
        self.spec = spec
        self.w_input_gate = weights.parameter("w_input_gate")
        self.w_output_gate = weights.parameter("w_output_gate")
        self.w_value = weights.parameter("w_value")
        self.conv = weights.parameter("conv")
        self.w_output = weights.parameter("w_output")
        if spec.bias:
            self.b_input_gate = weights.parameter("b_input_gate")
            self.b_output_gate = weights.parameter("b_output_gate")
            self.b_value = weights.parameter("b_value")
            self.b_conv = weights.parameter("b_conv")
            self.b_output = weights.parameter("b_output")

    def __call__(
        self,
        x_BTD: jax.Array,
        cache: ConvolutionCache | None = None,
        *,
        first_value_BTMH: jax.Array | None = None,
        first_B: jax.Array | None = None,
        documents: Documents | None = None,
    ) -> Attended:
        """With a cache, the tokens follow the cached ones; row b starts at slot `first_B`, after its left padding."""
        del first_value_BTMH  # only grouped-query attention uses it
        dtype = x_BTD.dtype
        input_gate_BTZ = projection.einsum("BTD,DZ->BTZ", x_BTD, self.w_input_gate[...].astype(dtype))
        output_gate_BTZ = projection.einsum("BTD,DZ->BTZ", x_BTD, self.w_output_gate[...].astype(dtype))
        value_BTZ = projection.einsum("BTD,DZ->BTZ", x_BTD, self.w_value[...].astype(dtype))
        if self.spec.bias:
            input_gate_BTZ = input_gate_BTZ + self.b_input_gate[...].astype(dtype)
            output_gate_BTZ = output_gate_BTZ + self.b_output_gate[...].astype(dtype)
            value_BTZ = value_BTZ + self.b_value[...].astype(dtype)
        gated_BTZ = input_gate_BTZ * value_BTZ
        batch, length, embed_dim = x_BTD.shape
        if first_B is not None:
            position_BT = positions(length, 0 if cache is None else cache.length, first_B)
            gated_BTZ = jnp.where(position_BT[..., None] >= 0, gated_BTZ, 0).astype(dtype)
        past = empty_convolution_cache(self.spec, batch, embed_dim, dtype) if cache is None else cache
        convolved_BTZ = causal_convolution(gated_BTZ, self.conv[...], past.input_BSZ, documents)
        if self.spec.bias:
            convolved_BTZ = convolved_BTZ + self.b_conv[...].astype(jnp.float32)
        if cache is not None:
            cache = cache.extend(gated_BTZ)
        gated_BTZ = (output_gate_BTZ * convolved_BTZ).astype(dtype)
        output = projection.einsum("BTZ,ZD->BTD", gated_BTZ, self.w_output[...].astype(dtype))
        if self.spec.bias:
            output = output + self.b_output[...].astype(dtype)
        return Attended(output, cache, None, None)
