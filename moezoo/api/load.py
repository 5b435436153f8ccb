"""Loading a model on a backend: `moezoo.load`."""

from pathlib import Path
from typing import Any

from moezoo.api.loaded_model import LoadedModel
from moezoo.backends import load_backend
from moezoo.core.backend import Backend
from moezoo.core.config.run_config import with_compute
from moezoo.core.cost.fits import check_weights
from moezoo.core.data.load_tokenizer import tokenizer_notes
from moezoo.core.errors import CheckpointError, check_count
from moezoo.core.huggingface.nonfinite import nonfinite_warning
from moezoo.core.interventions.top_k import with_top_k
from moezoo.core.runs.open import is_superseded, open_model


def load_model(
    path: str | Path,
    backend: str | Backend | None = None,
    compute: str | None = None,
    max_length: int | None = None,
    *,
    adapter: str | Path | None = None,
    top_k: int | None = None,
    allow_overcommit: bool = False,
) -> LoadedModel:
    """Load a model on a backend: the implementation of `moezoo.load`."""
    check_count("max_length", max_length)
    opened = open_model(path, max_length, adapter)
    config = opened.config if compute is None else with_compute(opened.config, compute)
    config = config if top_k is None else with_top_k(config, top_k)
    chosen = load_backend(backend, for_training=False) if backend is None or isinstance(backend, str) else backend
    devices, problems = chosen.devices(), list(opened.problems)
    problems += check_weights(opened.weight_bytes, devices, str(path), allow_overcommit=allow_overcommit)
    try:
        model = chosen.build(config.model, opened.weights)
    except CheckpointError:
        if not is_superseded(opened):
            raise
        options: dict[str, Any] = {"adapter": adapter, "top_k": top_k, "allow_overcommit": allow_overcommit}
        return load_model(path, chosen, compute, max_length, **options)
    if opened.checkpoint is not None:
        weights = opened.checkpoint.weights
        warning = nonfinite_warning(list(weights.nonfinite), str(opened.path))
        problems += [*weights.decoded_notes(), *([warning] if warning else []), *tokenizer_notes(opened.tokenizer)]
    return LoadedModel(
        model,
        config,
        opened.tokenizer,
        opened.step,
        problems,
        opened.layout,
        opened.generation,
        published=opened.checkpoint is not None,
        devices=devices,
        allow_overcommit=allow_overcommit,
        base=opened.base,
        path=opened.path,
        backend=chosen.name,
    )
