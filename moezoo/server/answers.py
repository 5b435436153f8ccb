"""Answers of a model to a request, with log-probabilities, and what one more forward pass over them tells."""

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.api.conversation import ANSWER_TOKENS
from moezoo.api.loaded_model import LoadedModel
from moezoo.core.data.huggingface_tokenizer import with_template
from moezoo.core.generation.likelihood import log_softmax, padded_length
from moezoo.core.generation.loop import Continuation, checked_prompts
from moezoo.core.generation.session import Session, shared_length
from moezoo.core.layer_routing import LayerRouting
from moezoo.core.tokens import UNUSED, Floats, Integers
from moezoo.server.requests import Request, RequestError

_TEMPERATURE = 1.0  # OpenAI's default
_CONTEXT = 4  # tokens; one may have no text


@dataclass(frozen=True)
class ScoredToken:
    """A token, and log-probabilities in its place by the model's own logits, in nats.

    Fields:
        token: its id.
        before: a few tokens before it, on which its text depends; none of the first token of a prompt.
        nats: its log-probability; NaN of the first token of a prompt.
        top: the most probable tokens, id and log-probability, the likeliest first; none at the first token of a prompt.
    """

    token: int
    before: tuple[int, ...]
    nats: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """Text that a token completes.

    Fields:
        index: of its choice.
        text: may be empty.
        scored: the tokens since the last piece that has some, if they are asked for.
    """

    index: int
    text: str
    scored: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Fields:
        index: of its choice.
        text: without the prompt, an end token and a stop string.
        prompt, tokens: ids of both; an end token is one.
        num_shared: tokens of the prompt that the caches held.
        finish: OpenAI's reason: "stop" or "length".
        scored: the tokens of the answer, if asked for.
        scored_prompt: those of the prompt, if it is echoed.
        expert: int16 [T - 1, L, K], experts of prompt and answer in the MoE layers; UNUSED in an unused slot.
    """

    index: int
    text: str
    prompt: list[int]
    tokens: list[int]
    num_shared: int
    finish: str
    scored: tuple[ScoredToken, ...] | None = None
    scored_prompt: tuple[ScoredToken, ...] = ()
    expert: NDArray[np.int16] | None = None


def answers(loaded: LoadedModel, session: Session, request: Request, most: int) -> Generator[Piece | Answer]:
    """Yield a piece after each token, and each answer when it is finished. `most`: new tokens, at most.

    Choices of prompt number p are p * n to p * n + n - 1; their seeds are the request's and those after it.

    Raises MoezooError: the model cannot take the request. Raises RequestError: it has no routing.
    """
    if request.routing and not loaded.model.spec.moe_layers:
        raise RequestError("the model has no MoE layer; got return_routed_experts.", "return_routed_experts")
    if request.is_chat:
        prompts = [_encode_chat(loaded, request)]
    else:
        prompts = [(_encode(loaded, given), []) for given in request.prompts]
    for index in range(len(prompts) * request.choices):
        prompt, keep = prompts[index // request.choices]
        yield from _answer(loaded, session, request, index, prompt, most, keep)


def _encode(loaded: LoadedModel, given: str | tuple[int, ...]) -> Integers:
    return loaded.encode_prompt(given) if isinstance(given, str) else np.asarray(given, np.int64)


def _encode_chat(loaded: LoadedModel, request: Request) -> tuple[Integers, list[int]]:
    """Return the tokens of a conversation, and the number of those with which its next turn begins for certain."""
    tokenizer, messages = with_template(loaded.tokenizer), list(request.messages or ())
    prompt = tokenizer.encode_chat(messages, dict(request.template))
    said = tokenizer.encode_chat(messages, dict(request.template), generation_prompt=False)
    return prompt, [shared_length(said, prompt)]


def _answer(
    loaded: LoadedModel,
    session: Session,
    request: Request,
    index: int,
    prompt: Integers,
    most: int,
    keep: list[int],
) -> Generator[Piece | Answer]:
    new_tokens = _new_tokens(loaded, request, len(prompt), most)
    (row,) = checked_prompts(loaded.model, [prompt], new_tokens)
    loaded.check_generation(1, len(row), new_tokens)
    if request.looks_back:
        length = padded_length(len(row) + new_tokens, loaded.model.spec.max_length)
        loaded.check_scoring(length, 1, length)
    settings = {**request.sampling, "seed": (request.sampling["seed"] + index % request.choices) % 2**64}
    if loaded.generation.temperature is None:
        settings.setdefault("temperature", _TEMPERATURE)
    options, ends = loaded.generation.options(**settings), loaded.end_tokens(request.is_chat)
    continuation, pieces = Continuation(loaded.tokenizer, row, ends, request.stop), []
    scored: list[ScoredToken] = []
    logits: list[Floats] = []
    told: dict[str, Any] = {"max_new_tokens": new_tokens, "options": options, "end_tokens": ends, "keep": keep}
    with closing(session.stream(row, **told, on_logits=None if request.top is None else logits.append)) as tokens:
        sent = 0
        for token in tokens:
            pieces.append(continuation.add(token))
            if request.top is not None:
                known = (*row[-_CONTEXT:].tolist(), *continuation.tokens[:-1])
                scored.append(scored_token(logits.pop()[0], token, known, request.top))
            yield Piece(index, pieces[-1], tuple(scored[sent:]) if pieces[-1] else ())
            sent = len(scored) if pieces[-1] else sent
            if continuation.ended:
                break
    pieces.append(continuation.finish())
    yield Piece(index, pieces[-1], tuple(scored[sent:]))
    finish = "stop" if continuation.ended else "length"
    shared = session.num_shared if new_tokens else 0
    own = None if request.top is None else tuple(scored)
    answer = Answer(index, "".join(pieces), row.tolist(), continuation.tokens, shared, finish, own)
    yield _looked_at(loaded, request, answer) if request.looks_back else answer


def _new_tokens(loaded: LoadedModel, request: Request, length: int, most: int) -> int:
    if request.max_tokens is not None:
        return request.max_tokens
    wanted = min(most, loaded.generation.new_tokens(None, length, ANSWER_TOKENS))
    longest = loaded.model.spec.max_length
    return wanted if longest is None else max(1, min(wanted, longest - length))


def _looked_at(loaded: LoadedModel, request: Request, answer: Answer) -> Answer:
    """Return the answer with what a forward pass over it tells, with the routing of generation."""
    tokens = np.asarray([*answer.prompt, *answer.tokens], np.int32)
    padded = np.zeros(padded_length(len(tokens), loaded.model.spec.max_length), np.int32)
    padded[: len(tokens)] = tokens  # causal: what comes after does not matter
    output = loaded.model.forward(padded[None], inference=True)
    if request.echo and request.top is not None:
        prompt, top = answer.prompt, request.top
        rows = zip(range(1, len(prompt)), output.logits[0], strict=False)
        scored = [scored_token(logits_V, prompt[place], prompt[:place], top) for place, logits_V in rows]
        answer = replace(answer, scored_prompt=(ScoredToken(prompt[0], (), math.nan, []), *scored))
    expert = experts_of(output.routing, len(tokens) - 1) if request.routing else None
    return replace(answer, expert=expert)


def scored_token(logits_V: Floats, token: int, before: Sequence[int], top: int) -> ScoredToken:
    """Return a token, which is after others, with its log-probability, and the `top` most probable tokens."""
    nats_V = log_softmax(logits_V[None])[0]
    likeliest = np.argsort(-nats_V, kind="stable")[:top] if top > 1 else [nats_V.argmax()][:top]
    best = [(int(other), float(nats_V[other])) for other in likeliest]
    return ScoredToken(token, tuple(before[-_CONTEXT:]), float(nats_V[token]), best)


def experts_of(routing: list[LayerRouting], length: int) -> NDArray[np.int16]:
    """Return the experts of the first `length` tokens in all MoE layers: int16 [T, L, K]."""
    top_k = max(layer.expert.shape[2] for layer in routing)
    expert = np.full((length, len(routing), top_k), UNUSED, np.int16)
    for number, layer in enumerate(routing):
        expert[:, number, : layer.expert.shape[2]] = layer.expert[0, :length]
    return expert
