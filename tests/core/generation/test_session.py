"""A session reads of each prompt only the tokens that its caches lack, and gives the text of a whole generation."""

from pathlib import Path

import numpy as np
import pytest

from moezoo.core.config.run_config import load_config
from moezoo.core.generation.loop import generate
from moezoo.core.generation.prefill import widths_after
from moezoo.core.generation.session import Session
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.sampling import SamplingOptions

TINY = Path(__file__).parents[3] / "configs" / "tiny"
GREEDY = SamplingOptions(temperature=0)
# One that draws by position and knows the tokens so far.
SAMPLED = SamplingOptions(temperature=1.1, top_k=20, repetition_penalty=1.2, seed=3)
KINDS = ("top_k", "gated_delta", "sliding_window", "latent_attention", "sparse_attention", "short_convolution")
STATES = ("gated_delta", "sliding_window", "short_convolution")


def with_jax(kinds, on_jax):
    """Parameters: kinds on both backends; on JAX, which compiles each width, in the gate only those of `on_jax`."""
    return pytest.mark.parametrize(
        ("name", "twin"),
        [
            pytest.param(name, backend, marks=pytest.mark.release if backend == "jax" and name not in on_jax else ())
            for name in kinds
            for backend in ("jax", "mlx")
        ],
        indirect=["twin"],
    )


def built(twin, name, **of_layers):
    spec = load_config(TINY / f"{name}.yaml").model
    spec = spec.model_copy(update={"layers": tuple(layer.model_copy(update=of_layers) for layer in spec.layers)})
    if spec.vocab_size is None:
        spec = spec.model_copy(update={"vocab_size": 61})
    return twin.backend().build(spec, {key: 3 * value for key, value in initial_weights(spec, seed=0).items()})


def answered(session, model, prompt, keep=(), options=GREEDY, stop_after=6):
    """Return the tokens of an answer, which are those of a generation that reads everything."""
    found = []
    logits: list[np.ndarray] = []
    told = {"max_new_tokens": 6, "options": options, "keep": keep, "on_logits": logits.append}
    for token in session.stream(np.array(prompt), **told):
        found.append(token)
        if options is GREEDY:
            assert (logits[-1].argmax(), logits[-1].shape) == (token, (1, model.spec.vocab))
        if len(found) == stop_after:
            break
    assert len(logits) == len(found)
    assert found == generate(model, [prompt], max_new_tokens=6, options=options)[0].tolist()[:stop_after]
    return found


@with_jax(["top_k", "gated_delta"], ["gated_delta"])
def test_a_turn_reads_only_what_is_new(twin, name):
    """All pieces are of 1 token, and prompts of at most 16: three programs on JAX."""
    model = built(twin, name, repeat=1)
    session, first = Session(model), list(range(1, 10))
    answer = answered(session, model, first, keep=[8], stop_after=2)
    assert (session.num_shared, session.num_read) == (0, 9)
    answered(session, model, [*first, *answer, 20], keep=[11], stop_after=2)
    assert (session.num_shared, session.num_read) == (11, 1)
    answered(session, model, [*first, *answer, 30], stop_after=2)  # a state is taken from before the 20
    assert (session.num_shared, session.num_read) == (11, 1)


@with_jax(KINDS, [])
def test_turns_read_only_new_tokens_and_give_the_text_of_a_whole_generation(twin, name):
    model, rng = built(twin, name), np.random.default_rng(0)
    session = Session(model)

    def more(length):
        return rng.integers(0, model.spec.vocab, length).tolist()

    first = more(9)
    answer = answered(session, model, first, keep=[7])
    assert (session.num_shared, session.num_read) == (0, 9)
    second = [*first, *answer, *more(5)]
    answer = answered(session, model, second, keep=[18], options=SAMPLED, stop_after=3)  # as by Ctrl-C
    assert session.num_read == 6  # the last token of an answer of full length is not in the caches
    third = [*second, *answer, *more(4)]
    answered(session, model, third, keep=[25])
    assert session.num_read == 4
    changed = [*third[:26], (third[26] + 1) % model.spec.vocab, *more(8)]  # the template changed what was said
    answered(session, model, changed)
    assert session.num_shared == (25 if name in STATES else 26)
    answered(session, model, more(300), keep=[280])  # several chunks, a larger cache
    assert session.num_shared == 0


def test_pieces_that_continue_a_sequence_are_not_padded():
    assert widths_after(37) == [37]
    assert widths_after(37, smallest=16) == [32, 4, 1]
    assert widths_after(600, smallest=16) == [256, 256, 64, 16, 8]
