"""Learned positions and RoPE scaled for a length limit the sequence; every entry point refuses longer sequences."""

import numpy as np
import pytest

from moezoo.api import LoadedModel
from moezoo.core.config.optimizers import AdamWConfig
from moezoo.core.config.run_config import parse_config
from moezoo.core.config.validate import validate
from moezoo.core.data.tokenizers import CharacterTokenizer
from moezoo.core.errors import DataError, SpecError
from moezoo.core.generation.loop import generate
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.parity.check import parity, parity_of
from moezoo.core.reference.sampling import SamplingOptions
from moezoo.core.spec import LearnedPositionsSpec, ModelSpec
from tests.support.host_generation import HostGeneration

LONGEST, V = 8, 5
CONFIG = f"""
model:
  vocab_size: {V}
  embed_dim: 8
  position: {{kind: learned, max_length: {LONGEST}}}
  layers: [{{attention: {{num_heads: 2, num_kv_heads: 1, head_dim: 4}}, feed_forward: {{hidden_dim: 6}}}}]
data: {{sources: [{{kind: dataset, name: fables}}]}}
training: {{steps: 10, batch_size: 2, sequence_length: LENGTH}}
optimizer: {{learning_rate: 1.0e-3}}
"""
LIMIT = rf"; expected at most {LONGEST} tokens \(model.position.max_length\)"


def config_of():
    return parse_config(CONFIG.replace("LENGTH", str(LONGEST)))


class CountingModel:
    """A model that records the number of tokens it gets, and predicts token 0."""

    def __init__(self, spec):
        self.spec, self.seen = spec, 0

    def forward(self, tokens, targets=None, **options):
        self.seen = tokens.shape[1]
        return "output"

    def start_generation(self, prompts, new_tokens, options):
        def logits_of(tokens):
            self.seen = len(tokens)
            return np.eye(V, dtype=np.float32)[0]

        return HostGeneration(logits_of, prompts, options)


def tokens(length):
    return np.zeros((3, length), np.int32)


@pytest.fixture
def loaded():
    config = config_of()
    return LoadedModel(CountingModel(config.model), config, CharacterTokenizer("abcde"), 0, [])


def test_training_on_sequences_beyond_the_positions_is_refused():
    expected = (
        "training.sequence_length is 9, but positions end at 8 tokens (x.yaml). Use a shorter "
        "sequence_length, or a larger model.position.max_length."
    )
    with pytest.raises(SpecError) as seen:
        parse_config(CONFIG.replace("LENGTH", str(LONGEST + 1)), "x.yaml")
    assert str(seen.value) == expected


def test_generation_is_limited_by_the_last_position():
    model, options = CountingModel(config_of().model), SamplingOptions(temperature=0.0)
    assert generate(model, tokens(3), max_new_tokens=5, options=options).shape == (3, 5)
    assert model.seen < LONGEST  # the last new token is not an input
    with pytest.raises(
        DataError, match=r"got a prompt of 3 tokens and 6 new tokens" + LIMIT + r"\. Use fewer tokens\.$"
    ):
        generate(model, tokens(3), max_new_tokens=6, options=options)


def test_loaded_model_refuses_sequences_beyond_its_positions(loaded):
    assert loaded.forward(tokens(LONGEST)) == "output"
    assert loaded.model.seen == LONGEST
    with pytest.raises(DataError, match=r"got tokens of length 9" + LIMIT):
        loaded.forward(tokens(9))
    with pytest.raises(DataError, match=r"got targets of length 9" + LIMIT):
        loaded.forward(tokens(LONGEST), tokens(9))
    with pytest.raises(DataError, match=r"got tokens of length 9" + LIMIT):
        loaded.generate(tokens(9), max_new_tokens=1)
    with pytest.raises(DataError, match=r"got a prompt of 8 tokens and 1 new token" + LIMIT):
        loaded.generate(tokens(LONGEST), max_new_tokens=1)
    assert loaded.model.seen == LONGEST


def test_parity_refuses_them_before_a_model_is_built(tmp_path):
    config, windows = config_of(), tokens(10)
    weights, backends = initial_weights(config.model, 0), {"never built": object()}
    with pytest.raises(DataError, match=r"got sequences of 9 tokens" + LIMIT):
        parity(config.model, weights, windows[:, :-1], windows[:, 1:], backends, AdamWConfig(learning_rate=1e-3))
    path = tmp_path / "x.yaml"
    path.write_text(CONFIG.replace("LENGTH", str(LONGEST)))
    with pytest.raises(DataError, match=r"got sequences of 9 tokens" + LIMIT):
        parity_of(path, backends, sequence_length=9)


def test_other_positions_have_no_limit():
    text = CONFIG.replace("LENGTH", "99").replace("kind: learned, max_length: 8", "kind: sinusoidal")
    model = CountingModel(parse_config(text).model)
    assert model.spec.max_length is None
    options = SamplingOptions(temperature=0.0)
    assert generate(model, tokens(99), max_new_tokens=1, options=options).shape == (3, 1)


@pytest.mark.parametrize(
    "scaling",
    [
        {"kind": "dynamic", "factor": 2, "original_length": 4},
        {"kind": "longrope", "original_length": 4, "short_factors": [1, 1], "long_factors": [1, 2]},
    ],
    ids=["dynamic", "longrope"],
)
def test_scaled_rope_is_limited_by_its_length(scaling):
    first, second = ({"kind": "rope", "scaling": scaling | {"length": length}} for length in (9, LONGEST))
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
    layers = [
        {"attention": heads | {"position": position}, "feed_forward": {"hidden_dim": 6}} for position in (first, second)
    ]
    model = CountingModel(validate(ModelSpec, {"vocab_size": V, "embed_dim": 8, "layers": layers}, "config"))
    options = SamplingOptions(temperature=0.0)
    assert generate(model, tokens(3), max_new_tokens=5, options=options).shape == (3, 5)
    field = r"model\.layers\[1\]\.attention\.position\.scaling\.length"
    with pytest.raises(
        DataError, match=rf"got a prompt of 3 tokens and 6 new tokens; expected at most {LONGEST} tokens \({field}\)"
    ):
        generate(model, tokens(3), max_new_tokens=6, options=options)
    learned = model.spec.model_copy(update={"position": LearnedPositionsSpec(max_length=7)})
    assert (learned.max_length, learned.max_length_field) == (7, "model.position.max_length")
