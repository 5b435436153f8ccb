"""Chat templates, rendered in a child process with limits: a template is a program of whoever published the checkpoint.

Jinja's sandbox keeps a template from files and from Python's internals, but bounds neither its time nor its memory.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from moezoo.core.limited_process import LimitedProcess

Message = Mapping[str, Any]
"""A message as in transformers: `role`, `content` (text, a list of parts, or none) and other fields."""

GENERATION_TAG = r"\{%-?\s*generation\s*-?%\}"
"""Regular expression of the tag with which a template marks what an assistant wrote."""

_MAX_CHARACTERS = 50_000_000
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render_chat(
    template: str, messages: Sequence[Message], variables: Mapping[str, Any], *, generation_prompt: bool = True
) -> str:
    """Return the text of a conversation with the generation prompt, as transformers' `apply_chat_template` renders it.

    `variables`: what the template sees beside the messages, such as the special tokens. `generation_prompt`: end with
    what comes before an answer.

    Raises LimitedProcessError: an error in the template, or more than 5 s or 256 MiB.
    """
    request = {"template": template, "messages": [*map(_plain, messages)], "variables": variables}
    return str(_process().call({**request, "generation_prompt": generation_prompt}))


def render_turns(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    variables: Mapping[str, Any],
    loss: Literal["assistant", "last", "all"],
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a whole conversation, and the characters [start, end) of it to train on.

    These are the assistant's turns, the last of them, or all. See `chat_turns`.

    Raises LimitedProcessError: an error in the template, a turn that cannot be found, something that the template
    leaves out, or more than 5 s or 256 MiB.
    """
    request = {"template": template, "messages": [*map(_plain, messages)], "tools": tools, "variables": variables}
    found = _turns_process().call({**request, "loss": loss})
    return str(found["text"]), [(int(start), int(end)) for start, end in found["turns"]]


@functools.cache
def _process() -> LimitedProcess:
    return LimitedProcess("moezoo.core.data.chat_template:render_request")


@functools.cache
def _turns_process() -> LimitedProcess:
    return LimitedProcess("moezoo.core.data.chat_turns:turns_request")


def _plain(message: Message) -> dict[str, Any]:
    """Return a message without empty fields, and with its reasoning under the names that templates read."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


# --- in the child ----------------------------------------------------------------------------------------------------


def render_request(request: dict[str, Any]) -> str:
    """Render a template in this process, without limits; `request` is that of `render_chat`."""
    given = {"tools": None, **request["variables"]}
    return rendered(compiled(request["template"]), request["messages"], request.get("generation_prompt", True), given)


def rendered(template: Any, messages: Sequence[Message], generation_prompt: bool, given: Mapping[str, Any]) -> str:
    """Render a compiled template. `given`: the tools and other variables that it sees."""
    text = template.render(messages=messages, documents=None, add_generation_prompt=generation_prompt, **given)
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"the conversation has {len(text)} characters; expected at most {_MAX_CHARACTERS}")
    return str(text)


@functools.lru_cache(maxsize=8)
def compiled(template: str, marks: tuple[str, str] = ("", "")) -> Any:
    """Compile a template in transformers' environment: `tojson`, `raise_exception`, `strftime_now`, loop controls.

    `marks` are written around what the template says that an assistant wrote.
    """
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(marks), jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = lambda *args, **named: dict(*args, **named)  # the class has ways out of the sandbox
    environment.globals["namespace"] = _namespace_class()
    return environment.from_string(template)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _namespace_class() -> Any:
    """Return Jinja's namespace without names that begin with an underscore, which lead to Python's internals."""
    import jinja2.exceptions
    from jinja2.utils import Namespace

    class PlainNamespace(Namespace):
        def __init__(*args: Any, **named: Any) -> None:  # no parameter is called self: namespace(self=...) is valid
            values = dict(*args[1:], **named)
            for name in values:
                _check_name(name)
            Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r:.80}")

    return PlainNamespace


def _generation_tag(marks: tuple[str, str]) -> Any:
    """Return Jinja's extension for `{% generation %}`, which marks what an assistant wrote."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Any) -> str:
            return f"{marks[0]}{caller()}{marks[1]}"

    return GenerationTag
