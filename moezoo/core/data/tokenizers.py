"""Tokenizer protocol, the character, byte and ids-only tokenizers, and streaming detokenization.

A run folder has a `tokenizer.json` with the tokenizer's kind. The files of a Hugging Face tokenizer are copied to
`tokenizer/` in the run folder, so that a run is self-contained.
"""

import codecs
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from moezoo.core.data.tokenizer_json import byte_tokenizer_files, character_tokenizer_files
from moezoo.core.errors import TokenizerError
from moezoo.core.files import make_folder, write_atomically

Ids = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
IdsLike = Sequence[int] | npt.NDArray[np.integer[Any]]

TOKENIZER_FILE, TOKENIZER_FOLDER = "tokenizer.json", "tokenizer"
MAX_FILE_BYTES = 100_000_000
"""Largest file of a tokenizer; Gemma's tokenizer.json, with 262,144 tokens, has 33 MB. A larger one takes minutes."""


@runtime_checkable
class Tokenizer(Protocol):
    """Interface of a tokenizer for data, training and generation.

    `vocab_size` is one more than the largest id. `end_of_text` is the id of the end-of-document token, if there is one.
    `first_tokens` are the special tokens before every document and prompt: `<s>` alone, or none.
    Tokenizers with equal `content_hash` encode documents identically: it is part of the key of the token cache.
    """

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_text(self) -> int | None: ...
    @property
    def first_tokens(self) -> tuple[int, ...]: ...
    @property
    def content_hash(self) -> str: ...

    def encode(self, text: str, *, where: str = "prompt") -> Ids:
        """Encode text as token ids, int32 [T]. `where` names the text in errors. Raises TokenizerError."""
        ...

    def decode(self, ids: IdsLike) -> str:
        """Decode token ids as text. Raises TokenizerError for an id outside [0, vocab_size)."""
        ...

    def byte_count(self, ids: IdsLike, begins: Flags | None = None) -> int | None:
        """Return the number of UTF-8 bytes of the text of ids, which may begin and end inside a character.

        `begins`: bool [T], the tokens that begin a text; None: the first one. Returns None if ids have no text.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `tokenizer.json`."""
        ...

    def save(self, path: str | Path) -> None:
        """Save to a run folder; `path` is the folder or its `tokenizer.json`."""
        ...

    def files(self) -> dict[str, bytes]:
        """Return the files by which a Hugging Face folder gives the same ids, by name; empty if ids have no text.

        Raises TokenizerError: no such files give the same ids.
        """
        ...


class CharacterTokenizer:
    """Character-level tokenizer; id i is the i-th character of the vocabulary, which is sorted by code point."""

    kind = "character"
    end_of_text = None
    first_tokens = ()

    def __init__(self, characters: str) -> None:
        """`characters` is the vocabulary: each character once, in any order. Raises TokenizerError."""
        self.characters = "".join(sorted(set(characters)))
        if not characters or len(self.characters) != len(characters):
            raise TokenizerError(
                f"a character vocabulary needs each character once; got {len(characters)} characters, "
                f"{len(self.characters)} of them distinct. Use the set of characters of the text."
            )
        self.vocab_size = len(self.characters)
        self.content_hash = hash_of(self.to_dict())
        self._code_points = _code_points(self.characters)
        # The last row, one past the largest known code point, stays -1; larger code points are clipped to it.
        self._id_of = np.full(int(self._code_points[-1]) + 2, -1, np.int32)
        self._id_of[self._code_points] = np.arange(self.vocab_size, dtype=np.int32)
        self._bytes_of = np.array([len(c.encode("utf-8", "surrogatepass")) for c in self.characters], np.int64)

    def encode(self, text: str, *, where: str = "prompt") -> Ids:
        """Spec: Tokenizer.encode. Raises TokenizerError for a character outside the vocabulary."""
        ids = np.take(self._id_of, _code_points(text), mode="clip")
        if ids.size and ids.min() < 0:
            unknown = sorted(set(text) - set(self.characters))
            shown = ", ".join(map(repr, unknown[:8]))
            if len(unknown) > 8:
                shown += f" and {len(unknown) - 8} more"
            raise TokenizerError(
                f"{where} has characters outside the tokenizer's vocabulary; got {shown}; expected its "
                f"{self.vocab_size} characters, those of the training data ({_excerpt(self.characters)}). "
                "Remove them, or train on text that has them or with tokenizer: {kind: byte}."
            )
        return ids

    def decode(self, ids: IdsLike) -> str:
        """Spec: Tokenizer.decode."""
        code_points = self._code_points[check_ids(ids, self)]
        return str(code_points.astype("<u4").tobytes(), "utf-32-le", "surrogatepass")

    def byte_count(self, ids: IdsLike, begins: Flags | None = None) -> int:
        """Spec: Tokenizer.byte_count."""
        return int(self._bytes_of[check_ids(ids, self)].sum())

    def to_dict(self) -> dict[str, Any]:
        """Spec: Tokenizer.to_dict."""
        return {"kind": self.kind, "characters": self.characters}

    def save(self, path: str | Path) -> None:
        """Spec: Tokenizer.save."""
        save_json(self, path)

    def files(self) -> dict[str, bytes]:
        """Spec: Tokenizer.files."""
        return character_tokenizer_files(self.characters)


