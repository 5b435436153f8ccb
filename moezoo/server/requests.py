"""Requests of OpenAI's API, checked: what is unknown, of another type or out of range is one line and status 400."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moezoo.core.errors import MoezooError, SpecError, nearest, shown
from moezoo.core.generation.config import GenerationConfig
from moezoo.core.json_text import parse_json

MAX_MESSAGES, MAX_PROMPTS, MAX_CHOICES, MAX_STOPS, MAX_TOP = 1000, 256, 16, 16, 20
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_COMPLETION_TOKENS = 16  # OpenAI's default

# Fields that may only have values without an effect; None: any value, because none has one.
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...] | None] = {
    "user": None,
    "metadata": None,
    "store": None,
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}


class RequestError(Exception):
    """A request that cannot be answered.

    Fields:
        status: of HTTP.
        param: the field that is wrong; None: no single one.
        code: OpenAI's name of the error; None: it has none.
    """

    def __init__(self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI writes it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        message = " ".join(str(self).split())
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def refused(error: MoezooError) -> RequestError:
    """Return the error of a request that the model, its tokenizer or this machine cannot take."""
    return RequestError(f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Request:
    """A request to continue texts, or to answer a conversation.

    Fields:
        prompts: texts or token ids; empty in a chat.
        messages: of a chat; None: not one.
        template: variables of the chat template.
        choices: number of answers to each prompt.
        max_tokens: number of tokens to generate, at most; None: the model's default.
        stop: texts that end an answer.
        sampling: arguments of `GenerationConfig.options`.
        stream: send pieces as they are generated.
        stream_usage: send the number of tokens after the last piece.
        echo: return the prompt before its continuation.
        top: number of most probable tokens to return beside the log-probability of each token; None: return neither.
        routing: return the experts of each token.
        token_ids: return ids of prompt and answer.
    """

    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[Mapping[str, Any], ...] | None
    template: Mapping[str, Any]
    choices: int
    max_tokens: int | None
    stop: tuple[str, ...]
    sampling: Mapping[str, Any]
    stream: bool
    stream_usage: bool
    echo: bool
    top: int | None
    routing: bool
    token_ids: bool

    @property
    def is_chat(self) -> bool:
        """True of a conversation."""
        return self.messages is not None

    @property
    def looks_back(self) -> bool:
        """True if an answer needs a forward pass over it: for its experts, or log-probabilities of its prompt."""
        return self.routing or (self.echo and self.top is not None)


def parse_completion(body: bytes, model: str, most: int) -> Request:
    """Return the request to `/v1/completions`, for the model of that name and at most `most` new tokens.

    Raises RequestError.
    """
    fields = _Fields(body)
    fields.check_model(model)
    echo = fields.flag("echo")
    max_tokens = fields.integer("max_tokens", 0 if echo else 1, most)
    top = fields.integer("logprobs", 0, MAX_TOP)
    limit = min(_COMPLETION_TOKENS, most) if max_tokens is None else max_tokens
    return fields.request(prompts=_prompts(fields), messages=None, max_tokens=limit, echo=echo, top=top, template={})


def parse_chat(body: bytes, model: str, most: int) -> Request:
    """Return the request to `/v1/chat/completions`; arguments and errors as in `parse_completion`."""
    fields = _Fields(body)
    fields.check_model(model)
    limits = [fields.integer(name, 1, most) for name in ("max_completion_tokens", "max_tokens")]
    asked, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, MAX_TOP)
    if top is not None and not asked:
        raise RequestError("top_logprobs needs logprobs; got no logprobs; expected logprobs true.", "top_logprobs")
    template = fields.mapping("chat_template_kwargs")
    return fields.request(
        prompts=(),
        messages=_messages(fields),
        max_tokens=next((limit for limit in limits if limit is not None), None),
        echo=False,
        top=(top or 0) if asked else None,
        template=template,
    )


class _Fields:
    """The fields of a request's body, taken one at a time; null counts as missing."""

    def __init__(self, body: bytes) -> None:
        try:
            value = parse_json(body)
        except ValueError as error:
            raise RequestError(f"the body is not JSON; got: {error}; expected an object of fields by name.") from None
        if not isinstance(value, dict):
            raise RequestError(f"the body is {shown(value, 60)}; expected an object of fields by name.")
        self._left = {name: field for name, field in value.items() if field is not None}
        self._known: set[str] = set()

    def take(self, name: str, accepts: Callable[[Any], bool], expected: str) -> Any:
        """Return a field; None without it."""
        self._known.add(name)
        value = self._left.pop(name, None)
        if value is not None and not accepts(value):
            raise RequestError(f"{name} is {shown(value, 60)}; expected {expected}.", name)
        return value

    def flag(self, name: str) -> bool:
        return bool(self.take(name, lambda value: isinstance(value, bool), "true or false"))

    def integer(self, name: str, low: int, high: int) -> int | None:
        expected = f"an integer from {low} to {high}"
        value: int | None = self.take(name, lambda value: type(value) is int and low <= value <= high, expected)
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        return self.take(name, lambda value: isinstance(value, dict), "an object") or {}

    def check_model(self, known: str) -> None:
        """Check that the request is for the model of this server."""
        name = self.take("model", lambda value: isinstance(value, str), "the name of a model")
        if name not in (None, known):
            raise RequestError(
                f"model {shown(name)} is not served here; expected {shown(known)}.",
                "model",
                status=404,
                code="model_not_found",
            )

    def request(self, *, top: int | None, **own: Any) -> Request:
        """Return the request of the fields that both kinds have, and `own`; refuse every other field."""
        stop = self.take("stop", _is_stop, f"a text, or a list of up to {MAX_STOPS} texts; none of them empty") or ()
        stream, options = self.flag("stream"), self.mapping("stream_options")
        routing, token_ids = self.flag("return_routed_experts"), self.flag("return_token_ids")
        if stream and (routing or token_ids or own["echo"]):
            raise RequestError(
                "a stream has text and logprobs only; got stream with echo, return_routed_experts or return_token_ids; "
                "expected one or the other.",
                "stream",
            )
        sampling, choices = self._sampling(), self.integer("n", 1, MAX_CHOICES) or 1
        self._refuse_others()
        return Request(
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            choices=choices,
            sampling=sampling,
            stream=stream,
            stream_usage=options.get("include_usage") is True,
            top=top,
            routing=routing,
            token_ids=token_ids,
            **own,
        )

    def _sampling(self) -> dict[str, Any]:
        given = {name: self.take(name, lambda _: True, "") for name in _SAMPLING}
        sampling = {name: value for name, value in given.items() if value is not None}
        if type(sampling.setdefault("seed", secrets.randbits(32))) is not int:
            raise RequestError(f"seed is {shown(sampling['seed'], 60)}; expected an integer in [0, 2**64).", "seed")
        try:
            GenerationConfig().options(**sampling)
        except SpecError as error:
            raise RequestError(str(error)) from None
        return sampling

    def _refuse_others(self) -> None:
        for name, value in self._left.items():
            if name not in _WITHOUT_EFFECT:
                close = nearest(name, {*self._known, *_WITHOUT_EFFECT})
                raise RequestError(f"unknown field {shown(name)}{close}; expected a field of OpenAI's API.", name)
            values = _WITHOUT_EFFECT[name]
            if values is not None and value not in values:
                raise RequestError(f"{name} is {shown(value, 60)}; expected none, it is not supported.", name)


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and len(texts) <= MAX_STOPS and all(isinstance(text, str) and text for text in texts)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(token) is int for token in value)


