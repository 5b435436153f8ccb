"""Whole models that compute with codes, beside models of the numbers that these stand for."""

from pathlib import Path

import numpy as np
import pytest

from moezoo.core.config.run_config import load_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.errors import TrainingError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.quantization.weight import QuantizedWeight
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.core.spec import ModelSpec
from tests.support.backends_available import require_backend
from tests.support.covering import COVERING
from tests.support.quantized import quantized_weights
from tests.support.tolerances import BFLOAT16, FLOAT32, assert_close
from tests.support.twins import Twin

FORMATS = [
    QuantizationFormat("affine", 4, 32),
    QuantizationFormat("affine", 3, 32),
    QuantizationFormat("mxfp4", 4, 32),
    QuantizationFormat("nvfp4", 4, 16),
]
ROOT = Path(__file__).parents[2] / "configs" / "tiny"
GATE = [ROOT / f"{stem}.yaml" for stem in ("shared_gated", "latent_attention_query", "layer_inputs")]
CASES = [(path, FORMATS[place % len(FORMATS)]) for place, path in enumerate([*GATE, *COVERING])]
SHORT, LONG = 5, 18


@pytest.fixture(params=["jax", "mlx"])
def twin(request) -> Twin:
    for name in ("mlx", request.param):
        require_backend(name)
    return Twin(request.param)


def spec_of(path: Path) -> ModelSpec:
    config = load_config(path)
    return (config if config.model.vocab_size is not None else with_vocab_size(config, 31)).model


def built(twin: Twin, spec: ModelSpec, format: QuantizationFormat, beside: Twin) -> tuple[object, object]:
    """Return a model that computes with codes, and one of the backend `beside` with the same numbers as floats."""
    codes = quantized_weights(initial_weights(spec, 5), format)
    assert any(isinstance(value, QuantizedWeight) for value in codes.values())
    floats = {name: value.values() if isinstance(value, QuantizedWeight) else value for name, value in codes.items()}
    return twin.backend().build(spec, codes), beside.backend().build(spec, floats)


@pytest.mark.parametrize(
    ("path", "format"),
    [pytest.param(*case, id=case[0].stem, marks=[] if case[0] in GATE else pytest.mark.release) for case in CASES],
)
def test_codes_give_the_logits_experts_and_text_of_their_numbers(twin, path, format):
    spec = spec_of(path)
    models = built(twin, spec, format, Twin("mlx") if path in GATE else twin)  # MLX compiles nothing
    tokens = np.random.default_rng(0).integers(0, spec.vocab, (2, LONG)).astype(np.int32)
    codes, floats = (model.forward(tokens, inference=True) for model in models)
    if spec.precision.compute == "bfloat16":  # floats are rounded before a product, codes decoded in it are not
        assert_close(codes.logits, floats.logits, BFLOAT16)
        return
    assert_close(codes.logits, floats.logits, FLOAT32)
    for own, other in zip(codes.routing, floats.routing, strict=True):
        np.testing.assert_array_equal(own.expert, other.expert)
    generations = [model.start_generation([tokens[0], tokens[1, :SHORT]], 3, SamplingOptions()) for model in models]
    for _ in range(3):
        codes, floats = (generation.next().fetch() for generation in generations)
        np.testing.assert_array_equal(codes, floats)


def test_codes_are_not_trained(twin):
    model, _ = built(twin, spec_of(ROOT / "dense.yaml"), FORMATS[0], twin)
    config = load_config(ROOT / "dense.yaml")
    with pytest.raises(TrainingError, match="training all parameters of a quantized model is not supported"):
        model.start_training(config.optimizer)
