"""Devices that are asked for and not there: one line that says how to ask."""

import importlib
import os
import subprocess
import sys

import pytest

from moezoo.backends import load_backend
from moezoo.core.errors import BackendError
from tests.support.backends_available import require_backend


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("cuda", "use --backend jax, after `pip install 'moezoo[cuda]'`"),
        ("GPU", "use --backend jax, after `pip install 'moezoo[cuda]'`"),
        ("tpu", "use --backend jax, after `pip install 'moezoo[tpu]'`"),
        ("mps", "use --backend mlx"),
        ("cpu", "JAX_PLATFORMS=cpu keeps --backend jax from an accelerator"),
    ],
)
def test_name_of_a_device_in_place_of_a_backend_gives_advice(name: str, advice: str) -> None:
    with pytest.raises(BackendError, match="unknown backend; got ") as seen:
        load_backend(name)
    assert advice in str(seen.value)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (AssertionError(), "got JAX_PLATFORMS=cuda; expected a platform"),
        (RuntimeError("no\nplugin."), "got JAX_PLATFORMS=cuda (no plugin); expected a platform"),
    ],
    ids=["bare assertion", "message of several lines"],
)
def test_platform_that_is_not_there_is_one_line(error: Exception, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_backend("jax")
    import jax

    def fail() -> None:
        raise error

    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(BackendError, match="JAX has no device to run on") as seen:
        load_backend("jax")
    assert cause in str(seen.value)
    assert "pip install 'moezoo[cuda]'" in str(seen.value)
    assert "\n" not in str(seen.value)


def test_environment_variable_that_jax_cannot_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    require_backend("jax")

    def fail(name: str) -> None:
        raise ValueError("invalid truth value 'banana' for environment 'JAX_ENABLE_X64'")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(BackendError, match="got invalid truth value 'banana' for environment 'JAX_ENABLE_X64'; "):
        load_backend("jax")


@pytest.mark.release  # starts JAX in processes of its own
@pytest.mark.parametrize(
    "variable", ["JAX_PLATFORMS=nonsense", "JAX_PLATFORM_NAME=nonsense", "JAX_NUM_CPU_DEVICES=a", "JAX_ENABLE_X64=a"]
)
def test_jax_itself_gives_no_traceback(variable: str) -> None:
    require_backend("jax")
    name, _, value = variable.partition("=")
    others = {key: text for key, text in os.environ.items() if not key.startswith("JAX_PLATFORM")}
    program = (
        "from moezoo.backends import load_backend\ntry:\n load_backend('jax')\nexcept Exception as e:\n print(repr(e))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=others | {name: value}, capture_output=True, text=True, check=True
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("BackendError(")
    assert value in line
