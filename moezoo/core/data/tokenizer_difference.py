"""Comparison of a tokenizer.json with the rules that transformers' AutoTokenizer would use in its place.

Both are compared without their vocabularies, so that it takes milliseconds.
"""

import json
import logging as python_logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moezoo.core.data.tokenizer_files import TOKENIZER_CONFIG, LoadedTokenizer
from moezoo.core.data.tokenizer_rules import PARTS, first_line
from moezoo.core.data.tokenizers import MAX_FILE_BYTES, TOKENIZER_FILE
from moezoo.core.files import read_bounded
from moezoo.core.json_text import parse_json

# Spaces at the borders and in between, digits, contractions, both Unicode forms, scripts without spaces, line ends.
_PROBES = (
    *("2023", "3.14159", "it's", "IT'S", "e\u0301", "\ufb01", "   lead", " a  b ", "a\n\n  b", "\r\n", "\t\tx", "x  "),
    *(
        "snake_case",
        "CamelCase",
        "a-b",
        "(x)",
        "...",
        "//x",
        "日本語",
        "你好。世界",
        "été",
        "🙂👍🏽",
        "İ",
        "▁",
        "``q''",
        "a1b2",
    ),
)
_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
_MATCHING = ("normalized", "lstrip", "rstrip", "single_word")


def difference(tokenizer: LoadedTokenizer) -> str | None:
    """Return one line on what transformers would encode otherwise than by a tokenizer.json; None if nothing."""
    if tokenizer.folder is None:
        return None
    import transformers
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(python_logging.ERROR)
    with tempfile.TemporaryDirectory() as small:
        try:
            found = _found(tokenizer, tokenizer.folder, Path(small))
        except Exception as error:  # of many types, from OSError to KeyError
            found = f"cannot load this tokenizer ({first_line(error).replace(small, str(tokenizer.folder)):.200})"
        finally:
            logging.set_verbosity(level)
    return None if found is None else f"transformers {transformers.__version__} {found}"


def _found(tokenizer: LoadedTokenizer, folder: Path, small: Path) -> str | None:
    from transformers import AutoTokenizer

    from_pretrained: Callable[..., Any] = AutoTokenizer.from_pretrained
    _write_without_vocabulary(tokenizer, folder, small)
    theirs = from_pretrained(str(small), trust_remote_code=False)
    if not theirs.is_fast:
        return f"({type(theirs).__name__}) does not read {TOKENIZER_FILE}"
    found = _first_difference(tokenizer.inner.backend_tokenizer, theirs.backend_tokenizer)
    return None if found is None else f"({type(theirs).__name__}) encodes other ids: {found}"


def _write_without_vocabulary(tokenizer: LoadedTokenizer, folder: Path, small: Path) -> None:
    """Write the tokenizer with its added tokens and rules only, and the configs that AutoTokenizer reads."""
    from tokenizers import Tokenizer, models

    backend = tokenizer.inner.backend_tokenizer
    added = {token.content: token for _, token in sorted(backend.get_added_tokens_decoder().items())}
    vocab = {token: index for index, token in enumerate(added or ["<unk>"])}
    model = backend.model
    bare: models.Model
    match type(model).__name__:
        case "BPE":
            options = {name: getattr(model, name) for name in (*_OPTIONS, "unk_token", "fuse_unk")}
            bare = models.BPE(vocab=vocab, merges=[], **{name: value for name, value in options.items() if value})
        case "Unigram":
            bare = models.Unigram([(token, 0.0) for token in vocab], 0, False)
        case "WordPiece":
            bare = models.WordPiece(vocab=vocab, unk_token=model.unk_token)
        case _:
            bare = models.WordLevel(vocab=vocab, unk_token=model.unk_token)
    copy = Tokenizer(bare)
    for name in PARTS:
        setattr(copy, name, getattr(backend, name))
    copy.post_processor = tokenizer.post_processor
    copy.add_tokens(list(added.values()))
    copy.save(str(small / TOKENIZER_FILE))
    for name in (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            shutil.copy(folder / name, small / name)
    config = folder / "config.json"
    if config.is_file():
        fields = parse_json(read_bounded(config, MAX_FILE_BYTES))
        kept = {name: fields[name] for name in ("model_type", "tokenizer_class", "_name_or_path") if name in fields}
        (small / config.name).write_text(json.dumps(kept))


def _first_difference(ours: Any, theirs: Any) -> str | None:
    for text in _PROBES:
        pieces, other = _pieces(ours, text), _pieces(theirs, text)
        if pieces != other:
            return f"it splits {text!r:.80} into {_shown(other)}, and not into {_shown(pieces)}"
    for name in _OPTIONS:
        value, their_value = getattr(ours.model, name, None), getattr(theirs.model, name, None)
        if (value or None) != (their_value or None):
            return f"its {name} is {their_value}, and not {value}"
    for token in list(ours.get_added_tokens_decoder().values())[-1:]:
        added, their_added = _added_to(ours, token.content), _added_to(theirs, token.content)
        if added != their_added:
            return f"it adds {_shown(their_added) or 'nothing'} to a text, and not {_shown(added) or 'nothing'}"
    tokens = {token.content: token for token in theirs.get_added_tokens_decoder().values()}
    for token in ours.get_added_tokens_decoder().values():
        other = tokens.get(token.content, token)
        for name in _MATCHING:
            value, their_value = getattr(token, name), getattr(other, name)
            if value != their_value:
                return f"{name} of its token {token.content!r:.80} is {their_value}, and not {value}"
    return None


def _pieces(tokenizer: Any, text: str) -> list[str]:
    normal = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [normal]
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]


def _added_to(tokenizer: Any, token: str) -> list[str]:
    """Return the special tokens that are added to a text, which is a special token, so that it needs no vocabulary."""
    tokens: list[str] = tokenizer.encode(token).tokens
    if token in tokens:
        tokens.remove(token)
    return tokens


def _shown(pieces: list[str]) -> str:
    return " ".join(map(repr, pieces))
