"""Conversations of JSON lines as token ids, in which the tokens that are not trained on are marked.

One conversation is one document: what the tokenizer's chat template writes, and nothing else, so that a trained model
sees what `generate --chat` gives it. Writing: writings/chat_data.md.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import numpy as np

from moezoo.core.data.chat_turns import is_trained
from moezoo.core.data.encode_text import encode_pieces
from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.data.source_files import SourceFile
from moezoo.core.data.text_files import objects_of, text_in
from moezoo.core.data.token_cache import cached_tokens, files_key
from moezoo.core.data.token_shards import Tokens
from moezoo.core.data.token_store import byte_counter
from moezoo.core.data.tokenizers import Ids, Tokenizer, with_first_tokens
from moezoo.core.errors import DataError, TokenizerError, nearest, shown
from moezoo.core.progress import Message, Progress
from moezoo.core.tokens import masked

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_RULES = 2  # of what is trained on, and of this code: part of every key


@dataclass(frozen=True)
class Conversations:
    """Files of conversations, and which tokens of them are trained on. `name` is for errors and progress."""

    name: str
    files: tuple[SourceFile, ...]
    loss: Literal["assistant", "last", "all"]


def tokenize_conversations(
    source: Conversations,
    tokenizer: Tokenizer,
    on_progress: Progress | None,
    on_message: Message,
    *,
    separate: bool = False,
) -> Tokens:
    """Return the marked ids of all conversations from the cache; render and cache them if they are not there.

    With `separate`, the id `vocab_size`, which is no token, follows each conversation, as in `token_store.tokenize`.

    Raises DataError with file and line: no JSON object, no conversation, one that cannot be rendered.
    """
    checked = _with_template(tokenizer, source.name)
    key = {
        "kind": "separate conversations" if separate else "conversations",
        "rules": _RULES,
        "files": files_key(source.files),
        "loss": source.loss,
        "tokenizer": [tokenizer.content_hash, tokenizer.vocab_size],
        "template": [checked.chat_template, checked.special_tokens],
        "libraries": [version("tokenizers"), version("jinja2")],
    }
    border = np.array([tokenizer.vocab_size] * separate, np.int32)
    count = byte_counter(f"rendering {source.name}", source.files, on_progress)
    shards = cached_tokens(
        key,
        lambda: (np.append(ids, border) for _, ids in conversations(source, checked, count)),
        "<i4",
        source.name,
        on_progress,
        on_message,
    )
    return Tokens(shards, tokenizer.vocab_size + separate, source.name, marked=True)


def conversations(
    source: Conversations, tokenizer: Tokenizer, on_bytes: Callable[[int], None]
) -> Iterator[tuple[str, Ids]]:
    """Yield the place (file and line) and the marked ids of each conversation. Raises DataError."""
    checked = _with_template(tokenizer, source.name)
    for file in source.files:
        for where, value in objects_of(file, on_bytes):
            try:
                ids = _encode(value, source.loss, checked, where)
            except TokenizerError as error:
                raise DataError(
                    f"conversation cannot be rendered; got {str(error).rstrip('.')}; expected one that the chat "
                    f"template writes; {where}. Fix or remove the line, or fix the template ({checked.path})."
                ) from error
            if len(ids):
                yield where, ids


def is_conversation(value: Mapping[str, Any]) -> bool:
    """Return True for an object that is a conversation, and False for one that has a text."""
    return "messages" in value or "completion" in value


def _with_template(tokenizer: Tokenizer, name: str) -> HuggingFaceTokenizer:
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise DataError(
            f"{name} has conversations, which need a tokenizer with a chat template; got a tokenizer of kind "
            f"{tokenizer.kind}. Use data.tokenizer: {{kind: huggingface, path: FOLDER}}, with the folder of the model."
        )
    return tokenizer


def _encode(value: Mapping[str, Any], loss: str, tokenizer: HuggingFaceTokenizer, where: str) -> Ids:
    """Return the marked ids of a line. Raises DataError, and TokenizerError with the cause alone."""
    if "messages" in value:
        messages, tools = value["messages"], value.get("tools")
    elif "prompt" in value and "completion" in value:
        messages, tools = _pair(value["prompt"], value["completion"], where), value.get("tools")
        if not tokenizer.chat_template and isinstance(value["prompt"], str):
            return _encode_plain(value["prompt"], value["completion"], loss, tokenizer, where)
    elif "text" in value:
        text = text_in(dict(value), "text", where)
        ids = _encode_text(text, tokenizer, where) if text else np.empty(0, np.int32)
        return np.concatenate([ids, _end(tokenizer)]) if text else ids
    else:
        raise DataError(
            f"line is no conversation; got the keys {sorted(value)!s:.200}; expected messages, prompt and completion, "
            f"or text; {where}. Fix the file."
        )
    _check_messages(messages, loss, where)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"tools are no list of objects; got {shown(tools)}; {where}. Fix the file.")
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer has no chat template, which conversations need; got {tokenizer.path}; expected "
            f"chat_template.jinja, or chat_template in its tokenizer_config.json; {where}. Use the tokenizer of the "
            "chat model, or lines with prompt and completion."
        )
    return tokenizer.encode_turns(messages, tools or None, loss)  # type: ignore[arg-type]


def _pair(prompt: Any, completion: Any, where: str) -> list[Any]:
    """Return the messages of a prompt and its completion: texts, or lists of messages."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and isinstance(completion, list):
        return [*prompt, *completion]
    raise DataError(
        f"prompt and completion are not both texts, or both lists of messages; got {type(prompt).__name__} and "
        f"{type(completion).__name__}; {where}. Fix the file."
    )


