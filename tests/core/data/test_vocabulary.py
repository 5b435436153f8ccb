"""The vocabulary of a config that does not set it: the real one if the tokenizer or the data is on this machine."""

import json
from pathlib import Path

import numpy as np
import pytest

from moezoo.core.config.data import TokenIdsSpec
from moezoo.core.config.run_config import load_config, parse_config
from moezoo.core.config.vocabulary import ASSUMED_CHARACTERS, spec_with_vocab_size, with_vocab_size
from moezoo.core.data import prepare
from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.data.vocabulary import spec_with_real_vocab_size
from moezoo.core.errors import SpecError, TokenizerError
from moezoo.core.runs.open import describe_model
from tests.huggingface.tiny_tokenizer import write_tokenizer
from tests.support.fake_network import FakeNetwork
from tests.support.fixtures import write_checkpoint

MODEL = """
model:
  embed_dim: 8
  layers: [{attention: {num_heads: 2, num_kv_heads: 2, head_dim: 4}, feed_forward: {hidden_dim: 8}}]
training: {steps: 1, batch_size: 2, sequence_length: 8}
optimizer: {learning_rate: 0.1}
"""


def size_of(source: dict, tokenizer: dict) -> tuple[int, str | None]:
    data = json.dumps({"sources": [source], "tokenizer": tokenizer})
    spec, assumed = spec_with_real_vocab_size(parse_config(f"{MODEL}data: {data}\n"))
    return spec.vocab, assumed


def test_characters_of_local_text_are_counted_unless_it_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("abcdé\n" * 9)
    text, character = {"kind": "text", "path": str(tmp_path / "a.txt")}, {"kind": "character"}
    assert size_of(text, character) == (6, None)
    monkeypatch.setattr(prepare, "_MOST_TEXT_BYTES", 60)
    size, assumed = size_of(text, character)
    assert size == 64
    assert assumed is not None
    assert assumed.startswith("a vocabulary of 64 tokens; the real size of a character tokenizer depends on the data")


def test_without_the_data_a_size_is_assumed(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(50, np.uint16))
    for source in (
        {"kind": "text", "path": str(tmp_path / "none.txt")},
        {"kind": "tokens", "path": str(tmp_path / "a.npy")},
        {"kind": "batches", "path": str(tmp_path / "none.npy")},
    ):
        size, assumed = size_of(source, {"kind": "character"})
        assert (size, bool(assumed)) == (64, True)


def test_a_tokenizer_in_a_folder_or_in_the_hubs_cache_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tokenizer(tmp_path / "t")
    hub = FakeNetwork({file.name: file.read_bytes() for file in folder.iterdir()}, set())
    hub.install(monkeypatch, tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    text = {"kind": "text", "path": "none.txt"}
    size = HuggingFaceTokenizer(str(folder)).vocab_size
    assert size < 64
    for path in ("t", str(folder), "t/tokenizer.json"):
        assert size_of(text, {"kind": "huggingface", "path": path}) == (size, None)
    for path in ("org/name", "nowhere"):
        found, assumed = size_of(text, {"kind": "huggingface", "path": path})
        note = f"a vocabulary of 32,768 tokens; {path} is not a tokenizer on this machine"
        assert (found, str(assumed).startswith(note)) == (32_768, True)
    assert hub.tries == 0  # describing a config downloads nothing
    HuggingFaceTokenizer("org/name")
    hub.tries = 0
    assert size_of(text, {"kind": "huggingface", "path": "org/name"}) == (size, None)
    assert hub.tries == 0


def test_a_damaged_tokenizer_is_an_error_and_not_an_assumption(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json|cannot be loaded"):
        size_of({"kind": "text", "path": "none.txt"}, {"kind": "huggingface", "path": str(tmp_path)})


def test_unused_ids_of_the_head_come_after_the_tokens_of_the_tokenizer() -> None:
    """Tokens below V - unused have logits: a tokenizer's real tokens may not be among the others."""
    padded = load_config("configs/tiny/top_k.yaml", ["model.head={kind: untied, unused: 3}", "model.vocab_size=null"])
    model = with_vocab_size(padded, 31).model
    assert (model.vocab, model.num_logits) == (34, 31)
    assert spec_with_vocab_size(padded)[0].num_logits == ASSUMED_CHARACTERS
    given = load_config("configs/tiny/top_k.yaml", ["model.head={kind: untied, unused: 3}", "model.vocab_size=33"])
    with pytest.raises(SpecError, match=r"is 33 with 3 unused ids \(model.head.unused\).* 31 tokens .*Use at least 34"):
        with_vocab_size(given, 31)


def test_a_checkpoint_without_a_tokenizer_takes_the_ids_that_have_logits(tmp_path: Path) -> None:
    """So that a fine-tune of a model with unused ids trains on no target without a logit."""
    spec, tokenizer = describe_model(write_checkpoint("inkling_text", tmp_path / "inkling"))
    assert spec.head.unused > 0
    assert tokenizer == TokenIdsSpec(vocab_size=spec.num_logits)
