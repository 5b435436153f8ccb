"""Data of a trace: files, each with the name of its domain."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from moezoo.core.data.packed_split import PackedSplit
from moezoo.core.data.prebatched import PrebatchedSplit
from moezoo.core.data.prepare import AnySplit, whole_file
from moezoo.core.data.splits import Split
from moezoo.core.data.tokenizers import Tokenizer
from moezoo.core.progress import Message


@dataclass(frozen=True)
class TracedData:
    """Data to trace: a split, and the name of the domain of each of its sources."""

    domains: tuple[str, ...]
    split: AnySplit

    def limited(self, most: int) -> "TracedData":
        """Return the first tokens of each source, `most` at most; of prebatched data, whole batches."""
        match self.split:
            case Split():
                sources = (replace(each, num_tokens=min(each.num_tokens, most)) for each in self.split.sources)
                return replace(self, split=replace(self.split, sources=tuple(sources)))
            case PackedSplit():
                parts = []
                for source in self.split.sources:
                    count = int(np.searchsorted(np.cumsum(source.length), most)) + 1
                    part = source.part(count)
                    length = part.length.copy()
                    length[-1] -= max(0, int(length.sum()) - most)
                    kept = length > 1  # a document of one token has nothing to predict
                    parts.append(replace(part, start=part.start[kept], length=length[kept]))
                return replace(self, split=PackedSplit(self.split.name, tuple(parts)))
            case PrebatchedSplit():
                of_batch = self.split.num_tokens // self.split.steps
                return replace(self, split=replace(self.split, steps=max(1, min(self.split.steps, most // of_batch))))


def named_file(text: str) -> tuple[str, str]:
    """Return domain and path of `name=file`, or of a file, whose domain is its name without suffix."""
    name, equals, path = text.partition("=")
    if equals and name and "/" not in name and not Path(text).exists():
        return name, path
    return Path(text).name.partition(".")[0] or text, text


def traced_files(
    data: str | Path | Mapping[str, str | Path],
    tokenizer: Tokenizer,
    vocab_size: int,
    documents: Literal["windows", "separate"],
    *,
    on_message: Message = warnings.warn,
) -> list[TracedData]:
    """Open files (`data.prepare.whole_file`): one, or several by the name of their domain.

    Raises DataError: a file cannot be used.
    """
    files = dict([named_file(str(data))]) if isinstance(data, str | Path) else {**data}
    return [
        TracedData((name,), whole_file(str(path), tokenizer, vocab_size, on_message=on_message, documents=documents))
        for name, path in files.items()
    ]
