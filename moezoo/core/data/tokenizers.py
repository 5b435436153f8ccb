"""Text to token ids and back: characters, bytes, a Hugging Face tokenizer, or ids without text.

A run folder holds `tokenizer.json`, which names the kind; beside it, a Hugging Face tokenizer has its own
files in `tokenizer/`, so that a run needs nothing from outside.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from moezoo.core.errors import TokenizerError, nearest
from moezoo.core.files import make_folder, write_atomically

Ids = npt.NDArray[np.int32]
IdsLike = Sequence[int] | npt.NDArray[np.integer[Any]]

TOKENIZER_FILES = _FILE, _FOLDER = "tokenizer.json", "tokenizer"
_LAST_CODE_POINT = 0x10FFFF


@runtime_checkable
class Tokenizer(Protocol):
    """What the data, the train loop and the generate loop need of a tokenizer.

    `vocab_size` is one more than the largest id. `end_of_text` is the id that ends a document, if there is
    one. Tokenizers of equal `content_hash` encode alike; it keys the token cache.
    """

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_text(self) -> int | None: ...
    @property
    def content_hash(self) -> str: ...

    def encode(self, text: str, *, where: str = "prompt") -> Ids:
        """Token ids of a text, int32 [T]. `where` names the text in errors. Raises TokenizerError."""
        ...

    def decode(self, ids: IdsLike) -> str:
        """The text of ids. Raises TokenizerError for an id outside [0, vocab_size)."""
        ...

    def byte_count(self, ids: IdsLike) -> int | None:
        """Length in UTF-8 bytes of the text that ids stand for; None where ids have no text."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The content of `tokenizer.json`."""
        ...

    def save(self, path: str | Path) -> None:
        """Write into a run folder; `path` is the folder or the `tokenizer.json` in it."""
        ...


class CharacterTokenizer:
    """One token a character; id i is the i-th of the vocabulary, which is sorted by code point."""

    kind = "character"
    end_of_text = None

    def __init__(self, characters: str) -> None:
        """`characters` is the vocabulary: each character once, in any order."""
        self.characters = "".join(sorted(set(characters)))
        if not characters or len(self.characters) != len(characters):
            raise TokenizerError(
                f"a character vocabulary needs each character once; got {len(characters)} characters, of "
                f"which {len(self.characters)} are different. Give the text's set of characters."
            )
        self.vocab_size = len(self.characters)
        self.content_hash = _hash_of(self.to_dict())
        self._code_points = _code_points(self.characters)
        # One row past the last known code point stays -1; every larger code point is clipped to it.
        self._id_of = np.full(int(self._code_points[-1]) + 2, -1, np.int32)
        self._id_of[self._code_points] = np.arange(self.vocab_size, dtype=np.int32)
        self._bytes_of = np.array([len(c.encode("utf-8", "surrogatepass")) for c in self.characters], np.int64)

    def encode(self, text: str, *, where: str = "prompt") -> Ids:
        """Spec: Tokenizer.encode; a character outside the vocabulary raises TokenizerError."""
        ids = np.take(self._id_of, _code_points(text), mode="clip")
        if ids.size and ids.min() < 0:
            unknown = sorted(set(text) - set(self.characters))
            shown = ", ".join(map(repr, unknown[:8]))
            if len(unknown) > 8:
                shown += f" and {len(unknown) - 8} more"
            raise TokenizerError(
                f"{where} has characters outside the tokenizer's vocabulary; got {shown}; expected some of "
                f"its {self.vocab_size} characters, the ones in the training data ({_extract(self.characters)}). "
                "Leave them out, or train with text that has them or with tokenizer: {kind: byte}."
            )
        return ids

    def decode(self, ids: IdsLike) -> str:
        """Spec: Tokenizer.decode."""
        code_points = self._code_points[_checked(ids, self)]
        return str(code_points.astype("<u4").tobytes(), "utf-32-le", "surrogatepass")

    def byte_count(self, ids: IdsLike) -> int:
        """Spec: Tokenizer.byte_count."""
        return int(self._bytes_of[_checked(ids, self)].sum())

    def to_dict(self) -> dict[str, Any]:
        """Spec: Tokenizer.to_dict."""
        return {"kind": self.kind, "characters": self.characters}

    def save(self, path: str | Path) -> None:
        """Spec: Tokenizer.save."""
        _save(self, path)


