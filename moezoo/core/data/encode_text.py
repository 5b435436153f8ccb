"""Encoding of text in pieces that fit into memory, with the token ids of the whole text.

A subword tokenizer is given pieces of about `CHUNK_BYTES` characters, cut where its tokens do not change. Each piece is
encoded after the end of the one before (its context), whose ids are then dropped: a tokenizer like Llama 2's puts `▁`
before every text that it is given, and so before every piece otherwise.
"""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from moezoo.core.data import source_files
from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.data.tokenizers import Ids, Tokenizer
from moezoo.core.errors import TokenizerError

_CONTEXT = 256  # characters before and after a cut that decide its tokens
_CONTEXTS = (256, 255, 253)  # a cut must be good for all: digits in groups of three depend on where the text begins
_TRIES = 32  # places of each kind at which a cut is tried
_FORCED = 16  # a text of so many chunks without a good place is cut anywhere


def encode_pieces(pieces: Iterable[str], tokenizer: Tokenizer, where: str) -> Iterator[Ids]:
    """Yield token ids of a text that is given in pieces; joined, they are `tokenizer.encode` of the joined pieces.

    Only a text of `_FORCED` chunks without any good place for a cut (a word of 16 MB) may have other tokens at a cut.
    `where` names the text in errors. Raises TokenizerError.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):  # one token per character or byte
        for piece in pieces:
            for part in _slices(piece):
                yield tokenizer.encode(part, where=where)
        return
    limit = source_files.CHUNK_BYTES
    context, held, size = "", list[str](), 0
    for part in itertools.chain.from_iterable(map(_slices, pieces)):
        held.append(part)
        size += len(part)
        if size < limit + _CONTEXT:
            continue
        text, held = "".join(held), []
        while len(text) >= limit + _CONTEXT and (cut := _good_cut(text, tokenizer, where)):
            yield _encode_after(context, text[:cut], tokenizer, where)
            context, text = text[max(0, cut - _CONTEXT) : cut], text[cut:]
        if len(text) >= _FORCED * (limit + _CONTEXT):
            yield _encode_after(context, text, tokenizer, where)
            context, text = "", ""
        held, size = [text], len(text)
    yield _encode_after(context, "".join(held), tokenizer, where)


def word_boundaries(text: str, mark: str, end: int) -> Iterator[int]:
    """Yield positions up to `end` where most tokenizers split, the last ones first: after a newline or before a space.

    There is no other white space beside the mark: the pre-tokenizers of GPT-2, Llama 3 and Qwen split there, but inside
    a run of white space it depends on the next character.
    """
    offset = 1 if mark == "\n" else 0
    at = min(end - offset, len(text) - 2) + 1
    while (at := text.rfind(mark, 1, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            yield at + offset


def _good_cut(text: str, tokenizer: Tokenizer, where: str) -> int:
    """Return a position where cutting does not change tokens, near the end of the first chunk if possible; 0 if none.

    There are `_CONTEXT` characters after it.
    """
    end = len(text) - _CONTEXT
    for candidates in (word_boundaries(text, "\n", end), word_boundaries(text, " ", end), range(end, 0, -1)):
        for cut in itertools.islice(candidates, _TRIES):
            if _is_good(text, cut, tokenizer, where):
                return cut
    return 0


def _is_good(text: str, cut: int, tokenizer: Tokenizer, where: str) -> bool:
    """Return whether the tokens before a cut are the same with and without the text behind it."""
    after = text[cut : cut + _CONTEXT]
    for length in _CONTEXTS:
        before = text[max(0, cut - length) : cut]
        alone = tokenizer.encode(before, where=where)
        if not np.array_equal(tokenizer.encode(before + after, where=where)[: len(alone)], alone):
            return False
    return True


def _encode_after(context: str, text: str, tokenizer: Tokenizer, where: str) -> Ids:
    """Encode a text without the ids of the context before it."""
    if not context:
        return tokenizer.encode(text, where=where)
    before = tokenizer.encode(context, where=where)
    ids = tokenizer.encode(context + text, where=where)
    if not np.array_equal(ids[: len(before)], before):
        raise TokenizerError(
            f"{where} cannot be encoded in pieces: the tokens of {context[-40:]!r} depend on text more than {_CONTEXT} "
            "characters later. Split the text into shorter documents (JSON lines), or use another tokenizer."
        )
    return ids[len(before) :]


def _slices(text: str) -> Iterator[str]:
    size = source_files.CHUNK_BYTES
    return (text[start : start + size] for start in range(0, len(text), size))
