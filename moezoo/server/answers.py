"""Answers of a model to a request, and what one more forward pass over them tells: log-probabilities and routing."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.api.conversation import ANSWER_TOKENS
from moezoo.api.loaded_model import LoadedModel
from moezoo.core.data.huggingface_tokenizer import with_template
from moezoo.core.generation.loop import Continuation, checked_prompts
from moezoo.core.generation.session import Session, shared_length
from moezoo.core.layer_routing import LayerRouting
from moezoo.core.tokens import UNUSED, Floats, Integers
from moezoo.server.requests import Request, RequestError

_TEMPERATURE = 1.0  # OpenAI's default
_SHORTEST = 16


@dataclass(frozen=True)
class Piece:
    """Text that a token completes; `index` is that of its prompt."""

    index: int
    text: str


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of a sequence of T tokens, in nats.

    Fields:
        own: [T], of each token after those before it; that of the first one is NaN.
        top: the most probable tokens at each place, id and log-probability, the likeliest first; none at the first.
    """

    own: Floats
    top: list[list[tuple[int, float]]]


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Fields:
        index: of its prompt.
        text: without the prompt, an end token and a stop string.
        prompt, tokens: ids of both; an end token is one.
        num_shared: tokens of the prompt that the caches held.
        finish: OpenAI's reason: "stop" or "length".
        scored: of prompt and answer, if asked for.
        expert: int16 [T - 1, L, K], experts of prompt and answer in the MoE layers; UNUSED in an unused slot.
    """

    index: int
    text: str
    prompt: list[int]
    tokens: list[int]
    num_shared: int
    finish: str
    scored: Scored | None = None
    expert: NDArray[np.int16] | None = None


def answers(loaded: LoadedModel, session: Session, request: Request, most: int) -> Generator[Piece | Answer]:
    """Yield a piece after each token, and each prompt's answer when it is finished. `most`: new tokens, at most.

    Raises MoezooError: the model cannot take the request. Raises RequestError: it has no routing.
    """
    if request.routing and not loaded.model.spec.moe_layers:
        raise RequestError("the model has no MoE layer; got return_routed_experts.", "return_routed_experts")
    if request.is_chat:
        prompt, keep = _encode_chat(loaded, request)
        yield from _answer(loaded, session, request, 0, prompt, most, keep)
        return
    for index, given in enumerate(request.prompts):
        prompt = loaded.encode_prompt(given) if isinstance(given, str) else np.asarray(given, np.int64)
        yield from _answer(loaded, session, request, index, prompt, most)


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
    keep: list[int] | None = None,
) -> Generator[Piece | Answer]:
    new_tokens = _new_tokens(loaded, request, len(prompt), most)
    (row,) = checked_prompts(loaded.model, [prompt], new_tokens)
    loaded.check_generation(1, len(row), new_tokens)
    if request.routing or request.top is not None:
        length = _padded_length(loaded, len(row) + new_tokens)
        loaded.check_scoring(length, 1, length)
    settings = dict(request.sampling)
    if loaded.generation.temperature is None:
        settings.setdefault("temperature", _TEMPERATURE)
    options, ends = loaded.generation.options(**settings), loaded.end_tokens(request.is_chat)
    continuation, pieces = Continuation(loaded.tokenizer, row, ends, request.stop), []
    told: dict[str, Any] = {"max_new_tokens": new_tokens, "options": options, "end_tokens": ends, "keep": keep or ()}
    with closing(session.stream(row, **told)) as tokens:
        for token in tokens:
            pieces.append(continuation.add(token))
            yield Piece(index, pieces[-1])
            if continuation.ended:
                break
    pieces.append(continuation.finish())
    yield Piece(index, pieces[-1])
    finish = "stop" if continuation.ended else "length"
    shared = session.num_shared if new_tokens else 0
    answer = Answer(index, "".join(pieces), row.tolist(), continuation.tokens, shared, finish)
    yield _looked_at(loaded, request, answer) if request.routing or request.top is not None else answer


def _new_tokens(loaded: LoadedModel, request: Request, length: int, most: int) -> int:
    if request.max_tokens is not None:
        return request.max_tokens
    wanted = min(most, loaded.generation.new_tokens(None, length, ANSWER_TOKENS))
    longest = loaded.model.spec.max_length
    return wanted if longest is None else max(1, min(wanted, longest - length))


def _looked_at(loaded: LoadedModel, request: Request, answer: Answer) -> Answer:
    """Return the answer with what a forward pass over it tells, with the routing of generation."""
    tokens = np.asarray([*answer.prompt, *answer.tokens], np.int32)
    padded = np.zeros(_padded_length(loaded, len(tokens)), np.int32)
    padded[: len(tokens)] = tokens  # causal: what comes after does not matter
    output = loaded.model.forward(padded[None], inference=True)
    scored = None if request.top is None else scored_tokens(output.logits[0, : len(tokens)], tokens, request.top)
    expert = experts_of(output.routing, len(tokens) - 1) if request.routing else None
    return replace(answer, scored=scored, expert=expert)


def _padded_length(loaded: LoadedModel, length: int) -> int:
    """Return the next power of two, so that a backend that compiles sees few lengths; at most what the model can."""
    padded = max(_SHORTEST, 1 << (length - 1).bit_length())
    return min(padded, loaded.model.spec.max_length or padded)


def scored_tokens(logits_TV: Floats, tokens_T: Integers, top: int) -> Scored:
    """Return the log-probability of each token by the logits before it, and the `top` most probable ones."""
    own = np.full(len(tokens_T), np.nan, np.float32)
    best: list[list[tuple[int, float]]] = [[]]
    for place in range(1, len(tokens_T)):
        row_V = logits_TV[place - 1].astype(np.float64)
        row_V -= row_V.max()
        row_V -= np.log(np.exp(row_V).sum())
        row_V = row_V.astype(np.float32)
        own[place] = row_V[tokens_T[place]]
        likeliest = np.argsort(-row_V, kind="stable")[:top] if top > 1 else [row_V.argmax()][:top]
        best.append([(int(token), float(row_V[token])) for token in likeliest])
    return Scored(own, best)


def experts_of(routing: list[LayerRouting], length: int) -> NDArray[np.int16]:
    """Return the experts of the first `length` tokens in all MoE layers: int16 [T, L, K]."""
    top_k = max(layer.expert.shape[2] for layer in routing)
    expert = np.full((length, len(routing), top_k), UNUSED, np.int16)
    for number, layer in enumerate(routing):
        expert[:, number, : layer.expert.shape[2]] = layer.expert[0, :length]
    return expert
