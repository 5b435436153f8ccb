"""The thread that owns the model, and the queue of requests before it."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import closing, suppress

from moezoo.api.loaded_model import LoadedModel
from moezoo.core.errors import MoezooError
from moezoo.core.generation.session import Session
from moezoo.server.answers import Answer, Piece, answers
from moezoo.server.requests import Request, RequestError, refused

MAX_WAITING = 256
"""Requests in the queue, at most; more are refused with status 503."""

_JOIN_S = 10.0

Item = Piece | Answer | Exception | None
"""Part of an answer, the error that ended it, or None at its end."""


class Job:
    """A request in the queue, or in work. An event loop awaits its items; the engine's thread posts them.

    Attributes:
        request: as it was checked.
    """

    def __init__(self, request: Request) -> None:
        """Called in the event loop that awaits the items."""
        self.request = request
        self._loop, self._items, self._cancelled = asyncio.get_running_loop(), asyncio.Queue[Item](), threading.Event()

    def cancel(self) -> None:
        """Give up: a job in the queue is skipped, one in work ends after the token that is being computed."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Nobody awaits the answer any more."""
        return self._cancelled.is_set()

    def post(self, item: Item) -> None:
        """Hand over an item, from any thread."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def items(self) -> AsyncIterator[Piece | Answer]:
        """Yield the items; pieces only of a stream. Raises the error that ended the job."""
        while (item := await self._items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item


class Engine:
    """A thread that loads a model and answers requests in the order in which they came, one at a time.

    The model is loaded and used in this thread alone, because MLX's streams belong to threads. Its caches stay between
    requests (`Session`): of a prompt that begins as the one before, only the rest is read.

    >>> engine = Engine(lambda: load_model("runs/owls"), max_tokens=1024)
    >>> loaded = engine.start()
    >>> job = engine.submit(request)  # in an event loop
    >>> engine.close()
    """

    def __init__(self, load: Callable[[], LoadedModel], max_tokens: int) -> None:
        """`max_tokens`: new tokens of a request, at most."""
        self._load, self.max_tokens = load, max_tokens
        self._jobs: queue.Queue[Job | None] = queue.Queue(MAX_WAITING)
        self._loaded: Future[LoadedModel] = Future()
        self._current: Job | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="moezoo engine", daemon=True)

    def start(self) -> LoadedModel:
        """Return the model when it is loaded. Raises the error of loading it."""
        self._thread.start()
        return self._loaded.result()

    @property
    def is_alive(self) -> bool:
        """The thread takes requests."""
        return self._thread.is_alive() and not self._closed.is_set()

    def submit(self, request: Request) -> Job:
        """Return the job of a request, in the queue. Raises RequestError, status 503: the queue is full, or closed."""
        job = Job(request)
        if not self.is_alive:
            raise RequestError("the server is shutting down.", status=503)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise RequestError(
                f"the server is busy; {MAX_WAITING} requests wait. Try again later.", status=503
            ) from None
        return job

    def close(self) -> None:
        """End the thread after the token that is being computed; what waits is refused."""
        self._closed.set()
        current = self._current
        if current is not None:
            current.cancel()
        with suppress(queue.Empty):
            while True:
                waiting = self._jobs.get_nowait()
                if waiting is not None:
                    waiting.post(RequestError("the server is shutting down.", status=503))
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)

    def _work(self) -> None:
        try:
            loaded = self._load()
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(loaded)
        session = Session(loaded.model)
        while (job := self._jobs.get()) is not None:
            self._current = job
            if self._closed.is_set():
                job.post(RequestError("the server is shutting down.", status=503))
            elif job.is_cancelled:
                job.post(_cancelled())
            else:
                self._answer(loaded, session, job)
            self._current = job = None

    def _answer(self, loaded: LoadedModel, session: Session, job: Job) -> None:
        try:
            with closing(answers(loaded, session, job.request, self.max_tokens)) as items:
                for item in items:
                    if job.is_cancelled:
                        raise _cancelled()
                    if job.request.stream or isinstance(item, Answer):
                        job.post(item)
            job.post(None)
        except RequestError as error:
            job.post(error)
        except MoezooError as error:
            job.post(refused(error))
        except Exception as error:  # a bug; the other requests still have their answers
            job.post(error)


def _cancelled() -> RequestError:
    return RequestError("the request was cancelled.", status=503)
