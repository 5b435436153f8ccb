"""Answers in the JSON of OpenAI's API, with the routing in the fields of vLLM and of SGLang."""

import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moezoo.core.data.tokenizers import Tokenizer
from moezoo.core.spec import ModelSpec
from moezoo.core.traces.formats.foreign import all_layers
from moezoo.core.traces.formats.payloads import base64_int32, base64_npy
from moezoo.core.traces.formats.vllm import smallest
from moezoo.server.answers import Answer, Piece, ScoredToken
from moezoo.server.requests import Request

_LOWEST = -9999.0  # JSON has no -inf; OpenAI writes this number


@dataclass(frozen=True)
class Responses:
    """The responses to one request.

    Fields:
        request: as it was checked.
        model: name of the model.
        spec, tokenizer: of the model.
        id, created: of all responses to the request.
    """

    request: Request
    model: str
    spec: ModelSpec
    tokenizer: Tokenizer
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    _sent: dict[int, int] = field(default_factory=dict)  # characters of the tokens that a stream has had, by choice

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the response with all answers."""
        choices = [self._choice(answer) for answer in answers]
        return self._framed(choices, usage=self._usage(answers))

    def begin(self) -> list[dict[str, Any]]:
        """Return the chunks before the first piece of a stream."""
        first = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        indices = range(self.request.choices if self.request.is_chat else 0)
        return [self._framed([{"index": index, **first}], chunk=True) for index in indices]

    def chunk(self, item: Piece | Answer) -> dict[str, Any] | None:
        """Return the chunk of a piece, or of an answer's end; None for an empty piece."""
        if isinstance(item, Piece) and not item.text and not item.scored:
            return None
        text, finish = ("", item.finish) if isinstance(item, Answer) else (item.text, None)
        choice: dict[str, Any] = {"index": item.index, "finish_reason": finish, "logprobs": None}
        if isinstance(item, Piece) and item.scored:
            choice["logprobs"] = self._logprobs(item.scored, self._sent.get(item.index, 0))
            length = sum(len(self._text(scored.before, scored.token)) for scored in item.scored)
            self._sent[item.index] = self._sent.get(item.index, 0) + length
        if self.request.is_chat:
            return self._framed([{**choice, "delta": {"content": text} if text else {}}], chunk=True)
        return self._framed([{**choice, "text": text}], chunk=True)

    def end(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Return the chunks after the last answer of a stream."""
        return [self._framed([], chunk=True, usage=self._usage(answers))] if self.request.stream_usage else []

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return usage_of(answers, self.request.choices)

    def _framed(self, choices: list[dict[str, Any]], chunk: bool = False, **more: Any) -> dict[str, Any]:
        is_chat = self.request.is_chat
        kind = f"chat.completion{'.chunk' if chunk else ''}" if is_chat else "text_completion"
        name = f"{'chatcmpl' if is_chat else 'cmpl'}-{self.id}"
        return {
            "id": name,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    def _choice(self, answer: Answer) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": answer.index, "finish_reason": answer.finish, "logprobs": None}
        if self.request.is_chat:
            choice["message"] = {"role": "assistant", "content": answer.text}
        else:
            choice["text"] = (self._prompt_text(answer) if self.request.echo else "") + answer.text
        if answer.scored is not None:
            choice["logprobs"] = self._logprobs((*answer.scored_prompt, *answer.scored))
        if self.request.token_ids:
            choice |= {"prompt_token_ids": answer.prompt, "token_ids": answer.tokens}
        return choice | self._routing(answer)

    def _prompt_text(self, answer: Answer) -> str:
        given = self.request.prompts[answer.index // self.request.choices]
        return given if isinstance(given, str) else self.tokenizer.decode(answer.prompt)

    def _logprobs(self, scored: Sequence[ScoredToken], offset: int = 0) -> dict[str, Any]:
        """Return the log-probabilities of tokens as OpenAI's two APIs write them; `offset`: characters before them."""
        if self.request.is_chat:
            entries = [
                {
                    **self._entry(each.before, each.token, each.nats),
                    "top_logprobs": [self._entry(each.before, *other) for other in each.top],
                }
                for each in scored
            ]
            return {"content": entries, "refusal": None}
        tokens = [self._text(each.before, each.token) for each in scored]
        own, tops, offsets = [], [], []
        for text, each in zip(tokens, scored, strict=True):
            value = _number(each.nats)
            top = {self._text(each.before, token): _number(nats) for token, nats in reversed(each.top)}
            own.append(value)
            tops.append(None if value is None else top | {text: value})
            offsets.append(offset)
            offset += len(text)
        return {"tokens": tokens, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}

    def _text(self, before: Sequence[int], token: int) -> str:
        """Return the text of a token after others: with the space that some tokenizers omit at the beginning."""
        shown, text = self.tokenizer.decode(before), self.tokenizer.decode([*before, token])
        return text[len(shown) :] if text.startswith(shown) else self.tokenizer.decode([token])

    def _entry(self, before: Sequence[int], token: int, nats: float) -> dict[str, Any]:
        text = self._text(before, token)
        return {"token": text, "logprob": _number(nats), "bytes": [*text.encode()]}

    def _routing(self, answer: Answer) -> dict[str, Any]:
        """Return the experts as vLLM sends them, and beside them as SGLang does."""
        if answer.expert is None:
            return {}
        routed = all_layers(answer.expert, self.spec.moe_layers, len(self.spec.all_layers), dense=0)
        counts = {"prompt_tokens": len(answer.prompt), "completion_tokens": len(answer.tokens)}
        meta = {**counts, "routed_experts": base64_int32(routed)}
        return {"routed_experts": base64_npy(smallest(answer.expert)), "meta_info": meta}


def usage_of(answers: Sequence[Answer], choices: int) -> dict[str, Any]:
    """Return the number of tokens of all answers, and of each prompt once for all its choices."""
    prompt, answer = sum(len(each.prompt) for each in answers[::choices]), sum(len(each.tokens) for each in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(each.num_shared for each in answers[::choices])},
    }


def _number(nats: float) -> float | None:
    return None if math.isnan(nats) else max(float(nats), _LOWEST)
