"""The first examples of a data source, as they are trained on."""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moezoo.core.data.chat import Conversations, conversations
from moezoo.core.data.prepare import FoundSource, open_source
from moezoo.core.data.token_store import Texts
from moezoo.core.data.tokenizers import Ids, Tokenizer, with_first_tokens
from moezoo.core.tokens import tokens_of

_CHARACTERS, _TOKENS = 2000, 200  # of a text, of token ids


@dataclass(frozen=True)
class Example:
    """An example of a source.

    Fields:
        place: source, and file and line, for the user.
        ids: int32 [T], with those marked that are not trained on (`core.tokens.masked`).
    """

    place: str
    ids: Ids

    def parts(self, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
        """Return the text in parts that are trained on, or not."""
        runs = itertools.groupby(self.ids.tolist(), key=lambda marked: marked >= 0)
        return [(tokenizer.decode(tokens_of(np.array(list(run), np.int32))), trained) for trained, run in runs]


def first_examples(found: FoundSource, tokenizer: Tokenizer, count: int) -> Iterator[Example]:
    """Yield the first examples of a source: conversations, the beginnings of texts, or of token ids.

    Raises DataError and TokenizerError.
    """
    match found:
        case Conversations():
            for place, ids in itertools.islice(conversations(found, tokenizer, lambda count: None), count):
                yield Example(f"{found.name}: {place}", ids)
        case Texts():
            pieces = itertools.groupby(found.pieces(lambda count: None), key=lambda piece: piece is None)
            texts = (next((piece for piece in document if piece), "") for between, document in pieces if not between)
            for number, text in enumerate(itertools.islice(texts, count), start=1):
                ids = tokenizer.encode(text[:_CHARACTERS], where=found.name)
                yield Example(f"{found.name}: document {number}", with_first_tokens(ids, tokenizer)[:_TOKENS])
        case _ if found.files:
            tokens = open_source(found, tokenizer, None, warnings.warn)
            (ids,) = tokens.read(np.array([0]), min(_TOKENS, len(tokens)))
            yield Example(f"{found.name}: the first tokens", ids)
