"""Generation settings of a checkpoint are applied, and unsupported ones are refused by name."""

import dataclasses
import json

import numpy as np
import pytest

from moezoo.core.data.tokenizers import ByteTokenizer
from moezoo.core.errors import DataError, SpecError
from moezoo.core.generation.config import GenerationConfig, read_generation_config
from moezoo.core.generation.loop import Continuation, generate
from moezoo.core.reference.sampling import SamplingOptions, penalized
from tests.support.host_generation import HostGeneration

V = 7


def read(folder, model_config=None, **fields):
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return read_generation_config(folder, model_config or {})


class Countdown:
    """A model whose next token is the previous token minus 1."""

    class spec:
        vocab, max_length = V, None

    def start_generation(self, prompts, new_tokens, options):
        return HostGeneration(lambda tokens: self._logits(tokens[-1:])[0], prompts, options)

    def _logits(self, last_B):
        return np.eye(V, dtype=np.float32)[(last_B - 1) % V]


def continued(prompts, **options):
    tokens = np.array(prompts, np.int32)[:, None]
    return generate(Countdown(), tokens, options=SamplingOptions(temperature=0), **options).tolist()


def test_each_sequence_stops_at_any_end_token():
    assert continued([6], max_new_tokens=9, end_tokens=(2, 4)) == [[5, 4]]
    assert continued([6, 4], max_new_tokens=9, end_tokens=(2, 4)) == [[5, 4], [3, 2]]
    assert continued([6, 3], max_new_tokens=9, end_tokens=(2, 4)) == [[5, 4], [2, 2]]
    assert continued([6, 3], max_new_tokens=9, end_tokens=(2, 4), padding=0) == [[5, 4], [2, 0]]
    assert continued([6, 3], max_new_tokens=9, end_tokens=(2, 4), padding=V) == [
        [5, 4],
        [2, 2],
    ]  # outside the vocabulary
    assert continued([6], max_new_tokens=3) == [[5, 4, 3]]


def test_repeated_token_is_less_likely_for_either_sign_of_its_logit():
    logits_BV = np.array([[2.0, -2.0, 1.0, -1.0]], np.float32)
    found_BV = penalized(logits_BV, np.array([[0, 1, 0]]), 1.25)
    np.testing.assert_allclose(found_BV, [[1.6, -2.5, 1.0, -1.0]], rtol=1e-6)
    assert logits_BV[0, 0] == 2


def test_prompt_and_new_tokens_are_penalized():
    class Constant(Countdown):
        def _logits(self, last_B):
            return np.array([[3.0, 2.9, 2, 1, 0, 0, 0]], np.float32)

    def text(penalty):
        options = SamplingOptions(temperature=0, repetition_penalty=penalty)
        return generate(Constant(), np.array([[0]], np.int32), max_new_tokens=4, options=options).tolist()

    assert text(1.0) == [[0, 0, 0, 0]]
    assert text(1.4) == [[1, 0, 0, 0]]  # 2.14, 2.9; then 2.14, 2.07, 2
    assert text(2.0) == [[1, 2, 0, 0]]  # 1.5, 2.9, 2; then 1.5, 1.45, 2; then 1.5, 1.45, 1, 1


def test_greedy_unless_the_file_sets_do_sample(tmp_path):
    assert read_generation_config(tmp_path, {}).options() == SamplingOptions(temperature=0.0)
    assert read(tmp_path, temperature=0.6, top_p=0.9).options().temperature == 0
    sampled = read(tmp_path, do_sample=True, temperature=0.6, top_k=20, top_p=0.9, min_p=0.1, repetition_penalty=1.05)
    expected = SamplingOptions(temperature=0.6, top_k=20, top_p=0.9, min_p=0.1, repetition_penalty=1.05, seed=3)
    assert sampled.options(seed=3) == expected


@pytest.mark.parametrize("off", [{"top_k": 0}, {"top_k": -1}, {"top_k": -1.0}, {"top_p": 0}, {"top_p": 0.0}])
def test_filters_are_off_in_the_words_of_other_programs(tmp_path, off):
    assert read(tmp_path, do_sample=True, **off).options() == SamplingOptions(temperature=1.0)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("do_sample", "yes", "true or false"),
        ("temperature", float("nan"), "a finite number >= 0"),
        ("temperature", -1, "a finite number >= 0"),
        ("temperature", [1], "a finite number >= 0"),
        ("top_p", 2, r"a number in \(0, 1\]"),
        ("top_p", False, r"a number in \(0, 1\]"),
        ("top_k", 1.5, "an integer >= 1"),
        ("top_k", -5, "an integer >= 1"),
        ("top_k", "all", "an integer >= 1"),
        ("min_p", 1e300, r"a number in \[0, 1\]"),
    ],
)
def test_an_invalid_setting_is_refused_by_name_when_it_is_used(tmp_path, name, value, rule):
    config = read(tmp_path, **{"do_sample": True, name: value})
    with pytest.raises(SpecError, match=rf"got {name} .*\(expected {rule}.*generation_config\.json"):
        config.options()
    given = {"do_sample": "temperature"}.get(name, name)
    assert config.options(**{given: {"top_k": 3}.get(name, 0.5)})
    assert config.options(temperature=0) == SamplingOptions(temperature=0)


