"""Recurrences over segments of tokens on MLX: the same gradients, in the memory of one segment."""

import numpy as np
import pytest

from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.spec import ModelSpec
from tests.support.backends_available import require_backend
from tests.support.tolerances import FLOAT32_GRADIENT, assert_all_close
from tests.support.twins import Twin

MIXERS = {
    "mamba": {"kind": "mamba", "inner_dim": 32, "state_dim": 16, "step_rank": 4},
    "mamba2": {"kind": "mamba2", "num_heads": 4, "head_dim": 8, "state_dim": 8},
    "lightning": {"kind": "lightning", "num_heads": 8, "head_dim": 8},
    "delta": {"kind": "gated_delta", "num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 8, "value_head_dim": 8},
}
MIXERS["delta by channel"] = MIXERS["delta"] | {"num_key_heads": 4, "decay": "channel", "gate": "sigmoid"}


@pytest.fixture
def segments():
    require_backend("mlx")
    return Twin("mlx").module("kernels.segments")


def gradients_and_peak(mixer: dict, rows: int, length: int, documents: np.ndarray | None = None):
    import mlx.core as mx

    layer = {"attention": mixer, "mixer_only": True}
    spec = ModelSpec.model_validate({"embed_dim": 16, "vocab_size": 11, "layers": [layer]})
    model = Twin("mlx").backend().build(spec, initial_weights(spec, 0))
    tokens = np.random.default_rng(0).integers(0, 11, (rows, length + 1), np.int32)
    mx.reset_peak_memory()
    _, gradients = model.loss_and_gradients(tokens[:, :-1], tokens[:, 1:], documents=documents)
    return gradients, mx.get_peak_memory()


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_are_those_of_one_segment(name, segments, monkeypatch):
    documents = np.sort(np.random.default_rng(1).integers(0, 3, (2, 150), np.int32), axis=1)
    found = {}
    for tokens in (1, 10_000):
        monkeypatch.setattr(segments, "TOKENS", tokens)
        found[tokens], _ = gradients_and_peak(MIXERS[name], 2, 150, documents)
    assert_all_close(found[1], found[10_000], FLOAT32_GRADIENT)


@pytest.mark.parametrize("name", MIXERS)
def test_backward_holds_the_intermediates_of_one_segment(name, segments, monkeypatch):
    monkeypatch.setattr(segments, "TOKENS", 10_000)
    _, whole = gradients_and_peak(MIXERS[name], 1, 1024)
    monkeypatch.setattr(segments, "TOKENS", 64)
    _, in_segments = gradients_and_peak(MIXERS[name], 1, 1024)
    assert in_segments < 0.6 * whole
