"""Encoding of long texts in pieces: the ids of the whole text, for every kind of subword tokenizer."""

import numpy as np
import pytest

from moezoo.core.data import encode_text, source_files
from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer

MIXED = "The cat sat (on);\n// the mat. 犬が走る。\n\n  if x == 12345:\n\treturn 31415926\n🙂 naïve café, " * 20


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory):
    """Kinds of tokenizers that put a mark before a text or take several lines as one word."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def trained(kind):
        inner = Tokenizer(models.BPE(byte_fallback=kind != "o200k", unk_token="<unk>", fuse_unk=True))
        if kind == "o200k":  # gpt-oss: a slash after a newline belongs to the word before
            pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+(?!\S)|\s+")
            inner.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(pattern, "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
            inner.decoder = decoders.ByteLevel()
        else:
            inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=words, show_progress=False)
        inner.train_from_iterator([MIXED], trainer)
        if kind == "prepend":  # Llama 2: no pre-tokenizer
            inner = Tokenizer(inner.model)
            inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        folder = tmp_path_factory.mktemp(kind)
        PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(str(folder))
        return HuggingFaceTokenizer(str(folder))

    return {kind: trained(kind) for kind in ("prepend", "metaspace", "o200k")}


@pytest.mark.parametrize("kind", ["prepend", "metaspace", "o200k"])
@pytest.mark.parametrize("text", [MIXED, "".join(MIXED.split()), "犬が走る。猫は寝る" * 200])
def test_ids_of_pieces_are_the_ids_of_the_whole_text(llama_like, monkeypatch, kind, text):
    """Cut anywhere, "the mat" after "on " would get another `▁`, and ");" newline "//" another token."""
    tokenizer = llama_like[kind]
    whole = tokenizer.encode(text).tolist()
    for chunk in (7, 100):
        monkeypatch.setattr(source_files, "CHUNK_BYTES", chunk)
        pieces = list(encode_text.encode_pieces([text[:3], text[3:]], tokenizer, "x"))
        assert len(pieces) > 3
        assert np.concatenate(pieces).tolist() == whole


def test_text_without_a_good_place_is_cut_at_a_limit(llama_like, monkeypatch):
    monkeypatch.setattr(source_files, "CHUNK_BYTES", 8)
    monkeypatch.setattr(encode_text, "_is_good", lambda *_: False)
    digits = "12345" * 2000
    pieces = list(encode_text.encode_pieces([digits], llama_like["o200k"], "x"))
    assert len(pieces) == 1 + len(digits) // (16 * (8 + 256))
    assert llama_like["o200k"].decode(np.concatenate(pieces)) == digits


@pytest.mark.parametrize(
    ("piece", "boundary"),
    [("a b\nc d", 4), ("a b\n\nc d", 6), ("a  b\n", 0), ("ab", 0), ("", 0), (" a", 0), ("a\r\nb c", 4)],
)
def test_word_boundaries_are_single_newlines_and_spaces(piece, boundary):
    found = [next(encode_text.word_boundaries(piece, mark, len(piece)), 0) for mark in ("\n", " ")]
    assert (found[0] or found[1]) == boundary