class ByteTokenizer:
    """One token a byte of UTF-8. Bytes that are not UTF-8 decode to U+FFFD."""

    kind = "byte"
    vocab_size = 256
    end_of_text = None
    content_hash = "byte"

    def encode(self, text: str, *, where: str = "prompt") -> Ids:
        """Spec: Tokenizer.encode."""
        return np.frombuffer(_utf8(text, where), np.uint8).astype(np.int32)

    def decode(self, ids: IdsLike) -> str:
        """Spec: Tokenizer.decode."""
        return self.to_bytes(ids).decode("utf-8", "replace")

    def to_bytes(self, ids: IdsLike) -> bytes:
        """The bytes of ids, UTF-8 or not."""
        return _checked(ids, self).astype(np.uint8).tobytes()

    def byte_count(self, ids: IdsLike) -> int:
        """Spec: Tokenizer.byte_count."""
        return int(_checked(ids, self).size)

    def to_dict(self) -> dict[str, Any]:
        """Spec: Tokenizer.to_dict."""
        return {"kind": self.kind}

    def save(self, path: str | Path) -> None:
        """Spec: Tokenizer.save."""
        _save(self, path)


class HuggingFaceTokenizer:
    """A tokenizer that transformers loads, from a folder or by hub id.

    No special token is added when it encodes; one written out in the text (`<|endoftext|>`) becomes its id. Ids from
    `vocab_size` on, which models with a padded vocabulary have, stand for no text.
    """

    kind = "huggingface"

    def __init__(self, path: str) -> None:
        """`path` is a folder with the tokenizer's files, or a hub id. Raises TokenizerError."""
        self.path = str(path)
        self._inner = _load_with_transformers(self.path)
        self.vocab_size = max(self._inner.get_vocab().values()) + 1  # len() is less where ids have gaps
        eos = self._inner.eos_token_id
        self.end_of_text: int | None = None if eos is None else int(eos)

    @cached_property
    def content_hash(self) -> str:
        """Spec: Tokenizer. The hash of the `tokenizers` library's own serialization."""
        return _hash_of(["huggingface", self._inner.backend_tokenizer.to_str()])

    def encode(self, text: str, *, where: str = "prompt") -> Ids:
        """Spec: Tokenizer.encode."""
        _utf8(text, where)
        ids = self._inner.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, np.int32)

    def encode_with_special_tokens(self, text: str, *, where: str = "prompt") -> Ids:
        """As transformers encodes by default: with the special tokens that this tokenizer adds to a text, if any."""
        _utf8(text, where)
        return np.array(self._inner(text)["input_ids"], np.int32)

    @cached_property
    def first_token(self) -> int | None:
        """The token that it puts before every text by itself (`<s>`), if any."""
        bos, added = self._inner.bos_token_id, self._inner("")["input_ids"]
        return int(bos) if bos is not None and added[:1] == [bos] else None

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> Ids:
        """A conversation by the tokenizer's chat template, up to where the next answer begins.

        `messages`: `role` and `content` of each. Special tokens are those that the template writes; none is added.
        Raises TokenizerError: no template, or one that refuses these messages.
        """
        for message in messages:
            _utf8(message["content"], "prompt")
        if not getattr(self._inner, "chat_template", None):
            raise TokenizerError(
                f"the tokenizer has no chat template; got {self.path}; expected chat_template.jinja, or chat_template "
                "in its tokenizer_config.json. Prompt without chat, or take the folder of the chat model."
            )
        try:
            ids = self._inner.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template is a program: it raises TemplateError, and what it stumbles over
            raise TokenizerError(
                f"the chat template cannot be applied; got {_first_line(error)} ({self.path}); expected a template for "
                "roles system, user and assistant. Prompt without chat, or mend the template."
            ) from error
        return np.array(ids, np.int32)

    def decode(self, ids: IdsLike) -> str:
        """Spec: Tokenizer.decode. Special tokens are shown; ids from vocab_size on are not."""
        known = self._known(ids).tolist()
        return str(self._inner.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def byte_count(self, ids: IdsLike) -> int:
        """Spec: Tokenizer.byte_count. Special tokens count 0, and so do ids from vocab_size on.

        Exact for byte-level tokenizers (GPT-2, Llama 3, Qwen). For others it is the length of the decoded
        text, which can differ by some bytes where `ids` begins or ends inside a character or a word.
        """
        known = self._known(ids)
        if self._bytes_of is not None:
            return int(self._bytes_of[known].sum())
        text = self._inner.decode(known.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode("utf-8"))

    def _known(self, ids: IdsLike) -> npt.NDArray[np.integer[Any]]:
        array = np.asarray(ids).reshape(-1)
        return _checked(array[array < self.vocab_size], self)

    @cached_property
    def _bytes_of(self) -> npt.NDArray[np.int64] | None:
        """Bytes of each token where the tokenizer is byte-level (one character of a token's name a byte)."""
        decoder = json.loads(self._inner.backend_tokenizer.to_str()).get("decoder") or {}
        parts = decoder.get("decoders", [decoder])
        if [part.get("type") for part in parts] != ["ByteLevel"]:
            return None
        lengths = np.zeros(self.vocab_size, np.int64)
        added = self._inner.added_tokens_decoder
        for token, index in self._inner.get_vocab().items():
            if index not in added:
                lengths[index] = len(token)
            elif not added[index].special:
                lengths[index] = len(token.encode("utf-8"))
        return lengths

    def to_dict(self) -> dict[str, Any]:
        """Spec: Tokenizer.to_dict. `path` says where it came from; a saved one is read from `tokenizer/`."""
        return {"kind": self.kind, "path": self.path}

    def save(self, path: str | Path) -> None:
        """Spec: Tokenizer.save. The tokenizer's own files go into `tokenizer/`, beside `tokenizer.json`."""
        folder = _run_file(path).parent / _FOLDER
        if folder.absolute() == Path(self.path).absolute() and _run_file(path).is_file():
            return  # a resumed run's own: a kill while writing it again would damage it
        make_folder(folder)
        self._inner.save_pretrained(str(folder))
        _save(self, path)


class TokenIds:
    """No text at all: token shards whose tokenizer is of no concern."""

    kind = "ids"
    end_of_text = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.content_hash = "ids"

    def encode(self, text: str, *, where: str = "prompt") -> Ids:
        """Raises TokenizerError: there is no text here."""
        raise TokenizerError(
            f"{where} is text, but this tokenizer has ids only (kind: ids); expected token ids. "
            "Give ids (--tokens), or the text's tokenizer: data.tokenizer, or a tokenizer.json in the model's folder."
        )

    def decode(self, ids: IdsLike) -> str:
        """Raises TokenizerError: there is no text here."""
        raise TokenizerError(
            "token ids cannot be shown as text, because this tokenizer has ids only (kind: ids). "
            "Give the text's tokenizer: data.tokenizer, or a tokenizer.json in the model's folder."
        )

    def byte_count(self, ids: IdsLike) -> None:
        """None: how many bytes the text had is not known."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Spec: Tokenizer.to_dict."""
        return {"kind": self.kind, "vocab_size": self.vocab_size}

    def save(self, path: str | Path) -> None:
        """Spec: Tokenizer.save."""
        _save(self, path)


class StreamDecoder:
    """Text pieces from ids as they come, without half characters: the pieces joined are `decode` of all ids.

    >>> stream = StreamDecoder(tokenizer)
    >>> pieces = [stream.add([next_id]) for next_id in ids] + [stream.finish()]
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # those shown last, for context, then those not shown yet
        self._shown = 0  # how many of _ids have been shown

    def add(self, ids: IdsLike) -> str:
        """The text that these ids complete; empty while a character is still missing bytes."""
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
        """What is left: bytes that never became a character, as U+FFFD."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._bytes.decode(b"", final=True)
        new = self._new_text() if self._ids else ""
        self._ids, self._shown = [], 0
        return new

    def _new_text(self) -> str:
        """Decoded with the ids before, since some tokenizers drop the space before a text's first word."""
        shown = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(shown) :]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer: a run folder, the `tokenizer.json` in it, or a folder of a Hugging Face tokenizer.

    Raises TokenizerError: nothing there, not JSON, an unknown kind, a vocabulary that cannot be.
    """
    path = Path(path)
    file = _run_file(path)
    if not file.is_file():
        if path.is_dir() and (path / "tokenizer_config.json").is_file():
            return HuggingFaceTokenizer(str(path))
        raise TokenizerError(f"no tokenizer; got {path}; expected a run folder with {_FILE}. Check the path.")
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"tokenizer cannot be read; got {file} ({error}); expected JSON. Mend it.") from None
    if not isinstance(saved, dict):
        raise TokenizerError(f"tokenizer is not a mapping; got {type(saved).__name__} in {file}. Mend it.")
    if "kind" not in saved and "model" in saved:  # the file of the same name that the tokenizers library writes
        return HuggingFaceTokenizer(str(file.parent))
    match saved.get("kind"):
        case "character" if isinstance(saved.get("characters"), str):
            return CharacterTokenizer(saved["characters"])
        case "byte":
            return ByteTokenizer()
        case "ids" if isinstance(saved.get("vocab_size"), int) and saved["vocab_size"] > 0:
            return TokenIds(saved["vocab_size"])
        case "huggingface":
            return HuggingFaceTokenizer(str(file.parent / _FOLDER))
        case kind:
            kinds = ["character", "byte", "huggingface", "ids"]
            raise TokenizerError(
                f"tokenizer is not complete or of an unknown kind; got kind {kind!r} with the keys "
                f"{sorted(saved)} in {file}; expected one of {', '.join(kinds)}{nearest(str(kind), kinds)}. "
                "Mend it."
            )


def tokenizer_beside(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a Hugging Face model's folder; ids without text where the folder has no `tokenizer.json`.

    `vocab_size` is the model's, which may be larger than the tokenizer's (rows of padding) or smaller (tokens that only
    other parts of a larger model know). Raises TokenizerError.
    """
    return HuggingFaceTokenizer(str(folder)) if (folder / _FILE).is_file() else TokenIds(vocab_size)


