import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = ["▁", "▁the", "▁cat", "s", "é", "▁a", "▁b", "the", "cat", "a", "b"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXT = "the cats é 犬 🙂 a b"


def saved(folder, inner, **options):
    """Save a tokenizer with its special tokens, and load it again."""
    inner.add_special_tokens([token for token in SPECIAL if inner.token_to_id(token) is not None])
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", **options).save_pretrained(
        folder
    )
    return HuggingFaceTokenizer(str(folder))


def llama(folder):
    """Return a tokenizer like Llama 2's: `▁` before a text and for spaces, bytes for unknown characters."""
    inner = Tokenizer(models.Unigram([(token, -1.0) for token in [*SPECIAL, *BYTES, *WORDS]], 0, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return saved(folder, inner)


def metaspace(folder):
    inner = Tokenizer(models.Unigram([(token, -1.0) for token in [*SPECIAL, *WORDS, *"犬🙂"]], 0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    return saved(folder, inner)


def byte_level(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: k for k, token in enumerate([*SPECIAL, *alphabet, "th", "the"])}
    inner = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return saved(folder, inner)


def word_piece(folder):
    words = ["the", "cat", "##s", "é", "犬", "🙂", "a", "b"]
    inner = Tokenizer(models.WordPiece({token: k for k, token in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(cleanup=False)
    return saved(folder, inner)


KINDS = [llama, metaspace, byte_level, word_piece]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_a_whole_text_are_those_of_its_utf8(kind, tmp_path):
    tokenizer = kind(tmp_path)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.byte_count(ids) == len(TEXT.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_windows_have_the_bytes_of_the_text_between_them_wherever_they_are_cut(kind, tmp_path):
    tokenizer = kind(tmp_path)
    ids = tokenizer.encode(TEXT)
    begins = ids < 0
    begins[0] = True
    for cut in range(len(ids) + 1):
        parts = (tokenizer.byte_count(ids[part], begins[part]) for part in (slice(cut), slice(cut, None)))
        assert sum(parts) == len(TEXT.encode())


def test_a_piece_of_a_character_is_one_byte(tmp_path):
    tokenizer = llama(tmp_path)
    ids = tokenizer.encode("犬")
    assert len(ids) == 4  # the space before the text, and three bytes
    assert [tokenizer.byte_count([index]) for index in ids] == [0, 1, 1, 1]
    assert tokenizer.decode(ids[1:2]) == "\ufffd"  # precondition of this test


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_no_bytes_and_other_added_tokens_those_of_their_text(kind, tmp_path):
    kind(tmp_path)
    inner = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.add_tokens(["é犬 é"])
    tokenizer = saved(tmp_path / "more", inner)
    assert tokenizer.byte_count([1, 2]) == 0
    assert tokenizer.byte_count([inner.token_to_id("é犬 é")]) == len("é犬 é".encode())
    assert tokenizer.byte_count([tokenizer.vocab_size, 10**6]) == 0
