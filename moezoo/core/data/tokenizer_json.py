"""The byte and the character tokenizer as files of a Hugging Face folder, which give the same ids."""

import json
from typing import Any

from moezoo.core.errors import TokenizerError
from moezoo.core.extras import check_installed

_FILE = "tokenizer.json"
_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def byte_tokenizer_files() -> dict[str, bytes]:
    """Return tokenizer.json and tokenizer_config.json of a tokenizer whose ids are the bytes of UTF-8."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "vocab": {name: byte for byte, name in enumerate(_byte_names())}, "merges": []}
    return _files({"pre_tokenizer": level, "decoder": level, "model": model})


def character_tokenizer_files(characters: str) -> dict[str, bytes]:
    """Return tokenizer.json and tokenizer_config.json of a tokenizer whose ids are the places in `characters`.

    A character that is not among them is an error of the tokenizers library. Raises TokenizerError: a character that
    such a file cannot have (half of a surrogate pair).
    """
    check_installed("tokenizers", purpose=f"the export of a {_FILE}")
    from tokenizers import Tokenizer

    try:
        characters.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the character tokenizer cannot be written as a {_FILE}; got the character "
            f"{characters[error.start]!r}; expected no half of a surrogate pair. Train on text without it."
        ) from None
    each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    vocab = {character: index for index, character in enumerate(characters)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}  # not in the vocabulary: an error
    files = _files({"pre_tokenizer": each, "decoder": {"type": "Fuse"}, "model": model})
    written = Tokenizer.from_str(files[_FILE].decode("utf-8"))
    ids = list(range(len(characters)))
    if written.encode(characters).ids != ids or written.decode(ids, skip_special_tokens=False) != characters:
        raise TokenizerError(
            f"the character tokenizer cannot be written as a {_FILE}, because the tokenizers library gives "
            "other ids. Save the run with format='moezoo'."
        )
    return files


def _byte_names() -> list[str]:
    """Return GPT-2's one-character names of the bytes: printable Latin-1 as it is, other bytes from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _files(parts: dict[str, Any]) -> dict[str, bytes]:
    nothing: dict[str, Any] = {
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "post_processor": None,
    }
    whole = {"version": "1.0", **nothing, **parts}
    contents = {_FILE: whole, "tokenizer_config.json": _CONFIG}
    return {
        name: (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode() for name, content in contents.items()
    }
