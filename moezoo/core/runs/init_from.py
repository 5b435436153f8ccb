"""Initialize a run from a Hugging Face checkpoint or from another run (`init_from` of a config).

Writing: writings/fine_tuning.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.checkpoint.safetensors_file import LazyTensors, shapes_of
from moezoo.core.checkpoint.store import check_names_and_shapes
from moezoo.core.config.run_config import Config, InitFrom, config_text, load_config, parse_config
from moezoo.core.config.validate import validate
from moezoo.core.data.tokenizers import Tokenizer
from moezoo.core.errors import CheckpointError, SpecError, TrainingError
from moezoo.core.huggingface.checkpoint import describe_checkpoint
from moezoo.core.huggingface.layout import Layout
from moezoo.core.huggingface.mlx_quantization import declared
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.initialize import initial_value
from moezoo.core.runs.base import AdaptedWeights, Base, load_base, saved_names
from moezoo.core.runs.open import checkpoint_folder, describe_model, make_base, open_base, open_model
from moezoo.core.runs.run_folder import is_run, load_run_tokenizer


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a run starts from.

    Fields:
        weights: by canonical name; each is read when accessed. Float32, or of a run of an adapter what is not trained
            as it is stored, in codes for instance.
        layout: file layout of the Hugging Face checkpoint, to export to it again; None if there is none.
        problems: one-line warnings for the user.
        base: of a run of an adapter, whose checkpoints lack what it does not train; else None.
    """

    weights: Mapping[str, NDArray[Any]]
    layout: Layout | None
    problems: list[str]
    base: Base | None = None


def add_model_and_tokenizer(raw: dict[str, Any], where: str, resumed: Config | None = None) -> None:
    """Add the model and the tokenizer of `init_from` to a raw config, each unless the config has its own.

    `resumed`: the config of the run to resume. If it has the same `init_from`, both are taken from it and nothing is
    opened.
    """
    init = validate(InitFrom, raw["init_from"], f"init_from of {where}")
    data = raw.setdefault("data", {})
    has_model = raw.get("model") is not None
    has_tokenizer = not isinstance(data, dict) or data.get("tokenizer") is not None
    if has_model and has_tokenizer:
        return
    if resumed is not None and resumed.init_from == init:
        spec, tokenizer = resumed.model, resumed.data.tokenizer
    else:
        spec, tokenizer = describe_model(init.path, adapter=init.adapter)
    if not has_model:
        raw["model"] = spec.model_dump(mode="json")
        if init.selection_bias_rate is not None:
            _set_selection_bias_rate(raw["model"], init, where)
    if not has_tokenizer:
        data["tokenizer"] = tokenizer.model_dump(mode="json")


def load_resolved_config(
    config: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = (), *, resumed: Config | None = None
) -> Config:
    """Load a config; if it has `init_from` and no model or tokenizer, read them from the checkpoint named there.

    `config`: a path or name, as in `load_config`, the content of a file, or a config. `resumed`: the config of the run
    to resume. If it has the same `init_from`, the checkpoint is not opened.

    Raises what `load_config` raises, and what `open_model` raises for the checkpoint.
    """

    def resolve(raw: dict[str, Any], where: str) -> None:
        add_model_and_tokenizer(raw, where, resumed)

    if isinstance(config, str | Path):
        return load_config(config, overrides, resolve=resolve)
    return parse_config(config_text(config), overrides=overrides, resolve=resolve)


def initial_tokenizer(config: Config) -> Tokenizer | None:
    """Return the tokenizer of the run named by `init_from` if the config uses it; None otherwise.

    A character tokenizer depends on the data it was built from, so it must be reused rather than rebuilt.
    """
    if config.init_from is None or not is_run(config.init_from.path):
        return None
    _, tokenizer = describe_model(config.init_from.path)
    return load_run_tokenizer(config.init_from.path) if tokenizer == config.data.tokenizer else None


