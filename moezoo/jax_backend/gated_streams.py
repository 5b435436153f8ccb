"""Gated streams: several residual streams. Spec: moezoo.core.reference.gated_streams."""

import jax
import jax.numpy as jnp
from flax import nnx

from moezoo.core.spec import NormSpec
from moezoo.jax_backend.arrays import Weights
from moezoo.jax_backend.kernels import projection
from moezoo.jax_backend.normalization import norm


class GatedRead(nnx.Module):
    """Spec: moezoo.core.reference.gated_streams.read_gated; gates and mean in float32, cast back."""

    def __init__(self, norm_spec: NormSpec, weights: Weights):
        self.norm = norm(norm_spec, weights.inside("norm"))
        self.w_down = weights.parameter("w_down")
        self.w_up = weights.parameter("w_up")

    def __call__(self, x_BTJD: jax.Array) -> jax.Array:
        return self.gated(self.norm(x_BTJD))

    def gated(self, normed_BTJD: jax.Array) -> jax.Array:
        """Return the gated mean of normalized streams."""
        dtype = normed_BTJD.dtype
        down_BTZ = projection.einsum("BTJD,JDZ->BTZ", normed_BTJD, self.w_down[...].astype(dtype))
        down_BTZ = jax.nn.silu(down_BTZ / normed_BTJD.shape[2])
        up_BTJD = projection.einsum("BTZ,ZJD->BTJD", down_BTZ, self.w_up[...].astype(dtype))
        gate_BTJD = jax.nn.sigmoid(up_BTJD.astype(jnp.float32))
        return jnp.mean(gate_BTJD * normed_BTJD.astype(jnp.float32), axis=2).astype(dtype)


class GatedStreams(GatedRead):
    """Spec: moezoo.core.reference.gated_streams, `read_gated` and `write_weights`; of one block."""

    def __init__(self, norm_spec: NormSpec, weights: Weights):
        super().__init__(norm_spec, weights)
        self.w_write = weights.parameter("w_write")

    def read(self, x_BTJD: jax.Array, block: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        """Spec: moezoo.core.reference.residual.read; the connection is the weights [B, T, J]."""
        normed_BTJD = self.norm(x_BTJD)
        logits_BTU = projection.einsum("BTJD,JDU->BTU", normed_BTJD, self.w_write[...].astype(x_BTJD.dtype))
        return self.gated(normed_BTJD), 2 * jax.nn.sigmoid(logits_BTU.astype(jnp.float32) / x_BTJD.shape[2])

    def write(self, x_BTJD: jax.Array, connection: jax.Array, out_BTD: jax.Array, block: int | jax.Array) -> jax.Array:
        """Spec: moezoo.core.reference.residual.write; in float32, cast back."""
        written = connection[..., None] * out_BTD[:, :, None].astype(jnp.float32)
        return (x_BTJD.astype(jnp.float32) + written).astype(x_BTJD.dtype)
