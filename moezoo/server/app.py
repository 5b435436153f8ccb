"""The app: OpenAI's paths over an engine. starlette is an extra, so functions import it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from moezoo.api.loaded_model import LoadedModel
from moezoo.server.answers import Answer
from moezoo.server.engine import Engine, Job
from moezoo.server.requests import Request, RequestError, parse_chat, parse_completion
from moezoo.server.responses import Responses

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

MAX_BYTES = 4 << 20
"""Bytes of a request's body, at most."""

BODY_S = 30.0
"""Seconds in which a body has to arrive."""

OnFailure = Callable[[Exception], None]
Parse = Callable[[bytes, str, int], Request]


def create_app(engine: Engine, loaded: LoadedModel, name: str, on_failure: OnFailure) -> "Starlette":
    """Return the ASGI app of a started engine.

    Args:
        engine: that answers.
        loaded: its model.
        name: of the model, in requests and responses.
        on_failure: called with an error that nobody expects: a bug. The client gets one line and status 500.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    served = _Served(engine, loaded, name, on_failure)
    handlers: dict[Any, Any] = {HTTPException: _wrong_path, RequestError: _refused, Exception: served.bug}
    return Starlette(
        routes=[
            Route("/health", served.health),
            Route("/v1/models", served.models),
            Route("/v1/models/{model:path}", served.model),
            Route("/v1/completions", partial(served.generate, parse_completion), methods=["POST"]),
            Route("/v1/chat/completions", partial(served.generate, parse_chat), methods=["POST"]),
        ],
        exception_handlers=handlers,
    )


class _Served:
    """The endpoints."""

    def __init__(self, engine: Engine, loaded: LoadedModel, name: str, on_failure: OnFailure) -> None:
        self._engine, self._loaded, self._name, self._on_failure = engine, loaded, name, on_failure

    async def health(self, http: "HttpRequest") -> "Response":
        alive = self._engine.is_alive
        return _json({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def models(self, http: "HttpRequest") -> "Response":
        return _json({"object": "list", "data": [self._described()]})

    async def model(self, http: "HttpRequest") -> "Response":
        if http.path_params["model"] != self._name:
            raise RequestError(
                f"no such model here; expected {self._name!r}.", "model", status=404, code="model_not_found"
            )
        return _json(self._described())

    async def generate(self, parse: Parse, http: "HttpRequest") -> "Response":
        from starlette.responses import StreamingResponse

        request = parse(await read_body(http), self._name, self._engine.max_tokens)
        job = self._engine.submit(request)
        watch = asyncio.create_task(_cancel_without_client(http, job))
        responses = Responses(request, self._name, self._loaded.model.spec, self._loaded.tokenizer)
        handed_over = False
        try:
            if not request.stream:
                return _json(responses.whole([item async for item in self._items(job) if isinstance(item, Answer)]))
            # What is wrong with a request is known when its first item comes: in time for another status.
            items = self._items(job)
            first = await anext(items)
            handed_over = True
            return StreamingResponse(
                self._events(job, watch, responses, first, items),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
            )
        finally:
            if not handed_over:
                job.cancel()
                watch.cancel()

    async def _items(self, job: Job) -> AsyncIterator[Any]:
        """Yield a job's items; an error that nobody expects is told to `on_failure`, and is one line for the client."""
        try:
            async for item in job.items():
                yield item
        except RequestError:
            raise
        except Exception as error:
            raise self._failed(error) from None

    async def _events(
        self, job: Job, watch: "asyncio.Task[None]", responses: Responses, first: Any, items: AsyncIterator[Any]
    ) -> AsyncIterator[bytes]:
        """Yield server-sent events, from the first item on."""
        answers: list[Answer] = []
        try:
            for record in responses.begin():
                yield _event(record)
            item = first
            while item is not None:
                if isinstance(item, Answer):
                    answers.append(item)
                chunk = responses.chunk(item)
                if chunk is not None:
                    yield _event(chunk)
                item = await anext(items, None)
            for record in responses.end(answers):
                yield _event(record)
            yield b"data: [DONE]\n\n"
        except RequestError as error:  # too late for a status
            yield _event(error.body())
        except Exception as error:
            yield _event(self._failed(error).body())
        finally:
            job.cancel()
            watch.cancel()

    async def bug(self, http: "HttpRequest", error: Exception) -> "Response":
        return await _refused(http, self._failed(error))

    def _failed(self, error: Exception) -> RequestError:
        """Tell `on_failure` about an error that nobody expects; return what the client gets."""
        self._on_failure(error)
        text = f"internal error: {type(error).__name__}; the terminal of the server says more."
        return RequestError(text, status=500)

    def _described(self) -> dict[str, Any]:
        described: dict[str, Any] = {"id": self._name, "object": "model", "created": 0, "owned_by": "moezoo"}
        longest = self._loaded.model.spec.max_length
        return described if longest is None else described | {"max_model_len": longest}


async def read_body(http: "HttpRequest") -> bytes:
    """Return the body of a request of JSON. Raises RequestError: of another type, too large, or too slow."""
    from starlette.requests import ClientDisconnect

    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # without which a browser would send what any page asks it to
        raise RequestError(f"content-type is {kind[:60]!r}; expected 'application/json'.", status=415)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in http.stream():
                body += part
                if len(body) > MAX_BYTES:
                    raise RequestError(f"the body is too large; expected at most {MAX_BYTES} bytes.", status=413)
    except TimeoutError:
        raise RequestError(f"the body did not arrive in {BODY_S:.0f} s.", status=408) from None
    except ClientDisconnect:
        raise RequestError("the client went away.") from None
    return bytes(body)


async def _cancel_without_client(http: "HttpRequest", job: Job) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    job.cancel()


async def _wrong_path(http: "HttpRequest", error: Any) -> "Response":
    path = f"{http.method} {http.url.path}"[:200]
    known = "/v1/chat/completions, /v1/completions (POST), /v1/models, /health (GET)"
    got = {404: "no such path", 405: "no such method here"}.get(error.status_code, str(error.detail))
    return _json(
        RequestError(f"{got}; got {path}; expected {known}.", status=error.status_code).body(), error.status_code
    )


async def _refused(http: "HttpRequest", error: Any) -> "Response":
    return _json(error.body(), error.status)


def _json(content: Any, status: int = 200) -> "Response":
    from starlette.responses import JSONResponse

    return JSONResponse(content, status)


def _event(record: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
