"""A tokenizer.json that takes exponential time or memory is one error, and the rules of real ones pass."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from moezoo.core.data import tokenizer_rules
from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.data.tokenizer_rules import check_rules
from moezoo.core.errors import TokenizerError

GROWING = normalizers.Replace("z", "zz" * 500)
HOSTILE = {
    "nested quantifiers": (
        {"pre_tokenizer": pre_tokenizers.Split(Regex("(a+)+$"), "isolated")},
        "retry-limit-in-match",
    ),
    "found only after what it looks for": (
        {"pre_tokenizer": pre_tokenizers.Split(Regex(r"(\p{L}|\w)+!$"), "isolated")},
        "retry-limit-in-match",
    ),
    "in the normalizer": ({"normalizer": normalizers.Replace(Regex("(x|xx)+$"), "")}, "retry-limit-in-match"),
    "text that grows": ({"normalizer": normalizers.Sequence([GROWING] * 4)}, "need more than 256 MiB|makes"),
    "text that grows once": ({"normalizer": GROWING}, "its normalizer makes"),
    "decoded text that grows": ({"decoder": decoders.Replace("z", "z" * 500)}, "its decoder makes"),
    "repeated by the template": (
        {"post_processor": processors.TemplateProcessing(" ".join(["$A"] * 500))},
        "become .* tokens|not yet",
    ),
}


def with_rules(**parts: object) -> Tokenizer:
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    for name, part in parts.items():
        setattr(inner, name, part)
    return inner


@pytest.mark.parametrize("case", HOSTILE)
def test_rules_without_bounds_are_one_error(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    parts, reason = HOSTILE[case]
    with pytest.raises(TokenizerError, match=rf"rules of the tokenizer have no bounds; got .*({reason})") as caught:
        check_rules(with_rules(**parts), "HERE")
    assert "\n" not in str(caught.value)
    assert "(HERE)" in str(caught.value)
    assert capfd.readouterr().err == ""  # the library's panic prints a stack trace


def test_a_hostile_tokenizer_json_is_refused_when_it_is_opened(tmp_path) -> None:
    with_rules(**HOSTILE["nested quantifiers"][0]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"retry-limit-in-match over \(.*tokenizer.json\)"):
        HuggingFaceTokenizer(str(tmp_path))


def test_a_panic_while_a_text_is_encoded_is_an_error_too(tmp_path, monkeypatch, capfd) -> None:
    with_rules(**HOSTILE["nested quantifiers"][0]).save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr("moezoo.core.data.tokenizer_files.check_rules", lambda *_: None)
    with pytest.raises(TokenizerError, match="cannot encode the prompt; got Onig: Regex search error"):
        HuggingFaceTokenizer(str(tmp_path)).encode("a" * 40 + "b")


def test_a_file_that_is_no_tokenizer_is_one_error(tmp_path) -> None:
    for content in ("{", "[]", json.dumps({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}), "[" * 9999):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(TokenizerError, match="the tokenizer cannot be read; got ") as caught:
            HuggingFaceTokenizer(str(tmp_path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+(?!\S)|\s+"), "isolated")},
        {"normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])},
        {"normalizer": normalizers.NFKD(), "decoder": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])},
        {"post_processor": processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])},
        {"post_processor": processors.BertProcessing(("</s>", 1), ("<s>", 0))},
    ],
)
def test_the_rules_of_real_tokenizers_pass(parts: dict[str, object]) -> None:
    rules = {name: tokenizer_rules._json_of(getattr(with_rules(**parts), name)) for name in tokenizer_rules.PARTS}
    tokenizer_rules.try_rules(rules)
