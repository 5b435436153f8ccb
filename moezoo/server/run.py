"""The server: a socket, an engine, and uvicorn between them."""

import socket
from collections.abc import Callable

from moezoo.api.loaded_model import LoadedModel
from moezoo.core.errors import DataError
from moezoo.core.extras import check_installed
from moezoo.core.signals import Interrupted, interrupted_by_signals
from moezoo.server.app import OnFailure, create_app
from moezoo.server.engine import Engine

_GRACE_S = 5
_MAX_CONNECTIONS = 512


def serve(
    load: Callable[[], LoadedModel],
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_tokens: int = 4096,
    on_ready: Callable[[LoadedModel, str], None],
    on_failure: OnFailure,
) -> None:
    """Serve a model until a signal asks to stop: answers in work have 5 s to end then.

    Args:
        load: loads the model; called in the thread that will own it.
        name: of the model, in requests and responses.
        host, port: to listen on; port 0 is any that is free.
        max_tokens: new tokens of a request, at most.
        on_ready: called with the model and the address of the server before the first request.
        on_failure: as in `create_app`.

    Raises PackageError: starlette or uvicorn is not installed. Raises DataError: the address cannot be listened on.
    Raises the errors of `load`.
    """
    check_installed("starlette", "uvicorn", purpose="the server")
    import uvicorn

    engine = Engine(load, max_tokens)
    with _listening(host, port) as listener:
        try:
            with interrupted_by_signals():
                loaded = engine.start()
                shown = f"[{host}]" if ":" in host else host
                on_ready(loaded, f"http://{shown}:{listener.getsockname()[1]}/v1")
                config = uvicorn.Config(
                    create_app(engine, loaded, name, on_failure),
                    log_level="critical",  # errors go to `on_failure`; the others are of connections cut at the end
                    access_log=False,
                    lifespan="off",
                    ws="none",
                    timeout_graceful_shutdown=_GRACE_S,
                    limit_concurrency=_MAX_CONNECTIONS,
                )
                uvicorn.Server(config).run(sockets=[listener])
        except Interrupted:  # uvicorn has answered it, and raises it again at its end
            pass
        finally:
            engine.close()


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens, before a model is loaded in vain."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_MAX_CONNECTIONS)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot listen on {host}:{port}; got: {reason}. Use another --host or --port.") from None
