"""Where a run begins that does not begin from random numbers: a Hugging Face checkpoint, or another run.

Writing: writings/fine_tuning.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.checkpoint.safetensors_file import ReadWhenAsked, shapes_of
from moezoo.core.checkpoint.store import check_names_and_shapes
from moezoo.core.config.run_config import Config, InitFrom, load_config
from moezoo.core.config.validate import validate
from moezoo.core.data.tokenizers import Tokenizer, load_tokenizer
from moezoo.core.errors import CheckpointError, SpecError
from moezoo.core.huggingface.layout import Layout
from moezoo.core.parameters import parameter_table
from moezoo.core.runs.open import describe_model, open_model
from moezoo.core.runs.run_folder import is_run


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Fields:
        weights: float32 by canonical name, read and converted when asked for.
        layout: how to write them back in the checkpoint's own layout, where there is one.
        problems: what a reader should know, a line each.
    """

    weights: Mapping[str, NDArray[np.float32]]
    layout: Layout | None
    problems: list[str]


def fill_in(raw: dict[str, Any], where: str, begun: Config | None = None) -> None:
    """Give a raw config with `init_from` what it leaves out: the model, and the tokenizer.

    `begun`: the config of the run that goes on. What began from the same is taken from there and nothing is opened.
    """
    init = validate(InitFrom, raw["init_from"], f"init_from of {where}")
    data = raw.setdefault("data", {})
    has_model = raw.get("model") is not None
    has_tokenizer = not isinstance(data, dict) or data.get("tokenizer") is not None
    if has_model and has_tokenizer:
        return
    if begun is not None and begun.init_from == init:
        spec, tokenizer = begun.model, begun.data.tokenizer
    else:
        spec, tokenizer = describe_model(init.path)
    if not has_model:
        raw["model"] = spec.model_dump(mode="json")
        if init.selection_bias_rate is not None:
            _set_selection_bias_rate(raw["model"], init, where)
    if not has_tokenizer:
        data["tokenizer"] = tokenizer.model_dump(mode="json")


def load_resolved_config(path: str | Path, overrides: Sequence[str] = (), *, begun: Config | None = None) -> Config:
    """Read a config as `load_config`, and open what `init_from` names if the config leaves model or tokenizer out.

    `begun`: the config of the run to resume. If it began from the same checkpoint, nothing is opened.

    Raises as `load_config`, and as `open_model` for a checkpoint that cannot be opened.
    """
    return load_config(path, overrides, resolve=lambda raw, where: fill_in(raw, where, begun))


def initial_tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer of the run that a run begins from, if it is to be used: its characters are those of its data."""
    if config.init_from is None or not is_run(config.init_from.path):
        return None
    _, tokenizer = describe_model(config.init_from.path)
    return load_tokenizer(config.init_from.path) if tokenizer == config.data.tokenizer else None


def check_start(config: Config) -> None:
    """Before a run's folder is made: raise as `open_start` where `init_from` has another model than the config."""
    if config.init_from is not None:
        spec, _ = describe_model(config.init_from.path)
        _check(config, {row.name: row.shape for row in parameter_table(spec)})


def open_start(config: Config) -> Start:
    """What `init_from` names, opened and checked against the config's model.

    Raises as `open_model`, and CheckpointError where the parameters are not those of the config's model.
    """
    assert config.init_from is not None
    opened = open_model(config.init_from.path)
    _check(config, shapes_of(opened.weights))
    return Start(_Float32(opened.weights), opened.layout, opened.problems)


def _check(config: Config, shapes: dict[str, tuple[int, ...]]) -> None:
    assert config.init_from is not None
    path = config.init_from.path
    try:
        check_names_and_shapes(shapes, {row.name: row.shape for row in parameter_table(config.model)}, path)
    except CheckpointError as error:
        _, _, diff = str(error).partition("\n")
        raise CheckpointError(
            f"the config's model is not the one of init_from ({path}). Leave the section `model` out: then it is.\n"
            f"{diff}"
        ) from None


class _Float32(ReadWhenAsked):
    """Arrays of any dtype as float32, one at a time."""

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
            f"selection bias ({where}). Leave it out."
        )
    for bias in biases:
        bias["rate"] = init.selection_bias_rate
