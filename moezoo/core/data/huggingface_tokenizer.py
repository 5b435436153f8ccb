"""Tokenizers of Hugging Face folders and of the Hugging Face Hub."""

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moezoo.core.data.chat_template import Message, render_chat, render_turns
from moezoo.core.data.token_bytes import token_bytes
from moezoo.core.data.tokenizer_difference import difference
from moezoo.core.data.tokenizer_files import first_tokens, load_with_transformers, tokenizer_files
from moezoo.core.data.tokenizer_rules import first_line, library_errors
from moezoo.core.data.tokenizers import (
    MAX_FILE_BYTES,
    TOKENIZER_FOLDER,
    Flags,
    Ids,
    IdsLike,
    Tokenizer,
    check_ids,
    encode_utf8,
    hash_of,
    save_json,
    tokenizer_file,
)
from moezoo.core.errors import TokenizerError, shown
from moezoo.core.files import make_folder, read_bounded, write_atomically
from moezoo.core.limited_process import LimitedProcessError
from moezoo.core.tokens import masked

_TEMPLATE_ERRORS = (LimitedProcessError, ValueError, TypeError, RecursionError)
"""An error in a template or its process; no default among several templates; messages that are not JSON."""


class HuggingFaceTokenizer:
    """A tokenizer of a Hugging Face folder or hub id, by the rules of its tokenizer.json.

    `encode` adds no special tokens (`first_tokens` are added once per document, by its callers); one that occurs in the
    text (`<|endoftext|>`) is encoded as its id. Ids >= `vocab_size`, which models with a padded vocabulary have, decode
    to nothing.
    """

    kind = "huggingface"

    def __init__(self, path: str) -> None:
        """Load from `path`: a folder with the tokenizer's files, or a hub id. Raises TokenizerError."""
        self.path = str(path)
        self._loaded = load_with_transformers(self.path)
        self._inner = self._loaded.inner
        self.vocab_size = max(self._inner.get_vocab().values()) + 1  # len() is smaller if ids have gaps
        eos = self._inner.eos_token_id
        self.end_of_text: int | None = None if eos is None else int(eos)
        self.beginning_of_text: int | None = self._inner.bos_token_id  # which not every tokenizer puts first
        self.padding: int | None = self._inner.pad_token_id
        self.chat_template: str | dict[str, str] | None = self._inner.chat_template

    @cached_property
    def difference(self) -> str | None:
        """One line on what transformers would encode otherwise than tokenizer.json says; None if nothing."""
        return difference(self._loaded)

    @cached_property
    def content_hash(self) -> str:
        """Hash of the `tokenizers` library's serialization, and of what it lacks. Spec: Tokenizer."""
        inner = self._inner.backend_tokenizer
        more = [self.end_of_text, self.first_tokens, bool(inner.encode_special_tokens)]
        return hash_of([self.kind, inner.to_str(), *more])

    def encode(self, text: str, *, where: str = "prompt") -> Ids:
        """Spec: Tokenizer.encode."""
        encode_utf8(text, where)
        return self._encode(text, where)

    def _encode(self, text: str, where: str) -> Ids:
        backend = self._inner.backend_tokenizer
        try:
            with library_errors(f"encode the {where}", self.path):
                return np.array(backend.encode(text, add_special_tokens=False).ids, np.int32)
        except TokenizerError as error:
            if "Missing [UNK]" not in str(error):
                raise
            unknown = sorted({character for character in text if backend.token_to_id(character) is None})
            raise TokenizerError(
                f"{where} has characters outside the tokenizer's vocabulary; got "
                f"{', '.join(map(repr, unknown[:20]))} ({self.path}). Remove them."
            ) from None

    @property
    def special_tokens(self) -> dict[str, Any]:
        """The tokens that a chat template sees by name: `bos_token`, `eos_token`, ..."""
        return dict(self._inner.special_tokens_map)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens, which transformers' `skip_special_tokens` leaves out of a text."""
        return frozenset(index for index, token in self._inner.added_tokens_decoder.items() if token.special)

    @cached_property
    def first_tokens(self) -> tuple[int, ...]:
        """Spec: Tokenizer.first_tokens."""
        return first_tokens(self._inner.backend_tokenizer)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        *,
        generation_prompt: bool = True,
    ) -> Ids:
        """Encode a conversation with the tokenizer's chat template, including the generation prompt.

        Arguments and errors: as `chat_text`. Only special tokens of the template are used; none is added.
        """
        return self._encode(self.chat_text(messages, variables, generation_prompt=generation_prompt), "conversation")

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        *,
        generation_prompt: bool = True,
    ) -> str:
        """Return the text of a conversation by the tokenizer's chat template.

        `messages`: mappings as in transformers; the template sees `role`, `content` (text, a list of parts, or none
        beside `tool_calls`) and the other fields. `variables`: what it sees beside them, `{"enable_thinking": False}`
        for instance. `generation_prompt`: see `render_chat`.

        Raises TokenizerError: no chat template, or an error in the template for these messages.
        """
        is_list = isinstance(messages, Sequence) and len(messages) > 0
        if not is_list or not all(isinstance(message, Mapping) for message in messages):
            raise TokenizerError(
                f"a conversation is no list of messages; got {shown(messages)}; expected one or more mappings with a "
                "role and content."
            )
        for message in messages:
            if isinstance(content := message.get("content"), str):
                encode_utf8(content, "prompt")
        if not self.chat_template:
            raise TokenizerError(
                f"the tokenizer has no chat template; got {self.path}; expected chat_template.jinja, or chat_template "
                "in its tokenizer_config.json. Prompt without chat, or use the folder of the chat model."
            )
        try:
            template = self._inner.get_chat_template()
            given = {**self.special_tokens, **(variables or {})}
            text = render_chat(template, messages, given, generation_prompt=generation_prompt)
        except _TEMPLATE_ERRORS as error:
            raise TokenizerError(
                f"the chat template cannot be applied; got {first_line(error):.300} ({self.path}); expected a template "
                "for roles system, user and assistant. Prompt without chat, or fix the template."
            ) from error
        encode_utf8(text, "chat template")  # a template can write half of a surrogate pair
        return text

    def encode_turns(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, loss: Literal["assistant", "last", "all"]
    ) -> Ids:
        """Encode a whole conversation with the chat template; tokens that are not trained on are marked.

        `loss`: the assistant's turns are trained on, the last of them, or all tokens. See `core.tokens.masked`.

        Raises TokenizerError with the cause alone: the template cannot be applied, leaves something out, a turn cannot
        be found, or a turn's border is inside a token.
        """
        try:
            template = self._inner.get_chat_template(tools=tools)
            text, turns = render_turns(template, messages, tools, self.special_tokens, loss)
        except _TEMPLATE_ERRORS as error:
            raise TokenizerError(first_line(error)[:300]) from error
        encode_utf8(text, "chat template")
        ids = self._encode(text, "conversation")
        trained, num_before = np.zeros(len(ids), np.bool_), self._num_before(text, ids, turns)
        for start, end in turns:
            trained[num_before[start] : num_before[end]] = True
        return masked(ids, trained)

    def _num_before(self, text: str, ids: Ids, turns: Sequence[tuple[int, int]]) -> dict[int, int]:
        """Return the number of ids before each border of turns: those of the text up to it begin those of the text."""
        borders = sorted({0, len(text), *(border for turn in turns for border in turn)})
        parts = [self._encode(text[start:end], "conversation") for start, end in itertools.pairwise(borders)]
        if np.array_equal(np.concatenate([*parts, ids[:0]]), ids):
            return dict(zip(borders, itertools.accumulate(map(len, parts), initial=0), strict=True))
        # A tokenizer that begins every text with a space has other ids for the parts.
        return {border: self._num_up_to(text, border, ids) for border in borders}

    def _num_up_to(self, text: str, end: int, ids: Ids) -> int:
        before = self._encode(text[:end], "conversation")
        if not np.array_equal(ids[: len(before)], before):
            raise TokenizerError(f"a turn's border is inside a token, at {text[max(0, end - 12) : end + 12]!r}")
        return len(before)

    def decode(self, ids: IdsLike) -> str:
        """Spec: Tokenizer.decode. Special tokens are included; ids >= vocab_size are skipped."""
        known = self._known(ids).tolist()
        with library_errors("decode these ids", self.path):
            return str(self._inner.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def byte_count(self, ids: IdsLike, begins: Flags | None = None) -> int:
        """Spec: Tokenizer.byte_count. Special tokens and ids >= vocab_size count as 0 bytes: see `token_bytes`."""
        array = np.asarray(ids).reshape(-1)
        first = np.arange(len(array)) == 0 if begins is None else begins
        return int(self._bytes_of[first[array < self.vocab_size].astype(np.intp), self._known(array)].sum())

    def _known(self, ids: IdsLike) -> npt.NDArray[np.integer[Any]]:
        array = np.asarray(ids).reshape(-1)
        return check_ids(array[array < self.vocab_size], self)

    @cached_property
    def _bytes_of(self) -> npt.NDArray[np.int64]:
        return token_bytes(self._inner.backend_tokenizer, self._inner.added_tokens_decoder)

    def to_dict(self) -> dict[str, Any]:
        """Spec: Tokenizer.to_dict. `path` is the origin; a saved tokenizer is loaded from `tokenizer/`."""
        return {"kind": self.kind, "path": self.path}

    def save(self, path: str | Path) -> None:
        """Spec: Tokenizer.save. The files of the Hugging Face tokenizer are saved to `tokenizer/`."""
        folder = tokenizer_file(path).parent / TOKENIZER_FOLDER
        if folder.absolute() == Path(self.path).absolute() and tokenizer_file(path).is_file():
            return  # loaded from this run folder: a kill while it is overwritten would damage it
        for name, content in self.files().items():
            make_folder((folder / name).parent)
            write_atomically(folder / name, content)
        save_json(self, path)

    def files(self) -> dict[str, bytes]:
        """Spec: Tokenizer.files. They are copies, or converted ones if the folder had no tokenizer.json."""
        if self._loaded.folder is not None:
            own = tokenizer_files(self._loaded.folder)
            return {name: read_bounded(file, MAX_FILE_BYTES) for name, file in own.items()}
        with tempfile.TemporaryDirectory() as folder:
            self._inner.save_pretrained(folder)
            return {name: file.read_bytes() for name, file in tokenizer_files(Path(folder)).items()}


def with_template(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
    """Return a tokenizer that may have a chat template. Raises TokenizerError: it cannot have one."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer
    advice = "Add the model's tokenizer.json to its folder" if tokenizer.kind == "ids" else "Prompt without chat"
    raise TokenizerError(
        f"the tokenizer has no chat template; got a tokenizer of kind {tokenizer.kind}; expected a Hugging Face "
        f"tokenizer that has one. {advice}."
    )