def _run_file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / _FILE


def _save(tokenizer: Tokenizer, path: str | Path) -> None:
    file = _run_file(path)
    make_folder(file.parent)
    write_atomically(file, json.dumps(tokenizer.to_dict(), ensure_ascii=True, indent=1) + "\n")


def _checked(ids: IdsLike, tokenizer: Tokenizer) -> npt.NDArray[np.integer[Any]]:
    """ids as an integer array, each within the vocabulary."""
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


def _utf8(text: str, where: str) -> bytes:
    """The text as UTF-8. Trap: bytes of a command line that are not UTF-8 arrive as lone surrogates."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{where} is not Unicode text; got {text[error.start]!r} at character {error.start}; expected no "
            "lone surrogates. Give it as valid UTF-8."
        ) from None


def _extract(characters: str) -> str:
    shown = characters if len(characters) <= 40 else characters[:20] + "..." + characters[-20:]
    return repr(shown)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _hash_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()


def _load_with_transformers(path: str) -> Any:
    looks_local = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is None or path.startswith(".")
    local = Path(path).expanduser()
    if looks_local and not local.is_dir():  # a hub id would be asked for over the network, with retries
        raise TokenizerError(
            f"no such tokenizer; got {path}; expected a folder with a tokenizer.json, or a hub id "
            "(data.tokenizer.path). Check the path."
        )
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch, for models
    from transformers import AutoTokenizer

    from_pretrained: Callable[..., Any] = AutoTokenizer.from_pretrained
    try:
        # Trap: unless told, transformers asks on the terminal whether to run code that came with the files.
        inner = from_pretrained(str(local) if local.is_dir() else path, trust_remote_code=False)
    except Exception as error:  # transformers and the hub client raise many kinds, from OSError to KeyError
        raise TokenizerError(
            f"the tokenizer cannot be loaded; got {path} ({_first_line(error)}); expected a folder with a "
            "tokenizer.json, or a hub id that is cached or reachable (data.tokenizer.path). Check the name, "
            "or download its files to a folder and give that."
        ) from error
    if not getattr(inner, "is_fast", False):
        raise TokenizerError(
            f"the tokenizer has no tokenizer.json; got {path} ({type(inner).__name__}); expected one that "
            "the tokenizers library reads (data.tokenizer.path). Convert it with transformers' "
            "convert_slow_tokenizer."
        )
    # Trap: a tokenizer.json can carry somebody's truncation and padding, which cut a text silently.
    inner.backend_tokenizer.no_truncation()
    inner.backend_tokenizer.no_padding()
    return inner
