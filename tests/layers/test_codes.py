"""Products with codes on MLX: the kernels and NumPy's pieces, beside products with the numbers that codes stand for."""

import ml_dtypes
import numpy as np
import pytest

from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.spec import GatedFeedForwardSpec, GroupedQueryAttentionSpec, LayerSpec, ModelSpec
from tests.support.backends_available import require_backend
from tests.support.quantized import FORMATS, quantized_weights, random_weight
from tests.support.tolerances import FLOAT32, FLOAT32_GRADIENT, assert_close
from tests.support.twins import Twin, normal

KINDS = [(format, dtype) for format in FORMATS for dtype in (np.float32, ml_dtypes.bfloat16)]
KINDS = [(format, dtype) for format, dtype in KINDS if format.mode in ("affine", "signed") or dtype == np.float32]
AFFINE = QuantizationFormat("affine", 4, 32)


@pytest.fixture(params=[True, False], ids=["x86", "other"])
def codes(request, monkeypatch):
    """The module of products, on x86 with NumPy for matrices of any size, and on another CPU."""
    require_backend("mlx")
    module = Twin("mlx").module("kernels.codes")
    if request.param and not module.is_x86_cpu():
        pytest.skip("not an x86 CPU")
    monkeypatch.setattr(module, "is_x86_cpu", lambda: request.param)
    monkeypatch.setattr(module, "FEW_NUMBERS", 0)
    return module


def pair(weight):
    """Return codes on the device, and their numbers."""
    return Twin("mlx").module("quantization").quantized_array(weight), weight.values()


@pytest.mark.parametrize(("format", "dtype"), KINDS, ids=str)
def test_products_are_those_of_the_decoded_numbers(codes, format, dtype, monkeypatch):
    monkeypatch.setattr(codes.x86, "PIECE", 2**10)  # several pieces
    weight, dense = pair(random_weight(format, (128, 3, 5), (1, 2), (0,), dtype))
    for rows in (1, 20):
        x = normal(0, 1, rows, 128)
        found = codes.product("BTD,DNH->BTNH", Twin("mlx").array(x), weight)
        assert_close(Twin("mlx").numpy(found), np.einsum("BTD,DNH->BTNH", x, dense.astype(np.float64)), FLOAT32)
    gradient = normal(1, 1, rows, 3, 5)
    of_x = gradient_of(lambda x: codes.product("BTD,DNH->BTNH", x, weight), x, gradient)
    assert_close(of_x, np.einsum("BTNH,DNH->BTD", gradient, dense.astype(np.float64)), FLOAT32)


def gradient_of(call, x, gradient):
    """Gradient of x, given that of the result."""
    import mlx.core as mx

    twin = Twin("mlx")
    return twin.numpy(mx.vjp(lambda x: [call(x)], [twin.array(x)], [twin.array(gradient)])[1][0])


