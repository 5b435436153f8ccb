"""moezoo: one spec for mixture-of-experts language models, implemented in Flax NNX and in MLX, and proven equal.

The public API is what `dir(moezoo)` lists. Importing it does not import jax or mlx.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moezoo.api import LoadedModel, Run
    from moezoo.core.backend import Backend
    from moezoo.core.comparison.result import Comparison
    from moezoo.core.config.run_config import Config
    from moezoo.core.errors import MoezooError
    from moezoo.core.explorer.explore import Explorer
    from moezoo.core.parameters import parameter_table
    from moezoo.core.parity.report import ParityReport
    from moezoo.core.spec import ModelSpec
    from moezoo.core.traces.trace import RoutingTrace
    from moezoo.core.training.reporter import Reporter

__version__ = "0.1.0"
__all__ = [
    "Config",
    "LoadedModel",
    "ModelSpec",
    "MoezooError",
    "Run",
    "compare",
    "explore",
    "load",
    "load_config",
    "parameter_table",
    "parity",
    "train",
]

_LAZY = {
    "Config": "moezoo.core.config.run_config",
    "LoadedModel": "moezoo.api",
    "ModelSpec": "moezoo.core.spec",
    "MoezooError": "moezoo.core.errors",
    "Run": "moezoo.api",
    "parameter_table": "moezoo.core.parameters",
}


def load(
    path: str | Path,
    backend: "str | Backend | None" = None,
    compute: str | None = None,
    max_length: int | None = None,
    *,
    adapter: str | Path | None = None,
    top_k: int | None = None,
    allow_overcommit: bool = False,
) -> "LoadedModel":
    """Load a model on a backend.

    >>> model = moezoo.load("runs/owls")
    >>> text = model.generate("3 owls saw ", max_new_tokens=20)

    Args:
        path: a run folder (its newest intact checkpoint), one of its checkpoints (`run/checkpoints/step_00001000`),
            the folder of a Hugging Face checkpoint, or a hub id `org/name`.
        backend: `jax`, `mlx`, None for the default, or a backend object (`JaxBackend(mesh)`).
        compute: dtype of activations and matrix products, `float32` or `bfloat16`; None: as in the run's config, or
            float32 for a Hugging Face checkpoint. Parameters stay in the dtype of the files.
        max_length: maximum number of tokens, for a Hugging Face checkpoint whose RoPE scaling depends on it (longrope,
            dynamic); None: the original length that it was trained for.
        adapter: an adapter for the model: a run that trained one on it, or a folder of mlx-lm, PEFT or vLLM.
        top_k: number of experts per token in every MoE layer, in place of the model's own; its weights stay the same.
        allow_overcommit: load and generate even if that needs more memory than is free.

    Raises RunError, CheckpointError, SpecError, TokenizerError, BackendError or OutOfMemoryError.
    """
    from moezoo.api import load_model

    options: dict[str, Any] = {"adapter": adapter, "top_k": top_k, "allow_overcommit": allow_overcommit}
    return load_model(path, backend, compute, max_length, **options)


def load_config(path: "str | Path | Mapping[str, Any]", overrides: str | Sequence[str] = ()) -> "Config":
    """Load and validate a config with `path=value` overrides; opens the checkpoint of `init_from` if it has one.

    `path`: of a YAML file, the name of one that ships, or the content of one.

    >>> config = moezoo.load_config("fables", ["training.steps=20"])
    >>> config.training.steps
    20

    Raises SpecError, and what `load` raises for the checkpoint.
    """
    from moezoo.core.runs.init_from import load_resolved_config

    return load_resolved_config(path, overrides)


def train(
    config: "str | Path | Mapping[str, Any] | Config",
    *,
    backend: "str | Backend | None" = None,
    out: str | Path | None = None,
    overrides: str | Sequence[str] = (),
    mesh: str | None = None,
    resume: bool = False,
    replay: str | Path | None = None,
    progress: bool = True,
    reporter: "Reporter | None" = None,
    allow_overcommit: bool = False,
    allow_changed_data: bool = False,
) -> "Run":
    """Train a model into a run folder, as `moezoo train` does, and return the run.

    >>> run = moezoo.train("owls.yaml", out="runs/nine", overrides=["training.steps=9"], progress=False)
    >>> run.metrics["step"].tolist(), run.evaluation.validation_loss < 4
    ([1, 2, 3, 4, 5, 6, 7, 8, 9], True)
    >>> model = run.load()

    The first Ctrl-C, or "interrupt" of a notebook, saves and returns the run as it is, which `resume` continues.

    Args:
        config: a YAML file, the name of a config that ships (`fables`), its content as a mapping, or a Config.
        backend: as in `load`.
        out: the run folder; None: runs/<config name>.
        overrides: `path=value` each, such as `training.steps=20`.
        mesh: devices per axis (`data=4,expert=2`), or a YAML file.
        resume: continue the run in `out` from its newest checkpoint.
        replay: a routing trace of the training data, whose experts are forced.
        progress: print what is trained, a line of progress, and validations.
        reporter: takes each logged step and validation, besides.
        allow_overcommit: try what needs more memory than is free.
        allow_changed_data: resume although the data has changed.

    Raises MoezooError: training cannot start, or cannot go on. Raises KeyboardInterrupt: stopped before the first step.
    """
    from moezoo.api import train_run

    return train_run(
        config,
        backend=backend,
        out=out,
        overrides=overrides,
        mesh=mesh,
        resume=resume,
        replay=replay,
        progress=progress,
        reporter=reporter,
        allow_overcommit=allow_overcommit,
        allow_changed_data=allow_changed_data,
    )


def parity(
    path: str | Path, *, adapter: str | Path | None = None, replay: "RoutingTrace | None" = None
) -> "ParityReport":
    """Compare the reference, JAX and MLX on the initial weights of a config, or the weights of what `load` opens.

    `adapter`: as in `load`. `replay`: a trace, whose first tokens and experts all sides get. Both backends must be
    installed. Raises what `load` raises.
    """
    from moezoo.backends import load_backends
    from moezoo.core.parity.check import parity_of

    return parity_of(path, load_backends(), adapter=adapter, replay=replay)


def compare(
    a: "LoadedModel | str | Path",
    b: "LoadedModel | str | Path",
    data: str | Path,
    *,
    sequence_length: int | None = None,
    max_windows: int | None = None,
) -> "Comparison":
    """Compare two models on a file of text or token ids, and say whether they differ by routing or arithmetic.

    Args:
        a, b: models of the same vocabulary, MoE layers and experts per token, or paths to `load`.
        data: text, JSON lines, or token ids (.npy, .bin).
        sequence_length: tokens per window; None: as model A was trained (512 for a Hugging Face checkpoint).
        max_windows: number of windows, at most, spread evenly over the file; None: all.

    Raises SpecError, DataError, TokenizerError or OutOfMemoryError.
    """
    from moezoo.core.comparison.result import compare_loaded

    sizes = {"sequence_length": sequence_length, "max_windows": max_windows}
    first, second = (load(model) if isinstance(model, str | Path) else model for model in (a, b))
    return compare_loaded(first, second, data, **sizes, on_message=warnings.warn)


def explore(
    trace: "RoutingTrace | str | Path", other: "RoutingTrace | str | Path | None" = None, *, tokens: range | None = None
) -> "Explorer":
    """Show which experts each token went to, as `moezoo explore` does; a notebook shows the page in a frame.

    >>> trace = moezoo.load("runs/owls").trace("text.txt")
    >>> page = moezoo.explore(trace).write("routing.html")

    Args:
        trace: of `LoadedModel.trace`, or the file of one.
        other: a second trace of the same tokens, to be shown beside the first, with differences marked.
        tokens: positions of the tokens to show, at most 20,000; None: the first 2,000.

    Raises DataError: not a trace, or the two cannot be compared.
    """
    from moezoo.core.explorer.explore import explore as explore_traces

    return explore_traces(*([trace] if other is None else [trace, other]), tokens=tokens)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moezoo' has no attribute {name!r}")