def _check_messages(messages: Any, loss: str, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"conversation has no messages; got {shown(messages)}; expected a list of objects with role and content; "
            f"{where}. Fix or remove the line."
        )
    for number, message in enumerate(messages, start=1):
        place = f"message {number} of {where}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            got = f"the keys {sorted(message)!s:.200}" if isinstance(message, dict) else type(message).__name__
            raise DataError(f"message has no role; got {got}; expected role and content; {place}. Fix the file.")
        if message["role"] not in ROLES:
            raise DataError(
                f"message has an unknown role; got {message['role']!r:.80}; expected one of {', '.join(ROLES)}"
                f"{nearest(message['role'], ROLES)}; {place}. Fix the file."
            )
        content = message.get("content")
        if isinstance(content, str):
            text_in(message, "content", place)
        elif not isinstance(content, list) and not message.get("tool_calls"):
            raise DataError(
                f"message has no content; got {shown(content)}; expected a text, a list of parts, or tool_calls; "
                f"{place}. Fix the file."
            )
        for field, allowed in (("train", "true or false"), ("weight", "1 or 0")):
            if message.get(field) not in (None, True, False):
                raise DataError(
                    f"{field} of a message is {shown(message[field])}; expected {allowed}; {place}. Fix the file."
                )
    if loss != "all" and not any(message["role"] == "assistant" and is_trained(message) for message in messages):
        raise DataError(
            f"conversation has no turn of the assistant, so nothing to train on; got the roles "
            f"{', '.join(message['role'] for message in messages)!s:.200}; {where}. Remove the line, or use loss: all."
        )


def _encode_plain(prompt: str, completion: str, loss: str, tokenizer: HuggingFaceTokenizer, where: str) -> Ids:
    """Return the marked ids of a prompt and its completion for a tokenizer without a chat template.

    They are the ids of the joined text if these begin with those of the prompt, which is what generation is given;
    else those of the completion follow those of the prompt.
    """
    before, whole = (_encode_text(text, tokenizer, where) for text in (prompt, prompt + completion))
    if not np.array_equal(whole[: len(before)], before):
        whole = np.concatenate([before, tokenizer.encode(completion, where=where)])
    ids = np.concatenate([whole, _end(tokenizer)])
    return masked(ids, (np.arange(len(ids)) >= len(before)) | (loss == "all"))


def _encode_text(text: str, tokenizer: HuggingFaceTokenizer, where: str) -> Ids:
    """Return the ids of a text after the tokenizer's first tokens."""
    pieces: Sequence[Ids] = list(encode_pieces([text], tokenizer, where))
    return with_first_tokens(np.concatenate([np.empty(0, np.int32), *pieces]), tokenizer)


def _end(tokenizer: HuggingFaceTokenizer) -> Ids:
    return np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], np.int32)