@pytest.mark.parametrize(
    ("subscripts", "shape", "w", "lead", "packed"),
    [
        ("BTNH,NHD->BTD", (2, 3, 4, 8), (4, 8, 5), (2,), (0, 1)),
        ("BTD,VD->BTV", (2, 3, 32), (7, 32), (0,), (1,)),
        ("BSZ,ZNH->BSNH", (2, 3, 5), (5, 4, 32), (1, 0), (2,)),
        ("BTNH,ZNH->BTNZ", (2, 3, 4, 32), (5, 4, 32), (1, 0), (2,)),
        ("BTNZ,ZNH->BTNH", (2, 3, 4, 32), (32, 4, 5), (1, 2), (0,)),
        ("BTNZ,ZNH->BTNH", (2, 3, 4, 32), (32, 4, 5), (2, 1), (0,)),
        ("...D,DF->...F", (3, 32), (32, 5), (1,), (0,)),
        ("...D,DF->...F", (3, 6), (6, 32), (0,), (1,)),
        ("BTD,DNH->BTNH", (2, 3, 6), (6, 4, 32), (0, 1), (2,)),
        ("BTD,DLZ->BTLZ", (2, 3, 32), (32, 4, 5), (2, 1), (0,)),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_codes_may_run_over_any_axes(codes, subscripts, shape, w, lead, packed, dtype):
    weight, dense = pair(random_weight(AFFINE, w, lead, packed, dtype))
    x = normal(1, *shape)
    found = codes.product(subscripts, Twin("mlx").array(x), weight)
    assert_close(Twin("mlx").numpy(found), np.einsum(subscripts, x, dense.astype(np.float64)), FLOAT32)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_each_row_is_multiplied_by_the_matrix_of_its_expert(codes, dtype):
    twin = Twin("mlx")
    weight, dense = pair(random_weight(AFFINE, (4, 32, 5), (0, 2), (1,), dtype))
    x, expert = normal(2, 6, 32), np.array([0, 0, 2, 2, 2, 3])
    expected = np.stack([row @ dense[own] for row, own in zip(x, expert, strict=True)])
    sliced = codes.sliced_product(twin.array(np.vstack([x, x[:1]])), weight, [2, 2, 5, 6])
    assert_close(twin.numpy(sliced), np.vstack([expected, np.zeros((1, 5))]), FLOAT32)
    gradient = normal(3, 7, 5)
    of_x = gradient_of(lambda x: codes.sliced_product(x, weight, [2, 2, 5, 6]), np.vstack([x, x[:1]]), gradient)
    backward = np.stack([row @ dense[own].T for row, own in zip(gradient[:6], expert, strict=True)])
    assert_close(of_x, np.vstack([backward, np.zeros((1, 32))]), FLOAT32)
    if codes.is_x86_cpu() or dtype == np.float32:
        order = np.array([[5, 0], [3, 1]])
        index = [twin.array(each.astype(np.uint32)) for each in (expert[order], order)]
        found = codes.product_of_rows(twin.array(x)[:, None], weight, *index, in_order=False)
        assert_close(twin.numpy(found)[:, :, 0], expected[order], FLOAT32)
        of_x = gradient_of(
            lambda x: codes.product_of_rows(x[:, None], weight, *index, in_order=False),
            x,
            gradient[:4].reshape(2, 2, 1, 5),
        )
        by_row = np.zeros((6, 32))
        by_row[order.reshape(-1)] = [row @ dense[own].T for row, own in zip(gradient, expert[order].flat, strict=False)]
        assert_close(of_x, by_row, FLOAT32)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_experts_in_codes_have_the_gradient_of_their_inputs(codes, dtype):
    import mlx.core as mx

    gate, up, down = (pair(random_weight(AFFINE, (4, 32, 32), (0, 2), (1,), dtype)) for _ in range(3))
    ends, gradient = [9, 9, 20, 30], normal(1, 32, 32)

    def by_slices(x):
        slices = [
            (rows @ mx.array(gate[1][e]), rows @ mx.array(up[1][e]), mx.array(down[1][e]))
            for e, rows in enumerate(mx.split(x, ends)[:4])
        ]
        return mx.concatenate([*((g * mx.sigmoid(g) * u) @ w for g, u, w in slices), mx.zeros((2, 32))])

    x = normal(0, 32, 32) / 10
    found = gradient_of(lambda x: codes.grouped_swiglu(x, [gate[0], up[0], down[0]], ends), x, gradient)
    assert_close(found, gradient_of(by_slices, x, gradient), FLOAT32_GRADIENT)


def test_the_header_says_what_stays_in_codes_and_a_damaged_scale_is_named():
    require_backend("mlx")
    attention = GroupedQueryAttentionSpec(num_heads=4, num_kv_heads=4, head_dim=8)
    layers = (LayerSpec(attention=attention, feed_forward=GatedFeedForwardSpec(hidden_dim=32)),)
    spec = ModelSpec(vocab_size=8, embed_dim=32, layers=layers)
    backend, weights = Twin("mlx").backend(), quantized_weights(initial_weights(spec, 0), AFFINE)
    backend.build(spec, initial_weights(spec, 0))
    assert "codes" not in backend.facts()
    damaged = weights["layers.0.feed_forward.w_up"]
    damaged.scales[1, 0] = np.nan
    assert backend.build(spec, weights).nonfinite_parameters() == ["layers.0.feed_forward.w_up"]
    assert backend.facts()["codes"].startswith("9 parameters (4-bit affine, groups of 32), ")
