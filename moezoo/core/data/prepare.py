"""Data preparation: find the sources of a config, tokenize them, and split each into training and validation.

Sources are text, JSONL, token shards, named datasets and prebatched files. Writing: writings/data.md.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never

from moezoo.core.config.data import (
    BatchesSource,
    ByteTokenizerSpec,
    CharacterTokenizerSpec,
    ChatSource,
    DataConfig,
    DatasetSource,
    HuggingFaceTokenizerSpec,
    JSONLSource,
    SourceSpec,
    TextSource,
    TokenIdsSpec,
    TokenShardsSource,
)
from moezoo.core.data.chat import Conversations, is_conversation, tokenize_conversations
from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.data.packed_split import PackedSplit, all_documents, divided
from moezoo.core.data.prebatched import PrebatchedSplit, open_prebatched
from moezoo.core.data.source_files import JSON_LINES, SourceFile, find_files, find_texts, suffix_of
from moezoo.core.data.splits import WHOLE, Split, SplitSource, check_length
from moezoo.core.data.text_files import objects_of
from moezoo.core.data.token_shards import Tokens
from moezoo.core.data.token_store import Texts, characters_of, open_shards, tokenize
from moezoo.core.data.tokenizer_files import tokenizer_folder
from moezoo.core.data.tokenizers import (
    ByteTokenizer,
    CharacterTokenizer,
    TokenIds,
    Tokenizer,
)
from moezoo.core.errors import DataError, TokenizerError, shortened
from moezoo.core.progress import Message, Progress

_MOST_TEXT_BYTES = 64_000_000  # a few seconds


AnySplit = Split | PackedSplit | PrebatchedSplit
"""A split of any kind of sources: their sequences by step, and for evaluation."""


@dataclass(frozen=True)
class SourceSummary:
    """Summary of a source for the console.

    Fields:
        key: of the source in the config.
        source: path, or name of the dataset.
        train_tokens: number of tokens in the training split.
        validation_tokens: number of tokens in the validation split.
        share: part of the training sequences that are from this source.
        digest: changes with the tokens (`Tokens.digest`).
        packing: with `documents: separate`, words about the documents and the padding of their sequences.
        padding: share of padding in the training sequences.
    """

    key: str
    source: str
    train_tokens: int
    validation_tokens: int
    share: float
    digest: str
    packing: str = ""
    padding: float = 0.0

    def describe(self, tokens: int) -> str:
        """Describe the source in a run that trains on `tokens` tokens of all sources."""
        if not self.train_tokens:
            return f"{self.source}: {self.validation_tokens:,} validation tokens{self.packing}"
        epochs = tokens * self.share * (1 - self.padding) / self.train_tokens
        return (
            f"{self.source}: {self.train_tokens:,} training and {self.validation_tokens:,} validation tokens"
            f"{self.packing}, {100 * self.share:.3g} % of the batches, {epochs:,.{2 if epochs >= 0.1 else 4}f} epochs"
        )


@dataclass(frozen=True)
class PreparedData:
    """Data of a run: tokenizer, training and validation split, and a summary of each source."""

    tokenizer: Tokenizer
    train: AnySplit
    validation: AnySplit
    summary: tuple[SourceSummary, ...]


def prepare_data(
    data: DataConfig,
    sequence_length: int,
    *,
    where: str = "config",
    tokenizer: Tokenizer | None = None,
    on_progress: Progress | None = None,
    on_message: Message = warnings.warn,
) -> PreparedData:
    """Find the sources, create the tokenizer, tokenize text that is not cached, and split each source.

    The last floor(`validation_fraction` * tokens) tokens of each source are held out, or nothing if `validation` has
    sources of its own; `open_prebatched` splits prebatched data. Text is read in chunks, never whole.

    Args:
        data: the `data` section of the config.
        sequence_length: minimum length of each split, less 1.
        where: name of the config in errors.
        tokenizer: of a resumed run or trained model, used instead of a new one.
        on_progress: called with bytes.
        on_message: called with a line about each damaged entry of the token cache, which is made again.

    Raises DataError: a file that is missing, unreadable, damaged or not UTF-8, a split shorter than
    `sequence_length` + 1 tokens, a token id outside the vocabulary. Raises TokenizerError.
    """
    found_sources = find_sources(data, where)
    tokenizer = tokenizer or make_tokenizer(data, found_sources, where, on_progress, on_message)
    if isinstance(data.sources[0], BatchesSource):
        return _prepare_prebatched(data.sources[0], tokenizer, where, on_progress, on_message)
    if data.documents == "separate":
        return _prepare_packed(data, found_sources, tokenizer, sequence_length, on_progress, on_message)
    num_sources, has_own = len(data.sources), data.validation is not None
    sources = (*data.sources, *(data.validation or ()))
    tokens = [open_source(found, tokenizer, on_progress, on_message) for found in found_sources]
    fraction = 0.0 if has_own else data.validation_fraction
    held_out = [int(len(one) * fraction) if k < num_sources else len(one) for k, one in enumerate(tokens)]
    num_train = [len(one) - held for one, held in zip(tokens, held_out, strict=True)]
    given = [getattr(source, "weight", None) for source in sources]
    weights = [num if weight is None else weight for weight, num in zip(given, num_train, strict=True)]
    train, validation, summary = [], [], []
    rows = zip(sources, found_sources, tokens, num_train, held_out, weights, strict=True)
    for k, (source, found, one, num, held, weight) in enumerate(rows):
        if k < num_sources:
            train.append(SplitSource(found.name, one, 0, num, weight))
        if k >= num_sources or not has_own:
            validation.append(SplitSource(found.name, one, num, held, weight))
        key, shown = found.name.partition(" ")[0], source_path(source)
        summary.append(SourceSummary(key, shown, num, held, weight / (sum(weights) or 1.0), one.digest()))
    splits = Split("training", tuple(train)), Split("validation", tuple(validation))
    for split in splits:
        for part in split.sources:
            check_length(split.name, part, sequence_length, f"; {where}")
    return PreparedData(tokenizer, *splits, tuple(summary))


def tokenizer_on_this_machine(data: DataConfig, where: str) -> Tokenizer | None:
    """Return the tokenizer of a config, if that takes no download and at most a few seconds; None if not.

    A Hugging Face tokenizer is opened from a folder or the hub's cache; a character tokenizer is made from up to 64 MB
    of local text. Raises TokenizerError or DataError: a file is there, but damaged.
    """
    if isinstance(data.tokenizer, HuggingFaceTokenizerSpec):
        try:
            folder = tokenizer_folder(data.tokenizer.path, ask=False)
        except TokenizerError:
            return None
        return HuggingFaceTokenizer(str(folder))
    try:
        found = find_sources(data, where)
    except DataError:
        return None
    files = [file for each in found for file in each.files]
    if not all(isinstance(each, Texts) for each in found) or any(file.filesystem is not None for file in files):
        return None
    if sum(file.size or 0 for file in files) > _MOST_TEXT_BYTES:
        return None
    return make_tokenizer(data, found, where, None, warnings.warn)


def whole_file(
    path: str,
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    on_message: Message = warnings.warn,
    documents: Literal["windows", "separate"] = "windows",
) -> Split | PackedSplit:
    """Open a whole file as a split: token ids (`.npy`, `.bin`), JSON lines (`.jsonl`, ...), or text.

    JSON lines are conversations, of which the assistant's turns are targets, if the first one is; else texts in the
    field `text`. With `documents: separate` they are packed; token ids, which have no borders, are not. Suffixes may be
    in any case. `vocab_size` is that of the model. `on_message` and errors are those of `prepare_data`.
    """
    suffix, name = suffix_of(path), shortened(path)
    if suffix in (".npy", ".bin"):
        tokens = open_shards(find_files(path, (suffix,), name), vocab_size, name, None, on_message)
    else:
        is_lines = suffix in JSON_LINES
        files = find_files(path, JSON_LINES, name) if is_lines else find_texts(path, name)
        found: FoundSource = Texts(name, files, "text" if is_lines else None)
        if is_lines and _has_conversations(files):
            found = Conversations(name, files, "assistant")
        tokens = open_source(found, tokenizer, None, on_message, separate=documents == "separate")
        if documents == "separate":
            return PackedSplit(WHOLE, (all_documents(name, tokens, tokens.find(tokenizer.vocab_size)),))
    return Split(WHOLE, (SplitSource(name, tokens, 0, len(tokens), 1.0),))


def _has_conversations(files: Sequence[SourceFile]) -> bool:
    """Return whether the first line of the files is a conversation."""
    values = (value for file in files for _, value in objects_of(file, lambda count: None))
    return is_conversation(next(values, {}))


@dataclass(frozen=True)
class Shards:
    """Files of token shards, not opened yet; empty for a prebatched source, which finds its own file."""

    name: str
    files: tuple[SourceFile, ...]


FoundSource = Texts | Conversations | Shards
"""Files of a source, not read yet."""


def find_sources(data: DataConfig, where: str) -> list[FoundSource]:
    """Find the files of `data.sources`, then of `data.validation`. Raises DataError."""
    found = [_find(source, f"data.sources[{k}]", where) for k, source in enumerate(data.sources)]
    return found + [_find(source, f"data.validation[{k}]", where) for k, source in enumerate(data.validation or ())]


def source_path(source: SourceSpec) -> str:
    """Return the path of a source, or the name of a dataset."""
    return source.name if isinstance(source, DatasetSource) else source.path


def _find(source: SourceSpec, key: str, where: str) -> FoundSource:
    match source:
        case TextSource():
            name = f"{key} ({shortened(source.path)})"
            return Texts(name, find_texts(source.path, f"{key}.path ({where})"))
        case JSONLSource():
            name = f"{key} ({shortened(source.path)})"
            return Texts(name, find_files(source.path, JSON_LINES, f"{key}.path ({where})"), source.field)
        case ChatSource():
            name = f"{key} ({shortened(source.path)})"
            return Conversations(name, find_files(source.path, JSON_LINES, f"{key}.path ({where})"), source.loss)
        case DatasetSource():
            from moezoo.core.data.datasets import dataset_path

            path = str(dataset_path(source.name))
            return Texts(f"{key} ({source.name})", find_files(path, (".txt",), f"{key}.name ({where})"))
        case BatchesSource():
            return Shards(f"{key} ({shortened(source.path)})", ())
        case TokenShardsSource():
            name = f"{key} ({shortened(source.path)})"
            return Shards(name, find_files(source.path, (".npy", ".bin"), f"{key}.path ({where})"))
        case _:
            assert_never(source)


def make_tokenizer(
    data: DataConfig,
    found_sources: Sequence[FoundSource],
    where: str,
    on_progress: Progress | None,
    on_message: Message,
) -> Tokenizer:
    """Make the tokenizer of a config; a character tokenizer reads the sources. Raises DataError, TokenizerError."""
    match data.tokenizer:
        case ByteTokenizerSpec():
            return ByteTokenizer()
        case HuggingFaceTokenizerSpec():
            return HuggingFaceTokenizer(data.tokenizer.path)
        case TokenIdsSpec():
            return TokenIds(data.tokenizer.vocab_size)
        case CharacterTokenizerSpec():
            characters: set[str] = set()
            for found in found_sources:
                if isinstance(found, Conversations):
                    raise DataError(
                        f"{found.name} has conversations, which need a tokenizer with a chat template; got a character "
                        f"tokenizer; data.tokenizer ({where}). Use {{kind: huggingface, path: FOLDER}}."
                    )
                if isinstance(found, Shards):
                    raise DataError(
                        f"{found.name} has token ids, not text; got a character tokenizer; expected the tokenizer that "
                        f"made the ids; data.tokenizer ({where}). Use {{kind: ids, vocab_size: N}}, or that tokenizer."
                    )
                characters |= characters_of(found, on_progress, on_message)
            if not characters:
                raise DataError(
                    f"the sources have no text; got 0 characters; expected at least 1; data.sources ({where}). "
                    "Check the files."
                )
            return CharacterTokenizer("".join(characters))
        case _:
            assert_never(data.tokenizer)


def _prepare_packed(
    data: DataConfig,
    found_sources: Sequence[FoundSource],
    tokenizer: Tokenizer,
    sequence_length: int,
    on_progress: Progress | None,
    on_message: Message,
) -> PreparedData:
    train, validation, summary = [], [], []
    for k, (source, found) in enumerate(zip((*data.sources, *(data.validation or ())), found_sources, strict=True)):
        tokens = open_source(found, tokenizer, on_progress, on_message, separate=True)
        own, held = all_documents(found.name, tokens, tokens.find(tokenizer.vocab_size)), None
        if k >= len(data.sources):
            own, held = own.part(0), own
        elif data.validation is None:
            own, held = divided(own, data.validation_fraction)
        weight = getattr(source, "weight", None)
        own = own if weight is None else replace(own, weight=weight)
        train += [own] * (k < len(data.sources))
        validation += [] if held is None else [held]
        padding = own.padding(sequence_length)
        packing = f" in {len(own.start):,} and {0 if held is None else len(held.start):,} documents"
        if own.num_tokens:
            packing += f", packed with {100 * padding:.3g} % padding"
        counts = own.num_tokens, 0 if held is None else held.num_tokens
        key = found.name.partition(" ")[0]
        summary.append(SourceSummary(key, source_path(source), *counts, own.weight, tokens.digest(), packing, padding))
    total = sum(row.share for row in summary)
    summary = [replace(row, share=row.share / total) for row in summary]
    splits = PackedSplit("training", tuple(train)), PackedSplit("validation", tuple(validation))
    return PreparedData(tokenizer, *splits, tuple(summary))


def _prepare_prebatched(
    source: BatchesSource, tokenizer: Tokenizer, where: str, on_progress: Progress | None, on_message: Message
) -> PreparedData:
    name, key = f"data.sources[0] ({shortened(source.path)})", f"data.sources[0].path ({where})"
    train, validation = open_prebatched(source, tokenizer.vocab_size, name, key, on_progress, on_message)
    summary = SourceSummary(
        "data.sources[0]", source.path, train.num_tokens, validation.num_tokens, 1.0, train.digest()
    )
    return PreparedData(tokenizer, train, validation, (summary,))


def open_source(
    found: FoundSource,
    tokenizer: Tokenizer,
    on_progress: Progress | None,
    on_message: Message,
    *,
    separate: bool = False,
) -> Tokens:
    """Open the tokens of a source, tokenized if they are not in the token cache. Raises DataError, TokenizerError.

    `separate`: the id `vocab_size`, which is no token, follows each document.
    """
    if isinstance(found, Shards):
        return open_shards(found.files, tokenizer.vocab_size, found.name, on_progress, on_message)
    if isinstance(found, Conversations):
        return tokenize_conversations(found, tokenizer, on_progress, on_message, separate=separate)
    return tokenize(found, tokenizer, on_progress, on_message, separate=separate)
