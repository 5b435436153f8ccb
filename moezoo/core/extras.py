"""Optional packages: which extra of moezoo installs each, and the error where one is missing."""

import importlib.util
from collections.abc import Mapping

from moezoo.core.errors import PackageError

EXTRAS: Mapping[str, str] = {
    "jax": "jax",
    "flax": "jax",
    "optax": "jax",
    "orbax": "jax",
    "tensorstore": "jax",
    "filelock": "jax",
    "mlx": "mlx",
    "transformers": "hf",
    "tokenizers": "hf",
    "huggingface_hub": "hf",
    "jinja2": "hf",
    "starlette": "serve",
    "uvicorn": "serve",
    "lm_eval": "eval",
}
"""The extra that installs each optional package."""


def missing(*packages: str) -> list[str]:
    """Return those of the packages that are not installed."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def check_installed(*packages: str, purpose: str) -> None:
    """Check that packages are installed before they are imported. `purpose` begins the error.

    Raises PackageError: one is not.
    """
    if absent := missing(*packages):
        raise PackageError(missing_message(purpose, *absent))


def missing_message(purpose: str, *absent: str, otherwise: str = "") -> str:
    """Return the error of a purpose that needs packages which are not installed."""
    extras = ",".join(sorted({EXTRAS[package] for package in absent}))
    return f"{purpose} needs {', '.join(absent)}, not installed here. Run `pip install 'moezoo[{extras}]'`{otherwise}."
