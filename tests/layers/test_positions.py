import numpy as np
import pytest

from moezoo.core.config import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference.positions import rotate
from moezoo.core.spec import GroupedQueryAttentionSpec
from tests.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, FLOAT64, assert_close
from tests.twins import B, H, N, T, assert_function_matches, assert_reference_gradient, normal

X_BTNH = normal(0, B, T, N, H)


def rotated(twin, x_BTNH, position_T, base):
    return twin.numpy(twin.module("positions").rotate(twin.array(x_BTNH), twin.array(position_T), base))


@pytest.mark.parametrize(("first", "base"), [(0, 10_000.0), (7, 10_000.0), (0, 100.0)])
def test_value_and_gradient_match_the_reference(twin, first, base):
    position_T = np.arange(first, first + T)
    rotate_on_device, positions = twin.module("positions").rotate, twin.array(position_T)
    assert_function_matches(
        twin,
        lambda x: rotate_on_device(x, positions, base),
        lambda x: rotate(x, position_T, base),
        X_BTNH,
    )


def test_bfloat16_is_near_float32(twin):
    rotate_on_device, positions = twin.module("positions").rotate, twin.array(np.arange(T))
    assert_function_matches(
        twin,
        lambda x: rotate_on_device(x, positions, 10_000.0),
        lambda x: rotate(x, np.arange(T), 10_000.0),
        X_BTNH,
        dtype="bfloat16",
        tolerance=BFLOAT16,
        gradient_tolerance=BFLOAT16_GRADIENT,
    )


def test_angles_are_float32_even_for_bfloat16_inputs(twin):
    """Position 1001 is no bfloat16 number: angles in bfloat16 would be off by whole radians."""
    position_T = np.arange(1001, 1001 + T)
    x = twin.array(X_BTNH, "bfloat16")
    out = twin.module("positions").rotate(x, twin.array(position_T), 10_000.0)
    assert_close(twin.numpy(out), rotate(twin.numpy(x), position_T, 10_000.0), BFLOAT16)


def test_products_depend_on_relative_positions_only(twin):
    query, key = normal(1, 1, 1, 1, H), normal(2, 1, 1, 1, H)

    def product(query_position, key_position):
        turned_query = rotated(twin, query, [query_position], 10_000.0)
        turned_key = rotated(twin, key, [key_position], 10_000.0)
        return np.sum(turned_query * turned_key)

    assert_close(product(13, 9), product(4, 0), FLOAT32)
    assert abs(product(13, 9) - product(13, 10)) > 1e-2


def test_position_zero_is_left_as_it_is(twin):
    np.testing.assert_array_equal(rotated(twin, X_BTNH, np.zeros(T, int), 10_000.0), X_BTNH)


def test_feature_i_is_paired_with_feature_i_plus_half(twin):
    x = np.zeros((1, 1, 1, H))
    x[..., 1] = 1.0
    angle = 3 * 100.0 ** (-2 / H)
    expected = np.zeros((1, 1, 1, H))
    expected[..., 1], expected[..., 1 + H // 2] = np.cos(angle), np.sin(angle)
    assert_close(rotated(twin, x, [3], 100.0), expected, FLOAT32)
    assert_close(rotate(x, np.array([3]), 100.0), expected, FLOAT64)


def test_reference_gradient_agrees_with_finite_differences():
    assert_reference_gradient(lambda x: rotate(x, np.arange(T), 10_000.0), X_BTNH)


def test_odd_head_dim_is_refused():
    with pytest.raises(SpecError, match=r"head_dim is 5, but RoPE rotates pairs.*Use an even head_dim, or position"):
        validate(GroupedQueryAttentionSpec, {"num_heads": 8, "num_kv_heads": 2, "head_dim": 5}, "config")