class ByteTokenizer:
    """Byte-level tokenizer: one token per UTF-8 byte. Bytes that are not UTF-8 decode to U+FFFD."""

    kind = "byte"
    vocab_size = 256
    end_of_text = None
    first_tokens = ()
    content_hash = "byte"

    def encode(self, text: str, *, where: str = "prompt") -> Ids:
        """Spec: Tokenizer.encode."""
        return np.frombuffer(encode_utf8(text, where), np.uint8).astype(np.int32)

    def decode(self, ids: IdsLike) -> str:
        """Spec: Tokenizer.decode."""
        return self.to_bytes(ids).decode("utf-8", "replace")

    def to_bytes(self, ids: IdsLike) -> bytes:
        """Decode ids as bytes, which need not be valid UTF-8."""
        return check_ids(ids, self).astype(np.uint8).tobytes()

    def byte_count(self, ids: IdsLike, begins: Flags | None = None) -> int:
        """Spec: Tokenizer.byte_count."""
        return int(check_ids(ids, self).size)

    def to_dict(self) -> dict[str, Any]:
        """Spec: Tokenizer.to_dict."""
        return {"kind": self.kind}

    def save(self, path: str | Path) -> None:
        """Spec: Tokenizer.save."""
        save_json(self, path)

    def files(self) -> dict[str, bytes]:
        """Spec: Tokenizer.files."""
        return byte_tokenizer_files()


class TokenIds:
    """Placeholder for data without a known tokenizer: ids that cannot be encoded from or decoded to text."""

    kind = "ids"
    end_of_text = None
    first_tokens = ()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.content_hash = hash_of(self.to_dict())

    def encode(self, text: str, *, where: str = "prompt") -> Ids:
        """Raise TokenizerError: there is no tokenizer."""
        raise TokenizerError(
            f"{where} is text, but this tokenizer has ids only (kind: ids); expected token ids. "
            "Pass ids (--tokens), or add the tokenizer: data.tokenizer, or a tokenizer.json in the model's folder."
        )

    def decode(self, ids: IdsLike) -> str:
        """Raise TokenizerError: there is no tokenizer."""
        raise TokenizerError(
            "token ids cannot be decoded as text, because this tokenizer has ids only (kind: ids). "
            "Add the tokenizer: data.tokenizer, or a tokenizer.json in the model's folder."
        )

    def byte_count(self, ids: IdsLike, begins: Flags | None = None) -> None:
        """Return None: the number of bytes of the text is unknown."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Spec: Tokenizer.to_dict."""
        return {"kind": self.kind, "vocab_size": self.vocab_size}

    def save(self, path: str | Path) -> None:
        """Spec: Tokenizer.save."""
        save_json(self, path)

    def files(self) -> dict[str, bytes]:
        """Return nothing: there is no tokenizer."""
        return {}


