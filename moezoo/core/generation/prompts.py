"""Prompts: texts or conversations, from files and standard input."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moezoo.core.data.source_files import JSON_LINES, find_files, suffix_of
from moezoo.core.data.text_files import objects_of, text_in, text_of
from moezoo.core.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """A text to continue, or a conversation to answer: one of them.

    Fields:
        text: to continue; with a chat template, a user's message.
        messages: as in transformers: mappings with `role` and `content`.
    """

    text: str = ""
    messages: Sequence[Mapping[str, Any]] | None = None

    def conversation(self, system: str | None = None) -> list[Mapping[str, Any]]:
        """Return the messages, or the text as that of a user, after a system prompt unless there is one."""
        messages: list[Mapping[str, Any]]
        messages = [{"role": "user", "content": self.text}] if self.messages is None else list(self.messages)
        has_own = bool(messages) and isinstance(messages[0], Mapping) and messages[0].get("role") == "system"
        return messages if system is None or has_own else [{"role": "system", "content": system}, *messages]

    @property
    def title(self) -> str:
        """The text, or that of the last message, in one line of at most 60 characters."""
        last = self.messages[-1].get("content") if self.messages else None
        line = " ".join((self.text if self.messages is None else str(last or "")).split())
        return line if len(line) <= 60 else line[:57] + "..."


def read_prompts(path: str) -> list[Prompt]:
    """Read the prompts of a file: one a line, or JSON lines (`.jsonl`) with `prompt` or `messages` each.

    Empty lines are skipped. Raises DataError: not UTF-8 text, no prompts, a line without one, or conversations among
    texts.
    """
    (file,) = find_files(path, (".txt",), "--prompts")[:1]
    if suffix_of(path) in JSON_LINES:
        prompts = [_prompt_of(value, where) for where, value in objects_of(file, _ignore)]
    else:
        prompts = prompts_in("".join(text_of(file, _ignore)))
    if not prompts:
        raise DataError(f"file has no prompts; got {path}; expected one on each line. Give another file.")
    if len({prompt.messages is None for prompt in prompts}) == 2:
        raise DataError(f"file mixes prompt and messages; got {path}; expected one kind. Split it into two files.")
    return prompts


def prompts_in(text: str) -> list[Prompt]:
    """Return a prompt for each line of a text that is not blank."""
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [Prompt(line) for line in lines if line.strip()]


def _prompt_of(value: dict[str, Any], where: str) -> Prompt:
    if ("prompt" in value) == ("messages" in value):
        raise DataError(
            f"line is no prompt; got the keys {sorted(value)!s:.200}; expected `prompt`, a text, or `messages`, a "
            f"list; {where}. Fix the file."
        )
    if "prompt" in value:
        if not (text := text_in(value, "prompt", where)):
            raise DataError(f"prompt is empty; expected text to continue; {where}. Fix the file.")
        return Prompt(text)
    messages = value["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise DataError(
            f"messages is {type(messages).__name__}; expected a list of objects with role and content; {where}. Fix "
            "the file."
        )
    return Prompt(messages=messages)


def _ignore(_: int) -> None:
    pass
