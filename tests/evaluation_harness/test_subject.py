"""What lm-eval asks of a model, on a tiny published one and on a run; the class itself is checked in tests/external."""

import numpy as np
import pytest

import moezoo
from moezoo.api import LoadedModel
from moezoo.core.data.tokenizers import CharacterTokenizer
from moezoo.core.errors import SpecError, TokenizerError
from moezoo.core.generation.likelihood import Pair
from moezoo.evaluation_harness.subject import Subject
from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.backends_available import require_backend
from tests.support.fixtures import write_checkpoint

BOS, END = 1, 2


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    require_backend("mlx")
    folder = write_tokenizer(write_checkpoint("mixtral", tmp_path_factory.mktemp("harness") / "mixtral"))
    return moezoo.load(folder, backend="mlx")


def direct(loaded, ids, first):
    """Log-probability of the tokens from `first` on, by one forward pass without padding."""
    logits = loaded.model.forward(np.asarray([ids], np.int32), inference=True).logits[0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(logprobs[place - 1, ids[place]] for place in range(first, len(ids)))


@pytest.mark.parametrize("batch_size", [1, None])
def test_scores_are_those_of_forward_passes(loaded, batch_size):
    subject = Subject(loaded, batch_size=batch_size)
    whole = [subject.encode(f"the cat {word}") for word in ("sat on the mat", "ran", "and the owl saw the dog")]
    pairs = [Pair(ids[:3], ids[3:]) for ids in whole]
    for ids, found in zip(whole, subject.score(pairs), strict=True):
        assert found.nats == pytest.approx(direct(loaded, ids, 3), rel=1e-5)
    new = loaded.generate(np.asarray([whole[0]]), max_new_tokens=3, temperature=0.0)[0].tolist()
    (likely, unlikely) = subject.score([Pair(whole[0], new), Pair(whole[0], [new[0], new[1], (new[2] + 1) % 48])])
    assert (likely.is_greedy, unlikely.is_greedy) == (True, False)


def test_a_text_longer_than_the_context_is_scored_in_windows(loaded):
    subject = Subject(loaded, max_length=8, batch_size=4)
    text = "the cat sat on the mat and the owl saw the dog"
    ids = subject.encode(text)
    expected = direct(loaded, [BOS, *ids[:8]], 1)
    for start in range(8, len(ids), 8):
        end = min(start + 8, len(ids))
        window = ids[end - 9 : end]
        expected += direct(loaded, window, len(window) - (end - start))
    assert subject.score_whole([text, "the cat"])[0] == pytest.approx(expected, rel=1e-5)
    assert subject.score_whole([]) == []


def test_texts_begin_with_the_tokenizers_first_token_once(loaded):
    subject = Subject(loaded)
    plain = loaded.tokenizer.encode("the cat").tolist()
    assert subject.encode("the cat") == [BOS, *plain]
    assert subject.encode("the cat", special=False) == plain
    assert subject.encode("<s>the cat")[:2].count(BOS) == 1
    assert Subject(loaded, add_bos_token=False).encode("the cat") == plain
    assert (subject.prefix_token, Subject(loaded, prefix_token=7).prefix_token) == (BOS, 7)


def test_a_generated_text_ends_at_a_stop_string_and_is_that_of_generate(loaded):
    subject, greedy = Subject(loaded, batch_size=2), {"temperature": 0.0}
    contexts = ["the cat", "and the owl saw", "the dog"]
    made = subject.generate(contexts, 16, [], greedy)
    for context, text in zip(contexts, made, strict=True):
        ids = loaded.generate(loaded.encode_prompt(context)[None], max_new_tokens=16, chat=True, **greedy)[0]
        assert text == loaded.tokenizer.decode([token for token in ids if token > 4])  # without special tokens
    longest = max(made, key=len)
    (cut,) = subject.generate([contexts[made.index(longest)]], 16, [longest[2:4]], greedy)
    assert longest.startswith(cut)
    assert longest[2:4] in cut
    assert len(cut) < len(longest)
    twice = subject.generate(["the cat", "the cat"], 8, [], {"temperature": 3.0})
    assert twice[0] != twice[1]
    for settings, room, message in (({"num_beams": 2}, 8, "num_beams; expected temperature"), ({}, 9999, "max_gen_to")):
        with pytest.raises(SpecError, match=message):
            subject.generate(contexts, room, [], settings)


def test_a_conversation_ends_before_the_answer_or_inside_it(loaded):
    subject = Subject(loaded)
    said = [{"role": "user", "content": "the cat"}]
    assert subject.chat_text(said) == "<s><user>the cat<end><assistant>"
    begun = [*said, {"role": "assistant", "content": "saw "}]
    assert subject.chat_text(begun, continues=True) == "<s><user>the cat<end><assistant>saw "
    assert subject.encode(subject.chat_text(said)).count(BOS) == 1


def test_a_run_without_special_tokens_needs_a_prefix(loaded):
    run = LoadedModel(loaded.model, loaded.config, CharacterTokenizer(" acehost"), 1, [])
    subject = Subject(run)
    assert subject.max_length == run.config.training.sequence_length
    with pytest.raises(TokenizerError, match="prefix_token_id=10"):
        subject.score_whole(["the cat"])
    assert Subject(run, prefix_token=0).score_whole(["the cat"])[0] < 0
    with pytest.raises(TokenizerError, match="no chat template"):
        subject.chat_text([{"role": "user", "content": "the cat"}])
