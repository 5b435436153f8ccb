"""Generation on the device: rows of a batch are independent, prompts come in pieces, caches grow and roll."""

from pathlib import Path

import numpy as np
import pytest

from moezoo.core.config.run_config import load_config
from moezoo.core.errors import DataError
from moezoo.core.generation import prefill as core_prompts
from moezoo.core.generation.loop import generate
from moezoo.core.generation.prefill import padded, widths
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.sampling import SamplingOptions, penalized, sample
from tests.support.backends_available import require_backend
from tests.support.twins import Twin

TINY = Path(__file__).parents[2] / "configs" / "tiny"
COMBINATIONS = Path(__file__).parents[1] / "data" / "combinations"
KINDS = (
    *("top_k", "sliding_window", "chunked_attention", "latent_attention", "sparse_attention", "gated_delta", "mamba2"),
    *(
        "lightning_attention",
        "convolutional_attention",
        "short_convolution",
        "learned_positions",
        "shared_keys",
        "value_residual",
        "sinks",
        "layer_inputs",
    ),
    *("relative_positions", "dynamic_convolution"),
)
# Each compiles four programs on JAX: the gate's are one of each kind of cache.
ON_JAX = ("sliding_window", "sparse_attention", "relative_positions", "learned_positions", "shared_keys")
PIECES_ON_JAX = ("sliding_window", "delta_attention")
LENGTHS = (3, 11, 1, 6)
GREEDY = SamplingOptions(temperature=0)


def on_each_backend(names, on_jax):
    """Parameters: names, each on both backends; on JAX in the gate those of `on_jax`."""
    return pytest.mark.parametrize(
        ("name", "twin"),
        [
            pytest.param(name, backend, marks=pytest.mark.release if backend == "jax" and name not in on_jax else ())
            for name in names
            for backend in ("jax", "mlx")
        ],
        indirect=["twin"],
    )


def built(twin, name):
    folder = COMBINATIONS if name in ("delta_attention", "sparse_attention") else TINY
    spec = load_config(folder / f"{name}.yaml").model
    if spec.vocab_size is None:
        spec = spec.model_copy(update={"vocab_size": 61})
    return twin.backend().build(spec, {key: 3 * value for key, value in initial_weights(spec, seed=0).items()})


def beside(twin, in_the_gate) -> Twin:
    """Return MLX, whose text JAX must give in the gate: each shape that JAX compiles takes it a second."""
    if not in_the_gate:
        return twin
    require_backend("mlx")
    return Twin("mlx")


def prompts_of(spec):
    rng = np.random.default_rng(0)
    return [rng.integers(0, spec.vocab, length).astype(np.int32) for length in LENGTHS]


@on_each_backend(KINDS, ON_JAX)
def test_rows_of_unequal_length_generate_as_they_do_alone(twin, name):
    model = built(twin, name)
    prompts = prompts_of(model.spec)
    together = generate(model, prompts, max_new_tokens=8, options=GREEDY)
    model = built(beside(twin, name in ON_JAX), name)
    for row, prompt in zip(together, prompts, strict=True):
        np.testing.assert_array_equal(generate(model, [prompt], max_new_tokens=8, options=GREEDY)[0], row)


def test_sampled_text_is_what_the_reference_draws_of_the_whole_pass(twin):
    """With penalty, filters, position and sequence; so both backends draw the same."""
    model = built(twin, "top_k")
    options = SamplingOptions(temperature=1.2, top_k=20, top_p=0.95, repetition_penalty=1.2, seed=2**35 + 1)
    prompts = prompts_of(model.spec)
    found = generate(model, prompts, max_new_tokens=6, options=options)
    model = built(beside(twin, True), "top_k")
    for step in range(6):
        so_far = [np.concatenate([prompt, row[:step]]) for prompt, row in zip(prompts, found, strict=True)]
        logits = np.concatenate(
            [penalized(model.forward(text[None], inference=True).logits[:, -1], text[None], 1.2) for text in so_far]
        )
        expected = sample(logits, options, np.array([len(text) for text in so_far], np.int32))
        np.testing.assert_array_equal(found[:, step], expected, f"step {step}")


@on_each_backend(
    [
        *("top_k", "sliding_window", "gated_delta", "delta_attention", "convolutional_attention"),
        *("compressed_attention", "dynamic_convolution"),
    ],
    PIECES_ON_JAX,
)
def test_prompts_in_pieces_and_grown_caches_give_the_same_text(twin, name, monkeypatch):
    model = built(twin, name)
    prompts = [np.tile(prompt, 4) for prompt in prompts_of(model.spec)]
    whole = generate(built(beside(twin, name in PIECES_ON_JAX), name), prompts, max_new_tokens=20, options=GREEDY)
    monkeypatch.setattr(core_prompts, "CHUNK", 16)
    monkeypatch.setattr(twin.module("generation"), "INITIAL_CAPACITY", 16)
    np.testing.assert_array_equal(generate(model, prompts, max_new_tokens=20, options=GREEDY), whole)


def test_weights_that_are_not_finite_raise_an_error_of_one_line(twin):
    model = built(twin, "top_k")
    weights = model.export_parameters()
    weights["final_norm.scale"] = np.full_like(weights["final_norm.scale"], np.nan)
    broken = twin.backend().build(model.spec, weights)
    for options in (GREEDY, SamplingOptions()):
        with pytest.raises(DataError, match="the logits of sequence 0 hold nan at token 0; expected finite numbers"):
            generate(broken, [[1, 2]], max_new_tokens=3, options=options)


def test_full_pieces_follow_the_remainder():
    assert widths(1000) == [232, 256, 256, 256]
    assert widths(1000, smallest=16) == [256, 256, 256, 256]
    assert widths(3, smallest=16) == [16]
    assert widths(512, smallest=16) == [256, 256]
    tokens, first = padded([np.array([7]), np.array([8, 9])], 4)
    assert tokens.tolist() == [[0, 0, 0, 7], [0, 0, 8, 9]]
    assert first.tolist() == [3, 2]
