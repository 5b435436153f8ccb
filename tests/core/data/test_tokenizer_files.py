"""A tokenizer.json is encoded by its own rules, in every family, and what transformers would change is named."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.data.load_tokenizer import load_tokenizer, tokenizer_notes
from moezoo.core.errors import TokenizerError

TEXT = "in 2023 the cat sat,\n\n  and 19 dogs ran 123456 é 犬 <|end|> x <|user|>y"
DIGITS = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"


def byte_level(digits: str | None = DIGITS) -> Tokenizer:
    """A byte-level BPE tokenizer whose numbers are cut as Llama 3, DeepSeek and GPT-4 do, not as GPT-2 or Qwen do."""
    inner = Tokenizer(models.BPE())
    split = [] if digits is None else [pre_tokenizers.Split(Regex(digits), "isolated")]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=digits is None)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(["2023 202 123 456 the cat sat and the dogs ran in 2023"] * 9, trainer)
    return inner


def sentencepiece_like() -> Tokenizer:
    """A BPE tokenizer as converted from sentencepiece: spaces are normalized to `▁`, and unknown bytes have tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("▁", "▁"), ("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return inner


def written(folder: Path, inner: Tokenizer, model_type: str | None = None, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


FAMILIES = [
    (byte_level(), {"tokenizer_class": "GPT2Tokenizer"}, None, "'2023'"),
    (byte_level(), {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|end|>"}, "qwen3_moe", "'2023'"),
    (byte_level(), {}, "dbrx", "'2023'"),
    (byte_level(), {"tokenizer_class": "PreTrainedTokenizerFast"}, "mixtral", None),
    (byte_level(), {"tokenizer_class": "LlamaTokenizerFast"}, "deepseek_v3", None),
    (byte_level(None), {"tokenizer_class": "GPT2Tokenizer"}, None, None),
    (byte_level(), {}, None, None),
    (sentencepiece_like(), {"tokenizer_class": "LlamaTokenizer"}, "mixtral", None),
    (sentencepiece_like(), {"tokenizer_class": "LlamaTokenizer"}, None, "'   lead'"),
]


@pytest.mark.parametrize(("inner", "config", "model_type", "named"), FAMILIES)
def test_text_is_encoded_and_decoded_by_the_rules_of_the_file(tmp_path, inner, config, model_type, named):
    folder = written(tmp_path / "model", inner, model_type, **config)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = HuggingFaceTokenizer(str(folder))
    ours.save(tmp_path / "run")
    for tokenizer in (ours, load_tokenizer(tmp_path / "run")):
        for text in (TEXT, "  the", "2023"):
            ids = file.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text).tolist() == ids
            assert tokenizer.decode(ids) == file.decode(ids, skip_special_tokens=False)
    notes = tokenizer_notes(ours)
    assert len(notes) == (named is not None)
    if named is not None:
        assert notes[0].startswith("text is encoded as the tokenizer's files say; transformers ")
        assert named in notes[0]
        assert "\n" not in notes[0]


def test_the_note_agrees_with_what_transformers_encodes(tmp_path):
    from transformers import AutoTokenizer

    for place, (inner, config, model_type, named) in enumerate(FAMILIES):
        folder = written(tmp_path / str(place), inner, model_type, **config)
        theirs = AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
        texts = (TEXT, "  the", "2023")
        ids, other = ([each.encode(text, add_special_tokens=False).ids for text in texts] for each in (inner, theirs))
        assert (ids != other) == (named is not None), config


def test_added_tokens_keep_the_matching_of_the_file_and_missing_ones_are_added(tmp_path):
    inner = byte_level()
    inner.add_tokens([AddedToken("<|user|>", normalized=False)])
    size = inner.get_vocab_size()
    entries = {
        str(size - 1): {"content": "<|user|>", "lstrip": True, "rstrip": True, "normalized": False, "special": True},
        str(size): {"content": "<|tool|>", "special": True, "normalized": False},
    }
    folder = written(tmp_path / "model", inner, added_tokens_decoder=entries, eos_token="<|end|>")
    tokenizer = HuggingFaceTokenizer(str(folder))
    assert tokenizer.encode(TEXT).tolist() == inner.encode(TEXT).ids
    assert tokenizer.encode("<|tool|>").tolist() == [size]
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.decode([size]) == "<|tool|>"
    assert "of its token '<|user|>' is True, and not False" in tokenizer_notes(tokenizer)[0]
    entries[str(size + 3)] = entries.pop(str(size))
    with pytest.raises(TokenizerError, match=rf"has '<\|tool\|>' as id {size + 3}, but tokenizer.json continues with"):
        HuggingFaceTokenizer(str(written(folder, inner, added_tokens_decoder=entries)))


def test_settings_that_would_change_the_rules_have_no_effect(tmp_path):
    inner = byte_level()
    folder = written(tmp_path / "model", inner, split_special_tokens=True, fix_mistral_regex=True, eos_token="<|end|>")
    assert HuggingFaceTokenizer(str(folder)).encode(TEXT).tolist() == inner.encode(TEXT).ids


def test_a_run_keeps_the_tokenizer_files_as_they_were(tmp_path):
    folder = written(tmp_path / "model", byte_level(), add_bos_token=True, eos_token="<|end|>")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "model.safetensors").write_bytes(b"weights are no part of a tokenizer")
    HuggingFaceTokenizer(str(folder)).save(tmp_path / "run")
    kept = tmp_path / "run" / "tokenizer"
    names = {str(file.relative_to(kept)) for file in kept.rglob("*") if file.is_file()}
    assert names == {
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja")
    }
    assert all((kept / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_a_folder_without_tokenizer_json_is_converted_and_stays_the_same_in_a_run(tmp_path):
    saved = json.loads(byte_level(None).to_str())["model"]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(saved["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in saved["merges"]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = HuggingFaceTokenizer(str(folder))
    ids = tokenizer.encode("in 2023 the cat sat").tolist()
    assert tokenizer.decode(ids) == "in 2023 the cat sat"
    assert not tokenizer_notes(tokenizer)
    tokenizer.save(tmp_path / "run")
    assert load_tokenizer(tmp_path / "run").encode("in 2023 the cat sat").tolist() == ids


def test_a_first_token_that_transformers_does_not_add_is_named(tmp_path):
    inner = byte_level()
    folder = written(tmp_path / "model", inner, add_bos_token=True, bos_token="<|end|>")
    tokenizer = HuggingFaceTokenizer(str(folder))
    assert tokenizer.first_tokens == (inner.token_to_id("<|end|>"),)
    assert tokenizer_notes(tokenizer)[0].endswith("it adds nothing to a text, and not '<|end|>'")
    assert not tokenizer_notes(HuggingFaceTokenizer(str(written(folder, inner, bos_token="<|end|>"))))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", b"\xff{}", "a file of the tokenizer cannot be read; got .*tokenizer_config.json"),
        ("tokenizer_config.json", b"[1]", r"not a JSON object; got \[1\] \(.*tokenizer_config.json\)"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": 1e308}',
            r"has no tokens by id; got 1e\+308 \(.*config.json",
        ),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"7": ["x"]}}', "has no tokens by id"),
        ("special_tokens_map.json", b'{"eos_token": ', "cannot be read; got .*special_tokens_map.json"),
        ("added_tokens.json", b"3", r"not a JSON object; got 3 \(.*added_tokens.json\)"),
    ],
)
def test_a_damaged_file_beside_the_tokenizer_is_named(tmp_path, name, content, message):
    folder = written(tmp_path, byte_level(), eos_token="<|end|>")
    (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        HuggingFaceTokenizer(str(folder))
    assert "\n" not in str(caught.value)


def test_no_added_tokens_may_be_said_with_null(tmp_path):
    folder = written(tmp_path, byte_level(), added_tokens_decoder=None, eos_token="<|end|>")
    assert HuggingFaceTokenizer(str(folder)).end_of_text == byte_level().token_to_id("<|end|>")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}},
            "cannot load .*{folder}",
        ),
        ({"tokenizer_class": "ByT5Tokenizer"}, r"\(ByT5Tokenizer\) does not read tokenizer.json"),
    ],
)
def test_what_transformers_cannot_or_does_not_read_is_encoded_here(tmp_path, config, said):
    tokenizer = HuggingFaceTokenizer(str(written(tmp_path, byte_level(), **config)))
    assert tokenizer.encode(TEXT).tolist() == byte_level().encode(TEXT).ids
    assert re.search(said.format(folder=tmp_path), tokenizer_notes(tokenizer)[0])
