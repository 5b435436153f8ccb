import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from moezoo.core.huggingface import assembly
from moezoo.core.huggingface.assembly import copy_in_lanes, same_bits
from moezoo.core.huggingface.checkpoint import open_checkpoint
from tests.external.measure_memory import write_checkpoint as write_large
from tests.support.fixtures import write_checkpoint

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


def weights(folder):
    return {name: (value.dtype, value.tobytes()) for name, value in open_checkpoint(folder).weights.items()}


@pytest.mark.parametrize("case", ["mixtral", "granitemoeshared", "deepseek_v3", "qwen3_5_moe_text"])
def test_piece_size_does_not_change_parameters(case, tmp_path, monkeypatch):
    folder = write_checkpoint(case, tmp_path, shards=2)
    whole = weights(folder)
    for piece_bytes in (1, 700):
        monkeypatch.setattr(assembly, "PIECE_BYTES", piece_bytes)
        assert weights(folder) == whole


def test_parameters_are_contiguous_and_aligned_for_jax(tmp_path):
    for value in open_checkpoint(write_checkpoint("mixtral", tmp_path)).weights.values():
        assert value.flags.c_contiguous
        assert value.ctypes.data % 64 == 0


@pytest.mark.parametrize("layout", ["expert", "fused"])
def test_peak_memory_is_one_parameter_plus_one_piece(layout, tmp_path, monkeypatch):
    sizes = {"vocab_size": 8, "hidden_size": 256, "intermediate_size": 512, "num_local_experts": 8}
    write_large(tmp_path, 1, "F32", layout, sizes)
    monkeypatch.setattr(assembly, "PIECE_BYTES", 1 << 16)
    parameters = open_checkpoint(tmp_path).weights
    tracemalloc.start()
    try:
        for name in ("layers.0.moe.experts.w_gate", "layers.0.moe.experts.w_down"):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            value = parameters[name]
            peak = tracemalloc.get_traced_memory()[1] - before
            assert value.nbytes == 4 * 8 * 256 * 512
            assert peak < value.nbytes + (2 << 20)  # one expert of a fused tensor, and the finite check
            del value
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_in_lanes_equals_assignment(dtype):
    source = np.arange(3 * 70 * 130).reshape(3, 70, 130).astype(dtype)
    for view in (
        source,
        source.transpose(2, 1, 0),
        source.transpose(0, 2, 1),
        source[:, ::2, 1:],
        source[0, 0],
        source[0, 0, 0],
    ):
        target = np.zeros(np.shape(view), dtype)
        copy_in_lanes(target[...], np.asarray(view))
        np.testing.assert_array_equal(target, view)
    wide = np.zeros((130, 70, 3), np.float64)
    copy_in_lanes(wide, source.transpose(2, 1, 0))
    np.testing.assert_array_equal(wide, source.transpose(2, 1, 0).astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_distinguishes_nan_and_negative_zero(dtype):
    one = np.array([[0.0, np.nan, 1.0], [2.0, 3.0, 4.0]]).astype(dtype)
    assert same_bits(one, one.copy())
    assert same_bits(one.T, np.ascontiguousarray(one.T))
    for place, value in (((0, 0), -0.0), ((0, 1), 1.0), ((1, 2), 5.0)):
        other = one.copy()
        other[place] = value
        assert not same_bits(one, other)
    assert not same_bits(one, one[:1])
