import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.data.load_tokenizer import load_tokenizer, tokenizer_of_model_folder
from moezoo.core.data.tokenizers import (
    ByteTokenizer,
    CharacterTokenizer,
    StreamDecoder,
    TokenIds,
    Tokenizer,
    with_first_tokens,
)
from moezoo.core.errors import TokenizerError

WORDS = "the cat sat\non the mat, and the dog 犬 saw the cat é 🙂.\n\nthen the dog ran\n"
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """Folder of a byte-level BPE tokenizer with 300 tokens."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator([WORDS] * 5, trainer)
    inner.enable_truncation(max_length=4)  # a real tokenizer.json can carry this
    folder = tmp_path_factory.mktemp("hub")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END).save_pretrained(str(folder))
    return folder


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}"
    "{% endif %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, hub_folder):
    """The same tokenizer as of a chat model: it adds `<s>` before each text and has a chat template."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    inner = Inner.from_file(str(hub_folder / "tokenizer.json"))
    inner.add_special_tokens(["<s>", "<|end|>"])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    outer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<|end|>")
    outer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("chat")
    outer.save_pretrained(str(folder))
    return folder


def stream(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return [decoder.add([int(index)]) for index in ids] + [decoder.finish()]


class DecodedBytes:
    """A tokenizer of bytes as the decoder sees those of Hugging Face: it knows `decode` only."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), DecodedBytes()])
@pytest.mark.parametrize(
    ("before", "new", "expected"),
    [
        ("it ends \ufffd".encode(), b" here", " here"),
        ("\ufffd".encode(), "\ufffd\ufffd a".encode(), "\ufffd\ufffd a"),
        (b"a", "\ufffd".encode(), "\ufffd"),
        ("犬 ".encode() + b"\xc3", b"\xa9!", "é!"),  # the ids before end inside a character
        (b"", "犬".encode(), "犬"),
    ],
)
def test_stream_after_a_prompt_returns_the_new_text_once(tokenizer, before, new, expected):
    decoder = StreamDecoder(tokenizer, list(before))
    pieces = [decoder.add([index]) for index in new] + [decoder.finish()]
    assert "".join(pieces) == expected


def test_character_ids_follow_code_points():
    tokenizer = CharacterTokenizer("cab🙂é")
    assert tokenizer.characters == "abcé🙂"
    ids = tokenizer.encode("é🙂a")
    assert ids.dtype == np.int32
    assert ids.tolist() == [3, 4, 0]
    assert tokenizer.decode(ids) == "é🙂a"
    assert tokenizer.vocab_size == 5
    assert tokenizer.end_of_text is None


def test_unknown_characters_error_names_them():
    with pytest.raises(TokenizerError) as error:
        CharacterTokenizer("abcé").encode("a§b🙂", where="--prompt")
    message = str(error.value)
    assert "--prompt has characters outside the tokenizer's vocabulary; got '§', '🙂'; expected" in message
    assert "4 characters" in message


def test_many_unknown_characters_error_counts_them():
    with pytest.raises(TokenizerError, match="and 18 more"):
        CharacterTokenizer("é").encode("abcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize("characters", ["", "aa"])
def test_invalid_vocabulary_raises(characters):
    with pytest.raises(TokenizerError, match="each character once"):
        CharacterTokenizer(characters)


@given(st.text())
def test_byte_tokenizer_round_trips_any_text(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_count(ids) == len(text.encode()) == len(ids)
    assert "".join(stream(tokenizer, ids)) == text


@given(st.text(min_size=1))
def test_character_tokenizer_round_trips_any_text_and_counts_bytes(text):
    tokenizer = CharacterTokenizer("".join(set(text)))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text)
    assert tokenizer.byte_count(ids) == len(text.encode())
    assert "".join(stream(tokenizer, ids)) == text


@given(st.lists(st.integers(0, 255)))
def test_streamed_bytes_equal_decode_even_if_they_are_not_utf8(ids):
    tokenizer = ByteTokenizer()
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_buffers_partial_characters():
    assert stream(ByteTokenizer(), "é!".encode()) == ["", "é", "!", ""]
    assert stream(ByteTokenizer(), "é".encode()[:1]) == ["", "\ufffd"]


def test_lone_surrogates_raise():
    with pytest.raises(TokenizerError, match=r"prompt is not Unicode text; got '\\udcff' at character 1"):
        ByteTokenizer().encode("a\udcff")
    with pytest.raises(TokenizerError, match=r"got '\\udcff'"):
        CharacterTokenizer("a").encode("a\udcff")


@pytest.mark.parametrize("ids", [[-1], [0, 256], np.array([300], np.uint16)])
def test_ids_outside_the_vocabulary_raise(ids):
    with pytest.raises(TokenizerError, match="token id outside the tokenizer's vocabulary; got"):
        ByteTokenizer().decode(ids)
    with pytest.raises(TokenizerError, match="expected 0 to 255"):
        ByteTokenizer().byte_count(ids)


def test_ids_that_are_not_integers_raise():
    with pytest.raises(TokenizerError, match="not integers; got float64"):
        ByteTokenizer().decode([1.5])


def test_ids_only_tokenizer_raises_for_text():
    tokenizer = TokenIds(97)
    assert tokenizer.byte_count([1, 2]) is None
    with pytest.raises(TokenizerError, match="prompt is text, but this tokenizer has ids only"):
        tokenizer.encode("hello")
    with pytest.raises(TokenizerError, match="cannot be decoded as text"):
        tokenizer.decode([1])


@pytest.mark.parametrize("to_file", [False, True])
@pytest.mark.parametrize("tokenizer", [CharacterTokenizer('a"\\\n\u2028é🙂'), ByteTokenizer(), TokenIds(97)])
def test_saved_tokenizer_round_trips(tmp_path, tokenizer, to_file):
    tokenizer.save(tmp_path / "tokenizer.json" if to_file else tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.to_dict() == tokenizer.to_dict()
    assert again.content_hash == tokenizer.content_hash
    assert isinstance(again, Tokenizer)
    assert load_tokenizer(tmp_path / "tokenizer.json").vocab_size == tokenizer.vocab_size


def test_content_hash_depends_on_the_vocabulary():
    assert CharacterTokenizer("ab").content_hash != CharacterTokenizer("ac").content_hash
    assert CharacterTokenizer("ab").content_hash == CharacterTokenizer("ba").content_hash


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a file of the tokenizer cannot be read; got .*tokenizer.json"),
        ("[]", r"a file of the tokenizer is not a JSON object; got \[\] \(.*tokenizer.json"),
        ('{"kind": "charakter"}', "did you mean character"),
        ('{"kind": "character"}', "incomplete"),
        ('{"kind": "ids", "vocab_size": 0}', "incomplete"),
        ('{"kind": "character", "characters": "aa"}', "each character once"),
    ],
)
def test_invalid_tokenizer_file_raises(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


def test_missing_tokenizer_raises(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer; got .*expected a run folder"):
        load_tokenizer(tmp_path)


def test_hugging_face_tokenizer_round_trips(hub_folder):
    tokenizer = HuggingFaceTokenizer(str(hub_folder))
    ids = tokenizer.encode(WORDS)
    assert ids.dtype == np.int32
    assert len(ids) > 4  # truncation of its file is disabled
    assert tokenizer.decode(ids) == WORDS
    assert tokenizer.byte_count(ids) == len(WORDS.encode())
    assert tokenizer.encode(END).tolist() == [tokenizer.end_of_text]
    assert tokenizer.byte_count([tokenizer.end_of_text]) == 0


def test_first_tokens_are_those_of_the_post_processor_and_are_added_once(hub_folder, chat_folder):
    tokenizer = HuggingFaceTokenizer(str(chat_folder))
    text = tokenizer.encode("the cat")
    assert tokenizer.decode(text) == "the cat"
    begun = with_first_tokens(text, tokenizer)
    assert tokenizer.decode(begun) == "<s>the cat"
    assert with_first_tokens(begun, tokenizer).tolist() == begun.tolist()
    for none in (HuggingFaceTokenizer(str(hub_folder)), ByteTokenizer(), CharacterTokenizer("a"), TokenIds(9)):
        assert none.first_tokens == ()
    assert with_first_tokens(ByteTokenizer().encode("a"), ByteTokenizer()).tolist() == [97]


def bos_folder(tmp_path, hub_folder, **config):
    """Return a copy of the tokenizer, with a BOS token that its post-processor does not add (as in DeepSeek-V3)."""
    rules = json.loads((hub_folder / "tokenizer.json").read_text())
    rules["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, **config})
    )
    return tmp_path


def test_add_bos_token_of_the_config_counts_where_the_post_processor_adds_none(tmp_path, hub_folder):
    asked = bos_folder(tmp_path / "asked", hub_folder, add_bos_token=True, chat_template=TEMPLATE)
    tokenizer = HuggingFaceTokenizer(str(asked))
    bos = tokenizer.end_of_text
    assert tokenizer.first_tokens == (bos,)
    assert with_first_tokens(tokenizer.encode("the cat"), tokenizer).tolist().count(bos) == 1
    assert tokenizer.encode_chat([{"role": "user", "content": "the cat"}]).tolist().count(bos) == 1
    tokenizer.save(tmp_path / "run")  # transformers does not save the option
    assert load_tokenizer(tmp_path / "run").first_tokens == (bos,)
    for config in ({}, {"add_bos_token": False}):
        without = HuggingFaceTokenizer(str(bos_folder(tmp_path / "without", hub_folder, **config)))
        assert without.first_tokens == ()
        assert without.content_hash != tokenizer.content_hash


def test_first_tokens_can_be_several(chat_folder, tmp_path):
    rules = json.loads((chat_folder / "tokenizer.json").read_text())
    end = next(token for token in rules["added_tokens"] if token["content"] == "<|end|>")["id"]
    processor = rules["post_processor"]
    processor["single"] = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("<|end|>", "<s>")] + [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<|end|>", "type_id": 0}},
    ]
    processor["special_tokens"]["<|end|>"] = {"id": "<|end|>", "ids": [end], "tokens": ["<|end|>"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    (tmp_path / "tokenizer_config.json").write_bytes((chat_folder / "tokenizer_config.json").read_bytes())
    tokenizer = HuggingFaceTokenizer(str(tmp_path))
    assert tokenizer.decode(with_first_tokens(tokenizer.encode("the cat"), tokenizer)) == "<|end|><s>the cat"


@pytest.mark.parametrize("kind", ["WordLevel", "BPE"])  # one refuses what it does not know, the other drops it
def test_first_tokens_of_a_vocabulary_without_latin_letters(tmp_path, kind):
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, "</s>": 1, "犬": 2}
    inner = Inner(models.WordLevel(vocab) if kind == "WordLevel" else models.BPE(vocab, []))
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(str(tmp_path))
    assert HuggingFaceTokenizer(str(tmp_path)).first_tokens == (0,)


def test_content_hash_depends_on_the_end_of_text_that_tokenizer_json_lacks(chat_folder, tmp_path):
    config = json.loads((chat_folder / "tokenizer_config.json").read_text()) | {"eos_token": END}
    (tmp_path / "tokenizer.json").write_bytes((chat_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert HuggingFaceTokenizer(str(tmp_path)).content_hash != HuggingFaceTokenizer(str(chat_folder)).content_hash


def test_chat_uses_the_template_and_has_one_bos_token(chat_folder, tmp_path):
    tokenizer = HuggingFaceTokenizer(str(chat_folder))
    ids = tokenizer.encode_chat([{"role": "user", "content": "the cat"}])
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == "<s><|user|>the cat<|end|><|assistant|>"
    assert ids.tolist().count(tokenizer.encode("<s>")[0]) == 1
    tokenizer.save(tmp_path)  # also for a run fine-tuned from it
    assert load_tokenizer(tmp_path).encode_chat([{"role": "user", "content": "the cat"}]).tolist() == ids.tolist()


CALL = {"id": "1", "type": "function", "function": {"name": "find", "arguments": {"word": "cat"}}}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        [{"role": "assistant", "tool_calls": [CALL]}, {"role": "user", "content": "the cat"}],
        [{"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "cat"}]}],
    ],
)
def test_content_may_be_null_a_list_or_absent_as_in_transformers(chat_folder, messages):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(str(chat_folder))
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert HuggingFaceTokenizer(str(chat_folder)).encode_chat(messages).tolist() == expected


def test_what_is_no_conversation_is_refused(chat_folder):
    tokenizer = HuggingFaceTokenizer(str(chat_folder))
    circle = {"role": "user"}
    circle["content"] = [circle]
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for messages in (None, "the cat", ["the cat"], [None], [], {"role": "user", "content": "the cat"}):
        with pytest.raises(
            TokenizerError, match=r"a conversation is no list of messages; got .*; expected one or more"
        ):
            tokenizer.encode_chat(messages)
    for message in (circle, {"role": "user", "content": deep}, {"role": "user", "content": {"the", "cat"}}):
        with pytest.raises(TokenizerError, match="the chat template cannot be applied; got"):
            tokenizer.encode_chat([message])


def test_chat_without_a_template_or_with_a_failing_template_raises(hub_folder, chat_folder):
    with pytest.raises(
        TokenizerError, match=r"the tokenizer has no chat template; got .*; expected chat_template.jinja"
    ):
        HuggingFaceTokenizer(str(hub_folder)).encode_chat([{"role": "user", "content": "the cat"}])
    with pytest.raises(TokenizerError, match=r"the chat template cannot be applied; got TemplateError: no tools"):
        HuggingFaceTokenizer(str(chat_folder)).encode_chat([{"role": "tool", "content": "4"}])
    with pytest.raises(TokenizerError, match="not Unicode text"):
        HuggingFaceTokenizer(str(chat_folder)).encode_chat([{"role": "user", "content": "\udcff"}])


def test_ids_of_a_padded_vocabulary_decode_to_nothing(hub_folder):
    tokenizer = HuggingFaceTokenizer(str(hub_folder))
    ids = tokenizer.encode("the cat").tolist()
    padded = [ids[0], tokenizer.vocab_size, *ids[1:], 100_000]
    assert tokenizer.decode(padded) == "the cat"
    assert tokenizer.byte_count(padded) == 7
    assert "".join(stream(tokenizer, padded)) == "the cat"
    with pytest.raises(TokenizerError, match="got -1"):
        tokenizer.decode([-1])


def test_model_folder_without_tokenizer_has_ids_only(tmp_path, hub_folder):
    assert tokenizer_of_model_folder(tmp_path, 97).to_dict() == {"kind": "ids", "vocab_size": 97}
    assert tokenizer_of_model_folder(hub_folder, 512).kind == "huggingface"


def test_code_in_a_tokenizer_folder_is_never_executed(hub_folder, tmp_path, capfd):
    (tmp_path / "tokenizer.json").write_bytes((hub_folder / "tokenizer.json").read_bytes())
    (tmp_path / "theirs.py").write_text("raise SystemExit('ran')")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}})
    )
    with contextlib.suppress(TokenizerError):
        assert HuggingFaceTokenizer(str(tmp_path)).decode(HuggingFaceTokenizer(str(tmp_path)).encode("cat")) == "cat"
    assert "[y/N]" not in capfd.readouterr().out


def test_hugging_face_stream_joins_characters_split_over_tokens(hub_folder):
    tokenizer = HuggingFaceTokenizer(str(hub_folder))
    text = "sat on the ✓✓ dog ĉ 🙂🙃 mat"
    ids = tokenizer.encode(text)
    assert any("\ufffd" in tokenizer.decode([index]) for index in ids)  # precondition of this test
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream(tokenizer, tokenizer.encode("🙂")[:2])[-1] == "\ufffd"


def test_hugging_face_tokenizer_is_copied_into_the_run(hub_folder, tmp_path):
    tokenizer = HuggingFaceTokenizer(str(hub_folder))
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["kind"] == "huggingface"
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "tokenizer", hub_folder):
        again = load_tokenizer(path)
        assert again.content_hash == tokenizer.content_hash
        assert again.encode(WORDS).tolist() == tokenizer.encode(WORDS).tolist()
        assert again.end_of_text == tokenizer.end_of_text


def test_resumed_run_does_not_rewrite_its_tokenizer(hub_folder, tmp_path):
    HuggingFaceTokenizer(str(hub_folder)).save(tmp_path)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.rglob("*.json")}
    load_tokenizer(tmp_path).save(tmp_path)
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in tmp_path.rglob("*.json")} == before
