"""Positions of the assistant's turns in a rendered conversation, found by rendering it again, in a child process.

A template that marks what the assistant wrote (`{% generation %}`) says it itself. Any other is rendered with the
messages before a turn, whose generation prompt must be how the turn begins, and with the turn as the last one, for its
end. Text is never searched for: a user may write what a template writes. Writing: writings/chat_data.md.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moezoo.core.data.chat_template import GENERATION_TAG, Message, compiled, rendered

Turn = tuple[int, int]
"""Characters [start, end) of a rendered conversation that the assistant wrote."""

_NAME = os.urandom(16).hex()
_MARKS = f"<{_NAME}>", f"</{_NAME}>"
"""What no text can have."""

_Render = Callable[[Sequence[Message], bool], str]
"""Render messages, with or without the generation prompt."""


def turns_request(request: dict[str, Any]) -> dict[str, Any]:
    """Render a conversation and find its turns, in this process; see `chat_template.render_turns`.

    A content of null is left out, as transformers does; some templates ask for it beside tool calls (DeepSeek-V3).

    Raises ValueError: a turn cannot be found, or the template leaves something out.
    """
    messages = request["messages"]
    nulls = [{"content": None, **message} if message.get("tool_calls") else message for message in messages]
    try:
        return _turns(request, messages)
    except Exception:
        if nulls != messages:
            with contextlib.suppress(Exception):
                return _turns(request, nulls)
        raise


def _turns(request: dict[str, Any], messages: Sequence[Message]) -> dict[str, Any]:
    template, loss = request["template"], request["loss"]
    given = {"tools": request["tools"], **request["variables"]}

    def render(messages: Sequence[Message], prompt: bool) -> str:
        return rendered(compiled(template), messages, prompt, given)

    try:
        text = render(messages, False)
    except Exception as error:
        if all("content" in message for message in messages):
            raise
        raise ValueError(f'{error} (perhaps the template asks for content "" beside tool_calls)') from None
    _check_complete(render, messages, text)
    if given["tools"] is not None and rendered(compiled(template), messages, False, {**given, "tools": None}) == text:
        raise ValueError("the template leaves out the tools")
    if loss == "all":
        return {"text": text, "turns": [(0, len(text))]}
    spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [number for number, index in enumerate(spoken) if is_trained(messages[index])]
    chosen = trained[-1:] if loss == "last" else trained
    if re.search(GENERATION_TAG, template):
        turns = _marked_turns(template, messages, given, text)
        if len(turns) == len(spoken):
            return {"text": text, "turns": [turns[number] for number in chosen]}
        if len(trained) < len(spoken):
            raise ValueError(
                f"the template marks {len(turns)} parts as the assistant's, which has {len(spoken)} messages"
            )
        return {"text": text, "turns": turns[-1:] if loss == "last" else turns}
    return {"text": text, "turns": [_turn(render, messages, spoken[number], text) for number in chosen]}


def is_trained(message: Message) -> bool:
    """Return False for a message that says so: `"train": false` (axolotl) or `"weight": 0` (OpenAI's format)."""
    return message.get("train") in (None, True) and message.get("weight") in (None, 1)


def _check_complete(render: _Render, messages: Sequence[Message], text: str) -> None:
    """Check that the template writes what the messages say: some ignore tool calls, or roles that they do not know."""
    for index, message in enumerate(messages):
        content = message.get("content")
        given = content.strip() if isinstance(content, str) else ""
        if message["role"] in ("system", "developer", "user") and given not in text:
            raise ValueError(f"the template leaves out message {index + 1} ({message['role']})")
    if any(message.get("tool_calls") for message in messages):
        without = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        try:
            same = render(without, False) == text
        except Exception:  # a tool's answer needs its call: the template reads them
            same = False
        if same:
            raise ValueError("the template leaves out the tool calls")


def _marked_turns(template: str, messages: Sequence[Message], given: Mapping[str, Any], text: str) -> list[Turn]:
    """Return what the template's own markers enclose."""
    marked = rendered(compiled(template, _MARKS), messages, False, given)
    turns, plain, start = list[Turn](), "", 0
    for piece in re.split("(" + "|".join(map(re.escape, _MARKS)) + ")", marked):
        if piece == _MARKS[0]:
            start = len(plain)
        elif piece == _MARKS[1]:
            turns.append((start, len(plain)))
        else:
            plain += piece
    if plain != text:
        raise ValueError("the template changes what it marks as the assistant's")
    if not turns:
        raise ValueError("the template marks nothing as the assistant's")
    return turns


def _turn(render: _Render, messages: Sequence[Message], index: int, text: str) -> Turn:
    """Return where the turn of message `index` begins and ends."""
    before = _begun(render, messages, index)
    if not text.startswith(before):
        raise ValueError(
            f"message {index + 1} does not begin as a generated one: the template writes something else after its "
            "generation prompt"
        )
    end = len(text) if index == len(messages) - 1 else _end(render, messages, index, text, before)
    if end is None or end < len(before):
        raise ValueError(f"the end of message {index + 1} cannot be found: later messages change how it is written")
    return len(before), end


def _begun(render: _Render, messages: Sequence[Message], index: int) -> str:
    """Return what a model is given to generate message `index`: the messages before it and the generation prompt."""
    try:
        return render(messages[:index], True)
    except Exception as error:
        raise ValueError(
            f"the template cannot be applied to the messages before message {index + 1}: {error}"
        ) from None


def _end(render: _Render, messages: Sequence[Message], index: int, text: str, before: str) -> int | None:
    """Return the end of a turn that others follow: as the last one, it must be written in the same way.

    Some templates close the last turn with another token than earlier ones (gpt-oss), but not before a generation
    prompt. Others write more into the last turn, an empty reasoning (Qwen3): then two other texts are rendered in its
    place. What both have in common behind them is the end of the turn, and what follows.
    """
    last = render(messages[: index + 1], False)
    if text.startswith(last):
        return len(last)
    bare = render(messages[:index], False)
    if not before.startswith(bare):
        return None
    header = before[len(bare) :]

    def closed(messages: Sequence[Message]) -> str:
        """Render messages as before another answer, without that answer's generation prompt."""
        return render(messages, True).removesuffix(header)

    last = closed(messages[: index + 1])
    if text.startswith(last):
        return len(last)
    others = [{"role": "assistant", "content": content} for content in ("A", "B")]
    behind = _common_end(*(render([*messages[:index], other, *messages[index + 1 :]], False) for other in others))
    closing = _common_end(*(closed([*messages[:index], other]) for other in others))
    if not (behind.startswith(closing) and text.endswith(behind)):
        return None
    return len(text) - len(behind) + len(closing)


def _common_end(one: str, other: str) -> str:
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False))
    return one[len(one) - sum(1 for _ in equal) :]
