"""Memory of programs that compute with codes on JAX: matrices are decoded in pieces, experts one at a time."""

import ml_dtypes
import numpy as np
import pytest

from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.spec import GatedFeedForwardSpec
from tests.support.backends_available import require_backend
from tests.support.quantized import random_weight

FORMAT = QuantizationFormat("affine", 4, 32)
FLOAT_BYTES = 4


@pytest.fixture(autouse=True)
def jax_pieces(monkeypatch):
    """Pieces of 1,024 numbers."""
    require_backend("jax")
    from moezoo.jax_backend.kernels import projection

    monkeypatch.setattr(projection, "PIECE", 1 << 10)


def on_device(shape, lead, packed):
    from moezoo.jax_backend.quantization import quantized_array

    return quantized_array(random_weight(FORMAT, shape, lead, packed, ml_dtypes.bfloat16))


def temporary_bytes(function, *arguments):
    import jax

    from moezoo.jax_backend.transforms.rematerialization import compiler_options

    compiled = jax.jit(function, compiler_options=compiler_options(rematerialize=False)).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_pieces_give_the_product_and_gradient_of_the_whole_matrix():
    import jax

    from moezoo.jax_backend.kernels.projection import times_codes
    from moezoo.jax_backend.quantization import dequantize

    rows = 37  # the last of three pieces begins in the one before it
    w_FD, random = on_device((rows, 64), (0,), (1,)), np.random.default_rng(0)
    x_RD, gradient_RF = (random.normal(size=(3, size)).astype(np.float32) for size in (64, rows))
    matrix = np.asarray(dequantize(w_FD))
    product, pull = jax.vjp(lambda x_RD: times_codes(x_RD, w_FD), x_RD)
    np.testing.assert_allclose(product, x_RD @ matrix.T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(pull(gradient_RF)[0], gradient_RF @ matrix, rtol=1e-5, atol=1e-4)


def test_no_product_holds_a_whole_matrix_in_floats():
    from moezoo.jax_backend.kernels.projection import einsum

    w_head, x_BTD = on_device((256, 512), (1,), (0,)), np.ones((1, 2, 256), np.float32)
    assert temporary_bytes(lambda x, w: einsum("BTD,DV->BTV", x, w), x_BTD, w_head) < 256 * 512 * FLOAT_BYTES / 4


@pytest.mark.parametrize("num_rows", [2, 64], ids=["few rows", "many rows"])
def test_experts_are_decoded_one_at_a_time(num_rows):
    from moezoo.jax_backend.kernels.expert_blocks import expert_kernel

    num_experts, width = 16, 64
    spec = GatedFeedForwardSpec(hidden_dim=width)
    parameters = {name: on_device((num_experts, width, width), (0, 2), (1,)) for name in ("w_gate", "w_up", "w_down")}
    size_E = np.zeros(num_experts, np.int32)
    size_E[:2] = num_rows // 2
    x_RD = np.ones((num_rows, width), np.float32)

    def experts(x_RD, parameters, size_E):
        return expert_kernel(x_RD, parameters)(spec, x_RD, parameters, size_E)

    of_rows = 8 * num_rows * width * FLOAT_BYTES
    in_floats = num_experts * width * width * FLOAT_BYTES
    assert temporary_bytes(experts, x_RD, parameters, size_E) - of_rows < in_floats