def test_an_invalid_penalty_length_or_end_is_refused_when_it_is_used(tmp_path):
    config = read(tmp_path, max_new_tokens=-1, max_length="long", repetition_penalty=0, temperature="hot")
    assert config.new_tokens(3, 5, 8) == 3
    with pytest.raises(SpecError, match=r"max_new_tokens -1 \(expected an integer >= 0\)"):
        config.new_tokens(None, 5, 8)
    assert read(tmp_path, max_new_tokens=4.0, max_length="long").new_tokens(None, 5, 8) == 4
    with pytest.raises(SpecError, match=r"got repetition_penalty 0 .*> 0"):
        config.options()
    assert config.options(repetition_penalty=1.0).temperature == 0  # greedy: the temperature is not used
    with pytest.raises(SpecError, match=r"eos_token_id '</s>' .expected a token id"):
        read(tmp_path, eos_token_id="</s>").options()
    assert read(tmp_path, eos_token_id=[5.0]).end_tokens == (5,)


def test_arguments_override_the_file(tmp_path):
    config = read(tmp_path, do_sample=True, temperature=0.6, top_p=0.9, max_new_tokens=40)
    assert config.options(temperature=0.0).temperature == 0
    assert config.options(top_p=1.0) == SamplingOptions(temperature=0.6, top_p=1.0)
    assert [config.new_tokens(requested, 5, 256) for requested in (3, None)] == [3, 40]
    assert GenerationConfig().options(temperature=0.8).temperature == 0.8


def test_max_length_includes_the_prompt_and_only_lowers(tmp_path):
    config = read(tmp_path, max_length=20)
    assert [config.new_tokens(None, prompt, 8) for prompt in (5, 15)] == [8, 5]
    with pytest.raises(DataError, match=r"the prompt has 20 tokens, but max_length, which includes the prompt, is 20 "):
        config.new_tokens(None, 20, 8)
    assert config.new_tokens(64, 5, 8) == 64


def test_end_tokens_come_from_file_then_model_then_tokenizer(tmp_path):
    assert read(tmp_path, {"eos_token_id": 9}, eos_token_id=[5, 6, 5]).end_tokens == (5, 6)
    assert read(tmp_path, {"eos_token_id": 9}).end_tokens == (9,)
    assert read(tmp_path, {"text_config": {"eos_token_id": [8]}}).end_tokens == (8,)
    assert read(tmp_path, {"thinker_config": {"text_config": {"eos_token_id": [8]}}}).end_tokens == (8,)
    assert read(tmp_path).ending_with(7).end_tokens == (7,)
    assert read(tmp_path, eos_token_id=4).ending_with(7).end_tokens == (4,)
    assert read(tmp_path, {"pad_token_id": -1}).padding is None
    assert read(tmp_path, {"eos_token_id": 9}, pad_token_id=0).padding == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 4},
        {"no_repeat_ngram_size": 3},
        {"suppress_tokens": [1]},
        {"stop_strings": ["\n"]},
        {"do_sample": True, "typical_p": 0.9},
        {"do_sample": True, "presence_penalty": 1.5},
    ],
)
def test_unsupported_setting_is_refused_by_name(tmp_path, fields):
    config = read(tmp_path, **fields)
    name, value = list(fields.items())[-1]
    with pytest.raises(SpecError, match=rf"got {name} .* in .*generation_config.json") as error:
        config.options()
    assert repr(value) in str(error.value)
    assert dataclasses.replace(config, unsupported=(), unsupported_in_sampling=()).options()


def test_settings_without_effect_are_accepted_and_unknown_ones_listed(tmp_path):
    without_effect = {
        "_from_model_config": True, "bos_token_id": 1, "num_beams": 1, "typical_p": 1.0, "repetition_penalty": 1.0,
        "bad_words_ids": [], "stop_strings": None, "use_cache": True, "epsilon_cutoff": 0,
    }  # fmt: skip
    config = read(tmp_path, **without_effect, chat_format="chatml")
    assert config.unknown == ("chat_format",)
    assert config.options().temperature == 0
    assert read(tmp_path, typical_p=0.9).options(temperature=0)  # greedy text does not depend on it
    with pytest.raises(SpecError, match=r"typical_p 0.9"):
        read(tmp_path, typical_p=0.9).options(temperature=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[]", "is not a mapping; got list")],
)
def test_invalid_file_is_refused(tmp_path, text, message):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(SpecError, match=message):
        read_generation_config(tmp_path, {})


def test_continuation_omits_the_end_token():
    continuation = Continuation(ByteTokenizer(), [97, 98], (ord("!"),))
    assert "".join([continuation.add(byte) for byte in b"cd!e"]) + continuation.finish() == "cd"
    assert [Continuation(None, [1], (9,)).add(token) for token in (3, 9)] == [",3", ""]
