"""Parameters keep the dtype of their file, are exported unchanged, and are cast where they are used."""

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moezoo.core.checkpoint.safetensors_file import LazyTensors, shapes_of
from moezoo.core.config.run_config import Config, load_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.errors import CheckpointError, TrainingError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.spec import ModelSpec
from tests.support.backends_available import require_backend
from tests.support.tolerances import EXACT, FLOAT32, assert_close
from tests.support.twins import Twin, normal

TINY = Path(__file__).parents[3] / "configs/tiny"
CACHED = ["gated_delta", "sparse_attention", "sinks"]
# Together with CACHED, these use every parameter that is not an operand of a matrix product; each compiles.
COMPILED = ["value_residual", "layer_norm", "zero_centred_norm", "normalized_router", "gating_residual"]
COMPILED += ["biased_logits", "zero_computation", "learned_positions", "expert_choice"]
# The gate's on JAX: with layer_norm they have the parameters of those and of CACHED.
COMBINED = ["learned_positions", "delta_attention", "scaled_rotation", "values", "zero_computation"]
GATE = [*(f"combinations/{name}" for name in COMBINED), "layer_norm"]
FORWARD = [
    *(pytest.param("jax", name) for name in GATE),
    *(pytest.param("jax", name, marks=pytest.mark.release) for name in COMPILED if name != "layer_norm"),
    *(pytest.param("mlx", path.stem) for path in sorted(TINY.glob("*.yaml"))),
]
V = 31


def model_of(name: str) -> ModelSpec:
    folder = TINY.parents[1] / "tests/data" if "/" in name else TINY
    config: Config = load_config(folder / f"{name}.yaml")
    return (config if config.model.vocab_size is not None else with_vocab_size(config, V)).model


def rounded(spec: ModelSpec, dtype: type = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    """Return weights of this dtype with noise, so that no tensor is all 0 or 1; hash tables stay integers."""
    weights = initial_weights(spec, 0)
    return {
        name: (value if name.endswith("hash_table") else value + 0.1 * normal(place, *value.shape)).astype(dtype)
        for place, (name, value) in enumerate(weights.items())
    }


def as_float32(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float32) for name, value in weights.items()}


def tokens_of(spec: ModelSpec, length: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(0, spec.vocab, (2, length)).astype(np.int32)


class RecordedTensors(LazyTensors):
    """Lazy weights that record which of them are read."""

    def __init__(self, weights: Mapping[str, np.ndarray]):
        super().__init__(shapes_of(weights))
        self._weights, self.read = weights, list[str]()

    def __getitem__(self, name: str) -> np.ndarray:
        self.read.append(name)
        return self._weights[name]


@pytest.mark.parametrize(("backend", "name"), FORWARD)
def test_bfloat16_parameters_match_the_same_values_in_float32(backend: str, name: str):
    require_backend(backend)
    twin = Twin(backend)
    spec = model_of(name)
    stored = rounded(spec)
    tokens = tokens_of(spec)
    found = twin.backend().build(spec, stored).forward(tokens, tokens)
    beside = "mlx" if name in GATE else backend  # MLX compiles nothing
    require_backend(beside)
    expected = Twin(beside).backend().build(spec, as_float32(stored)).forward(tokens, tokens)
    assert found.logits.dtype == np.float32
    assert_close(found.logits, expected.logits, FLOAT32)
    assert_close(found.losses["loss"], expected.losses["loss"], FLOAT32)


@pytest.mark.parametrize("name", CACHED)
def test_decoding_with_bfloat16_parameters_matches_float32(twin: Twin, name: str):
    spec = model_of(name)
    stored = rounded(spec)
    tokens = tokens_of(spec)
    require_backend("mlx")
    models = [twin.backend().build(spec, stored), Twin("mlx").backend().build(spec, as_float32(stored))]
    (found, cache), (expected, other) = (model.prefill(tokens, 12) for model in models)
    assert_close(found, expected, FLOAT32)
    (found, _), (expected, _) = (
        model.decode(tokens[:, 0], part) for model, part in zip(models, (cache, other), strict=True)
    )
    assert_close(found, expected, FLOAT32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_exported_parameters_are_bit_identical(twin: Twin, dtype: type):
    spec = model_of("sigmoid_router")
    stored = rounded(spec, dtype)
    exported = twin.backend().build(spec, stored).export_parameters()
    assert sorted(exported) == sorted(stored)
    for name, value in exported.items():
        assert value.dtype == dtype
        assert value.tobytes() == stored[name].tobytes()


def test_other_dtypes_become_float32(twin: Twin):
    spec = model_of("hash")
    stored = {name: value.astype(np.float64) for name, value in initial_weights(spec, 0).items()}
    for name, value in twin.backend().build(spec, stored).export_parameters().items():
        assert value.dtype == np.float32
        assert_close(value, stored[name].astype(np.float32), EXACT)


def test_each_parameter_is_read_once(twin: Twin):
    spec = model_of("gating_residual")
    weights = RecordedTensors(rounded(spec))
    twin.backend().build(spec, weights)
    assert sorted(weights.read) == sorted(weights)


def test_wrong_shape_raises_before_any_tensor_is_read(twin: Twin):
    spec = model_of("top_k")
    weights = RecordedTensors(rounded(spec))
    weights.shapes["final_norm.scale"] = (3,)
    with pytest.raises(CheckpointError, match=r"~ final_norm\.scale \[3\] expected"):
        twin.backend().build(spec, weights)
    assert weights.read == []


def test_training_requires_float32_parameters(twin: Twin):
    spec = model_of("top_k")
    model = twin.backend().build(spec, rounded(spec))
    with pytest.raises(TrainingError, match="training needs float32 parameters; got bfloat16 in "):
        model.start_training(load_config(TINY / "top_k.yaml").optimizer)