class StreamDecoder:
    """Incremental detokenizer: returns text without partial characters; the concatenation equals `decode` of all ids.

    Args:
        tokenizer: the tokenizer.
        before: ids that precede the first ones, a prompt for instance; their text is not returned.

    >>> stream = StreamDecoder(tokenizer)
    >>> pieces = [stream.add([next_id]) for next_id in ids] + [stream.finish()]
    """

    def __init__(self, tokenizer: Tokenizer, before: IdsLike = ()) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        if isinstance(tokenizer, ByteTokenizer):
            self._bytes.decode(tokenizer.to_bytes(before))
        self._ids = [int(index) for index in before]  # the ids decoded last, as context, then those not decoded yet
        self._shown = len(self._ids)  # number of ids in _ids whose text was returned

    def add(self, ids: IdsLike) -> str:
        """Return the text completed by these ids; empty while a character is incomplete."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._bytes.decode(self._tokenizer.to_bytes(ids))
        if isinstance(self._tokenizer, CharacterTokenizer):
            return self._tokenizer.decode(ids)
        self._ids.extend(int(index) for index in ids)
        new = self._new_text()
        if not new or new.endswith("\ufffd"):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return new

    def finish(self) -> str:
        """Return the remaining text, with incomplete characters as U+FFFD."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._bytes.decode(b"", final=True)
        new = self._new_text() if self._ids else ""
        self._ids, self._shown = [], 0
        return new

    def _new_text(self) -> str:
        """Decode with preceding ids as context, since some tokenizers drop the space before the first word."""
        shown, text = self._tokenizer.decode(self._ids[: self._shown]), self._tokenizer.decode(self._ids)
        if not text.startswith(shown):
            shown = shown.rstrip("\ufffd")  # the ids before ended inside a character
        return text[len(shown) :]


def with_first_tokens(ids: Ids, tokenizer: Tokenizer) -> Ids:
    """Return the ids of a document or prompt with the tokenizer's first tokens (`<s>`), unless they begin with them."""
    first = np.array(tokenizer.first_tokens, np.int32)
    return ids if np.array_equal(ids[: len(first)], first) else np.concatenate([first, ids])


def tokenizer_file(path: str | Path) -> Path:
    """Return the path of `tokenizer.json` for a run folder or for that file."""
    path = Path(path)
    return path if path.suffix == ".json" and not path.is_dir() else path / TOKENIZER_FILE


def save_json(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write `tokenizer.json` into a run folder."""
    file = tokenizer_file(path)
    make_folder(file.parent)
    write_atomically(file, json.dumps(tokenizer.to_dict(), ensure_ascii=True, indent=1) + "\n")


def check_ids(ids: IdsLike, tokenizer: Tokenizer) -> npt.NDArray[np.integer[Any]]:
    """Return ids as a one-dimensional integer array. Raises TokenizerError for an id outside the vocabulary."""
    array = np.asarray(ids).reshape(-1)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TokenizerError(f"token ids are not integers; got {array.dtype}; expected int32. Convert them.")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= tokenizer.vocab_size:
        raise TokenizerError(
            f"token id outside the tokenizer's vocabulary; got {low if low < 0 else high}; expected 0 to "
            f"{tokenizer.vocab_size - 1} ({tokenizer.kind} tokenizer). Use the tokenizer that made the ids."
        )
    return array


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32, copy=False)


def encode_utf8(text: str, where: str) -> bytes:
    """Encode text as UTF-8. Raises TokenizerError; `where` names the text.

    Trap: command-line bytes that are not UTF-8 become lone surrogates.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{where} is not Unicode text; got {text[error.start]!r} at character {error.start}; expected no "
            "lone surrogates. Pass valid UTF-8."
        ) from None


def _excerpt(characters: str) -> str:
    shown = characters if len(characters) <= 40 else characters[:20] + "..." + characters[-20:]
    return repr(shown)


def hash_of(content: object) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()
