"""moezoo: one spec for mixture-of-experts language models, realized in Flax NNX and in MLX, and proven equal.

The public API is `load`, `parity`, the specs, and the errors. Importing it loads neither jax nor mlx.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moezoo.api import LoadedModel
    from moezoo.core.backend import Backend
    from moezoo.core.config.run_config import Config
    from moezoo.core.errors import MoezooError
    from moezoo.core.parameters import parameter_table
    from moezoo.core.parity.report import ParityReport
    from moezoo.core.spec import ModelSpec

__version__ = "0.1.0"
__all__ = ["Config", "ModelSpec", "MoezooError", "load", "load_config", "parameter_table", "parity"]

_LAZY = {
    "Config": "moezoo.core.config.run_config",
    "ModelSpec": "moezoo.core.spec",
    "MoezooError": "moezoo.core.errors",
    "parameter_table": "moezoo.core.parameters",
}


def load(
    path: str | Path, backend: "str | Backend | None" = None, compute: str | None = None, max_length: int | None = None
) -> "LoadedModel":
    """A model on a backend: `jax`, `mlx`, None for the default, or one that was made (`JaxBackend(mesh)`).

    `path`: a run folder (its newest whole checkpoint), the folder of a Hugging Face checkpoint, or a hub id `org/name`.
    `compute`: the dtype of activations and products, `float32` or `bfloat16`; None is what the run's config says, and
    float32 for a Hugging Face checkpoint. Parameters stay in the dtype of the files.
    `max_length`: how many tokens a text may have, where a Hugging Face checkpoint's rotation depends on that (longrope,
    dynamic); None is the length that it was first trained for.

    Raises RunError, CheckpointError, SpecError, TokenizerError or BackendError.
    """
    from moezoo.api import load_model

    return load_model(path, backend, compute, max_length)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> "Config":
    """Read and check a YAML config, with `path=value` overrides; a checkpoint that `init_from` names is opened.

    Raises SpecError, and as `load` for the checkpoint.
    """
    from moezoo.core.runs.init_from import load_resolved_config

    return load_resolved_config(path, overrides)


def parity(path: str | Path) -> "ParityReport":
    """Compare the reference, JAX and MLX on a config's initial weights or a run's newest ones.

    Both backends must be installed. Raises as `load`.
    """
    from moezoo.backends import NAMES, load_backend
    from moezoo.core.parity.check import parity_of

    return parity_of(path, {name: load_backend(name) for name in NAMES})


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moezoo' has no attribute {name!r}")
