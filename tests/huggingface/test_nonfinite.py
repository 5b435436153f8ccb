import ml_dtypes
import numpy as np
import pytest

from moezoo.core.huggingface.nonfinite import is_finite, nonfinite_names, nonfinite_warning

FLOATS = [ml_dtypes.bfloat16, np.float16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_nonfinite_value_is_found_at_any_position(dtype, value):
    array = np.full((3, 700, 300), 1.5).astype(dtype)
    array.reshape(-1)[::1000] = ml_dtypes.finfo(dtype).max
    array[0, 0, 0], array[0, 0, 1] = -0.0, ml_dtypes.finfo(dtype).smallest_subnormal
    for view in (array, array.T, array[:, ::2, 1:], array[:0]):
        assert is_finite(view)
    array[2, 698, 299] = value
    for view in (array, array.T, array[:, ::2, 1:]):
        assert not is_finite(view)
    assert is_finite(array[:, ::2, :299])


def test_warning_has_the_names():
    parameters = [("a", np.float32([1, np.nan])), ("b", np.float32(1)), ("c", np.float32(np.inf))]
    names = nonfinite_names(iter(parameters))
    assert names == ["a", "c"]
    assert "FOLDER has NaN or infinity in a, c; " in nonfinite_warning(names, "FOLDER")
    assert nonfinite_warning([], "FOLDER") is None
    assert "and 2 more" in nonfinite_warning(list("abcdefg"), "FOLDER")
