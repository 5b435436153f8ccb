"""The message of an error that no command expects: memory that ran out, or a bug."""

import os
import tempfile
import traceback

from moezoo.core.errors import OutOfMemoryError

_LONGEST = 300  # characters of an error's own text; XLA's may be pages
_OUT_OF_MEMORY = (  # of XLA, of MLX's allocators, of CUDA
    *("RESOURCE_EXHAUSTED", "[malloc", "[metal::malloc]", "Unable to allocate", "std::bad_alloc"),
    "cudaErrorMemoryAllocation",
)


def describe_failure(error: Exception) -> str:
    """Return the one line to print for an error that is not a MoezooError.

    The traceback of a bug goes to a new temporary file, or into the message with MOEZOO_TRACEBACK=1.
    """
    text = " ".join(str(error).split())[:_LONGEST].rstrip(".")
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | ValueError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)
    ):
        return (
            f"{OutOfMemoryError.__name__}: memory ran out; got {text or type(error).__name__}. Use a smaller model, "
            "batch or sequence; `moezoo describe` shows what training needs."
        )
    found = f"{type(error).__name__}: {text}" if text else type(error).__name__
    trace = "".join(traceback.format_exception(error))
    if os.environ.get("MOEZOO_TRACEBACK", "0") not in ("", "0"):
        return f"{trace}internal error: {found}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="moezoo-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(trace)
    except OSError:  # a full disk, for instance
        return f"{trace}internal error: {found}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"internal error: {found} ({last.filename}:{last.lineno}). If nothing outside moezoo explains it, report it "
        f"with the traceback in {file.name}; MOEZOO_TRACEBACK=1 prints it."
    )