def _prompts(fields: _Fields) -> tuple[str | tuple[int, ...], ...]:
    def accepts(value: Any) -> bool:
        if isinstance(value, str) or _is_ids(value):
            return True
        return (
            isinstance(value, list)
            and 0 < len(value) <= MAX_PROMPTS
            and (all(isinstance(each, str) for each in value) or all(map(_is_ids, value)))
        )

    value = fields.take("prompt", accepts, f"a text, token ids, or a list of up to {MAX_PROMPTS} of either")
    if value is None:
        raise RequestError("prompt is missing; expected a text or token ids to continue.", "prompt")
    several = [value] if isinstance(value, str) or _is_ids(value) else value
    return tuple(each if isinstance(each, str) else tuple(each) for each in several)


def _messages(fields: _Fields) -> tuple[Mapping[str, Any], ...]:
    value = fields.take("messages", lambda value: isinstance(value, list), "a list of messages")
    if value is None or not 0 < len(value) <= MAX_MESSAGES:
        got = "none" if value is None else str(len(value))
        raise RequestError(f"the number of messages is {got}; expected 1 to {MAX_MESSAGES} in `messages`.", "messages")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {number} is {shown(message, 60)}; expected role and content.", "messages")
        content = message.get("content")
        if not (
            content is None or isinstance(content, str) or (isinstance(content, list) and all(map(_is_text, content)))
        ):
            raise RequestError(
                f"the content of message {number} is {shown(content, 60)}; expected a text, or parts of type text.",
                "messages",
            )
    return tuple(value)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
