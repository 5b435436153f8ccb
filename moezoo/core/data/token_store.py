"""Token ids of texts, through the token cache, and of shards that the user has tokenized."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

from moezoo.core.data import source_files
from moezoo.core.data.encode_text import encode_pieces
from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.data.source_files import SourceFile
from moezoo.core.data.text_files import documents_of, text_of
from moezoo.core.data.token_cache import Key, cached_tokens, cached_value, files_key, local_copy
from moezoo.core.data.token_shards import Tokens, check_range, open_shard
from moezoo.core.data.tokenizers import Ids, Tokenizer, with_first_tokens
from moezoo.core.progress import Message, Progress

BETWEEN_DOCUMENTS = "\n\n"  # separator if the tokenizer has no end-of-text token

_FIRST_LOOK = 1 << 16  # number of tokens per shard that are range-checked when it is opened


# --- pre-tokenized shards --------------------------------------------------------------------------------------------


def open_shards(
    files: Sequence[SourceFile], vocab_size: int, name: str, on_progress: Progress | None, on_message: Message
) -> Tokens:
    """Open `.npy` and `.bin` shards; remote files are copied into the cache first.

    Raises DataError: not a shard, damaged, empty, ids outside the vocabulary in the first 65536 of a shard (the
    others are checked when they are read).
    """
    shards = [open_shard(local_copy(file, on_progress, on_message), file.name) for file in files]
    for shard, file in zip(shards, files, strict=True):
        with shard.opened() as read:
            check_range(read(0, min(_FIRST_LOOK, len(shard))), vocab_size, file.name)
    return Tokens(shards, vocab_size, name)


# --- texts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Documents of one source: one per file, or one per line of JSONL files (`field` of each line)."""

    name: str  # for errors and progress
    files: tuple[SourceFile, ...]
    field: str | None = None

    def pieces(self, on_bytes: Callable[[int], None]) -> Iterator[str | None]:
        """Yield the text in pieces, with None between two documents; empty documents are left out.

        A piece is a part of a file, or all of a line of JSONL.
        """
        started = False
        for file in self.files:
            documents: Iterator[Iterator[str]]
            if self.field is None:
                documents = iter([text_of(file, on_bytes)])
            else:
                documents = (iter([text]) for text in documents_of(file, self.field, on_bytes))
            for document in documents:
                first = next((piece for piece in document if piece), None)
                if first is not None:
                    if started:
                        yield None
                    started = True
                    yield first
                    yield from document

    def counter(self, what: str, on_progress: Progress | None) -> Callable[[int], None]:
        """Return a function that counts bytes and reports progress."""
        return byte_counter(f"{what} {self.name}", self.files, on_progress)


def byte_counter(what: str, files: Sequence[SourceFile], on_progress: Progress | None) -> Callable[[int], None]:
    """Return a function that counts the bytes read of files and reports progress."""
    sizes = [file.size for file in files]
    total = sum(size for size in sizes if size is not None) if None not in sizes else None
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if on_progress is not None:
            on_progress(what, done, total)

    return count


def characters_of(texts: Texts, on_progress: Progress | None, on_message: Message) -> set[str]:
    """Return the set of characters of the texts, including the separator; computed in one pass and cached."""

    def collect() -> str:
        characters: set[str] = set()
        for piece in texts.pieces(texts.counter("reading", on_progress)):
            characters.update(BETWEEN_DOCUMENTS if piece is None else piece)
        return "".join(sorted(characters))

    return set(str(cached_value(_key("characters", texts), collect, on_message)))


def tokenize(
    texts: Texts, tokenizer: Tokenizer, on_progress: Progress | None, on_message: Message, *, separate: bool = False
) -> Tokens:
    """Return the token ids of the texts from the cache; tokenize and cache them if they are not there.

    With `separate`, each document ends with the end-of-text token, if the tokenizer has one, and the id `vocab_size`
    follows it, which is no token: its places are the borders of the documents (`Tokens.find`).

    Memory is about 64 times `source_files.CHUNK_BYTES`, independent of the size of the texts. Raises DataError
    and TokenizerError.
    """
    options = {
        "tokenizer": [tokenizer.kind, tokenizer.content_hash, tokenizer.vocab_size],
        "first_tokens": list(tokenizer.first_tokens),
        "end_of_text": tokenizer.end_of_text,
        "library": version("tokenizers") if isinstance(tokenizer, HuggingFaceTokenizer) else None,
        "chunk_bytes": source_files.CHUNK_BYTES,
    }
    encode, vocab_size = (_encode_separate, tokenizer.vocab_size + 1) if separate else (_encode, tokenizer.vocab_size)
    shards = cached_tokens(
        _key("documents" if separate else "tokens", texts) | options,
        lambda: encode(texts, tokenizer, texts.counter("tokenizing", on_progress)),
        "<u2" if vocab_size <= 1 << 16 else "<u4",
        texts.name,
        on_progress,
        on_message,
    )
    return Tokens(shards, vocab_size, texts.name)


def _key(kind: str, texts: Texts) -> Key:
    return {"kind": kind, "files": files_key(texts.files), "field": texts.field, "separator": BETWEEN_DOCUMENTS}


def _encode(texts: Texts, tokenizer: Tokenizer, on_bytes: Callable[[int], None]) -> Iterator[Ids]:
    """Yield the ids of all documents: each after the first tokens, and the end-of-text token between two of them.

    Without any of these tokens, documents are separated by a blank line. If the end-of-text token is also the first
    token, it is there once.
    """
    end = () if tokenizer.end_of_text is None else (tokenizer.end_of_text,)
    pieces = texts.pieces(on_bytes)
    if not end and not tokenizer.first_tokens:
        pieces = (BETWEEN_DOCUMENTS if piece is None else piece for piece in pieces)
    for between, document in itertools.groupby(pieces, key=lambda piece: piece is None):
        if not between:
            yield from _encode_document((piece or "" for piece in document), tokenizer, texts.name)
        elif end != tokenizer.first_tokens:
            yield np.array(end, np.int32)


def _encode_separate(texts: Texts, tokenizer: Tokenizer, on_bytes: Callable[[int], None]) -> Iterator[Ids]:
    """Yield the ids of all documents, each between the first tokens and the end-of-text token, and then a border."""
    end = () if tokenizer.end_of_text is None else (tokenizer.end_of_text,)
    for between, document in itertools.groupby(texts.pieces(on_bytes), key=lambda piece: piece is None):
        if not between:
            yield from _encode_document((piece or "" for piece in document), tokenizer, texts.name)
            yield np.array([*end, tokenizer.vocab_size], np.int32)


def _encode_document(pieces: Iterator[str], tokenizer: Tokenizer, where: str) -> Iterator[Ids]:
    begun = False
    for ids in encode_pieces(pieces, tokenizer, where):
        yield with_first_tokens(ids, tokenizer) if len(ids) and not begun else ids
        begun = begun or len(ids) > 0
