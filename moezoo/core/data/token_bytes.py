"""Bytes of text per token, from the vocabulary of a tokenizer of the `tokenizers` library.

Decoded text cannot be used to count bytes: a window that begins or ends inside a character decodes to U+FFFD, which has
3 bytes for each piece.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(inner: Any, added: Mapping[int, Any]) -> npt.NDArray[np.int64]:
    """Return the number of UTF-8 bytes of text that each token stands for, int64 [2, V].

    Row 0 is after another token, row 1 at the beginning of a text, where SentencePiece's tokenizers add a space that is
    not of the text.

    - special tokens, and ids without a token: 0, since none of them is text;
    - other added tokens: the bytes of their content;
    - byte-level (GPT-2, Llama 3, Qwen, DeepSeek): a byte per character of the name;
    - byte fallback (`<0xNN>` of Llama 2, Mixtral, Gemma): 1;
    - all others (SentencePiece's `▁`, WordPiece's `##`): the bytes that the token adds to the decoded text.

    Args:
        inner: a `tokenizers.Tokenizer`.
        added: added tokens by id, with `content` and `special`.
    """
    names: dict[str, int] = inner.get_vocab(with_added_tokens=True)
    lengths = np.zeros((2, max(names.values()) + 1), np.int64)
    byte_level = "ByteLevel" in _types(inner.decoder) | _types(inner.pre_tokenizer)
    fallback = bool(getattr(inner.model, "byte_fallback", False)) or "ByteFallback" in _types(inner.decoder)
    decoded: dict[str, int] = {}
    for name, index in names.items():
        if index in added:
            lengths[:, index] = 0 if added[index].special else len(added[index].content.encode("utf-8"))
        elif byte_level:
            lengths[:, index] = len(name) if _ALPHABET.issuperset(name) else len(name.encode("utf-8"))
        elif fallback and _BYTE.fullmatch(name):
            lengths[:, index] = 1
        else:
            decoded[name] = index
    word = next((index for name, index in decoded.items() if name.isascii() and name.isalnum()), None)
    for row, before in enumerate(([] if word is None else [word], [])):
        lengths[row, list(decoded.values())] = _decoded_bytes(inner, list(decoded.values()), before)
    return lengths


def _decoded_bytes(inner: Any, ids: list[int], before: list[int]) -> list[int]:
    """Return the bytes that each token adds to the decoded text of the tokens `before` it."""
    first = len(inner.decode(before, skip_special_tokens=False).encode("utf-8"))
    texts = inner.decode_batch([[*before, index] for index in ids], skip_special_tokens=False)
    return [max(0, len(text.encode("utf-8")) - first) for text in texts]


def _types(part: Any) -> set[str]:
    """Return the types of a decoder or pre-tokenizer and of its parts, if it is a sequence."""
    return set(re.findall(r'"type":\s*"(\w+)"', part.__getstate__().decode())) if part is not None else set()


def _alphabet() -> frozenset[str]:
    """Return the characters that stand for the 256 bytes in byte-level vocabularies.

    Source: Radford et al. 2019, GPT-2's `bytes_to_unicode`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return frozenset(map(chr, [*printable, *range(0x100, 0x100 + 256 - len(printable))]))


_ALPHABET = _alphabet()
