"""Which backends a test may count on: a missing one is a skip, or a failure where it was promised.

`MOEZOO_REQUIRE_BACKENDS=jax,mlx` (continuous integration sets it) promises both.
"""

import importlib
import os
from types import ModuleType

import pytest

MODULES = {"jax": "jax", "mlx": "mlx.core"}


def require_backend(name: str) -> ModuleType:
    """The module of backend `name`, `jax` or `mlx.core`; skips where it is missing, or fails where promised.

    For a fixture, a test, or the top of a test file. A backend that is installed but broken raises its own
    error.
    """
    module = MODULES[name]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
    promised = [word.strip() for word in os.environ.get("MOEZOO_REQUIRE_BACKENDS", "").split(",")]
    if name in promised:
        pytest.fail(f"{module} is not installed, but MOEZOO_REQUIRE_BACKENDS promises {name}", pytrace=False)
    pytest.skip(f"{module} is not installed (MOEZOO_REQUIRE_BACKENDS does not name {name})", allow_module_level=True)