def check_initial_weights(config: Config) -> None:
    """Check that the model of `init_from` fits the config's, from configs alone; called before creating a run folder.

    Raises what `open_initial_weights` raises, and TrainingError: a quantized checkpoint for mlx-lm.
    """
    if config.init_from is not None:
        path = config.init_from.path
        spec, _ = describe_model(path)
        _check(config, {row.name: row.shape for row in parameter_table(spec)})
        quantization = None if is_run(path) else declared(describe_checkpoint(checkpoint_folder(path)).fields)
        if quantization is not None and saved_names(config) is None:
            raise TrainingError(
                f"{path} of init_from is quantized ({quantization[0]}), and training all parameters of a quantized "
                f"model is not supported. Train an adapter on it, or make a checkpoint of floats: moezoo convert "
                f"{path} OUT --dequantize"
            )


def open_initial_weights(config: Config) -> InitialWeights:
    """Open the weights that `init_from` names, and check them against the config's model.

    Raises what `open_model` raises, and CheckpointError: parameters differ from those of the config's model.
    """
    assert config.init_from is not None
    init = config.init_from
    opened = open_model(init.path, adapter=init.adapter)
    _check(config, shapes_of(opened.weights))
    missing = {row.name: row for row in parameter_table(config.model) if row.name not in opened.weights}
    factors = {name: initial_value(row, config.training.seed) for name, row in missing.items()}
    names = saved_names(config)
    if names is None:
        weights = AdaptedWeights(config.model, _Float32(opened.weights), factors, init.path)
        return InitialWeights(weights, opened.layout, opened.problems)
    trained = {name: np.asarray(opened.weights[name], np.float32) for name in names if name not in missing}
    weights = AdaptedWeights(config.model, opened.weights, trained | factors, init.path)
    return InitialWeights(weights, opened.layout, opened.problems, opened.base or make_base(init.path))


def with_base(config: Config, run: Path, own: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    """Return all parameters of a run to resume, from those that its checkpoint has.

    Raises RunError: its base is missing, or has changed; and what `open_model` raises for it.
    """
    base = load_base(run)
    return own if base is None else AdaptedWeights(config.model, open_base(base, run).weights, own, str(run))


def frozen_bytes(config: Config, run: Path | None = None) -> int | None:
    """Return the bytes of the parameters that a run of an adapter does not train; None if it saves all parameters.

    `run`: of a run to resume.
    """
    names = saved_names(config)
    if names is None or config.init_from is None:
        return None
    base = None if run is None else load_base(run)
    opened = open_model(config.init_from.path) if base is None else open_base(base, run or "")
    return opened.weight_bytes


def _check(config: Config, shapes: dict[str, tuple[int, ...]]) -> None:
    assert config.init_from is not None
    path = config.init_from.path
    expected = {row.name: row.shape for row in parameter_table(config.model) if row.base is None or row.name in shapes}
    try:
        check_names_and_shapes(shapes, expected, path)
    except CheckpointError as error:
        _, _, diff = str(error).partition("\n")
        raise CheckpointError(
            f"the config's model differs from the model of init_from ({path}). Remove the section `model` to use that "
            f"model.\n{diff}"
        ) from None


class _Float32(LazyTensors):
    """A lazy mapping that converts arrays of any dtype to float32, one at a time."""

    def __init__(self, weights: Mapping[str, NDArray[Any]]):
        super().__init__(shapes_of(weights))
        self._weights = weights

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return np.asarray(self._weights[name], np.float32)


def _set_selection_bias_rate(model: dict[str, Any], init: InitFrom, where: str) -> None:
    biases = [
        layer["moe"]["router"]["selection_bias"]
        for layer in model["layers"]
        if layer["moe"] is not None and layer["moe"]["router"]["selection_bias"] is not None
    ]
    if not biases:
        raise SpecError(
            f"init_from.selection_bias_rate is {init.selection_bias_rate}, but no router of {init.path} has a "
            f"selection bias ({where}). Remove it."
        )
    for bias in biases:
        bias["rate"] = init.selection_bias_rate
