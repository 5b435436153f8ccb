"""A run as data: the config file, its sections, and errors that name the path of what is wrong in it."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from moezoo.core.config.data import DataConfig
from moezoo.core.config.training import OptimizerConfig, TrainingConfig
from moezoo.core.config.validate import validate
from moezoo.core.config.yaml_file import parse_mapping, parse_value, read_text
from moezoo.core.distributed.mesh import MeshConfig
from moezoo.core.errors import SpecError
from moezoo.core.spec import ModelSpec, Part, PrecisionSpec, impossible

# --- where a run begins ----------------------------------------------------------------------------------------------


class InitFrom(Part):
    """What a run begins from in place of random numbers: a Hugging Face checkpoint's folder or hub id, or a run folder.

    A config without a section `model` has the checkpoint's, with the auxiliary losses that its family trains with.
    `selection_bias_rate` replaces the family's own in it; 0 keeps the bias as it is.
    """

    path: str
    selection_bias_rate: Annotated[float, Field(ge=0)] | None = None


def _as_init_from(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class Config(Part):
    """Everything that a run is made from. Model and tokenizer may be left out where `init_from` has them."""

    init_from: Annotated[
        InitFrom | None, BeforeValidator(_as_init_from, json_schema_input_type=str | InitFrom | None)
    ] = None
    model: ModelSpec
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = MeshConfig()

    @model_validator(mode="after")
    def _positions_reach(self) -> "Config":
        longest, length = self.model.max_length, self.training.sequence_length
        if longest is not None and length > longest:
            raise impossible(
                "training.sequence_length",
                f"is {length}, but positions end at {longest} tokens",
                f"Use a shorter sequence_length, or a larger {self.model.max_length_field}",
            )
        return self


# --- reading and writing ---------------------------------------------------------------------------------------------


Resolve = Callable[[dict[str, Any], str], None]
"""Fills what `init_from` leaves out into a raw config, in place; the second argument names the config in errors."""


def load_config(path: str | Path, overrides: Sequence[str] = (), *, resolve: Resolve | None = None) -> Config:
    """Read a YAML config and apply `path=value` overrides.

    `resolve` opens what `init_from` names, for a config that leaves the model or the tokenizer out (see
    `load_resolved_config`); without it such a config is refused. Overrides of the model are applied after it.

    Raises SpecError: no such file, not YAML, a duplicate or unknown key, a wrong type, impossible sizes.
    """
    return parse_config(read_text(path, "config"), where=str(path), overrides=overrides, resolve=resolve)


def parse_config(
    text: str, where: str = "config", overrides: Sequence[str] = (), *, resolve: Resolve | None = None
) -> Config:
    """Parse the text of a config, as `load_config`; `where` names it in errors."""
    raw = parse_mapping(text, where, "config")
    first = [override for override in overrides if re.match(r"\s*init_from\b", override)]
    for override in first:
        raw["init_from"] = _as_init_from(raw.get("init_from"))
        _apply_override(raw, override)
    raw["init_from"] = _as_init_from(raw.get("init_from"))
    if raw["init_from"] is not None and resolve is not None:
        resolve(raw, where)
    for override in overrides:
        if override not in first:
            _apply_override(raw, override)
    return validate(Config, raw, where)


def dump_config(config: Config) -> str:
    """YAML text that `parse_config` reads back to an equal config, defaults written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)


def with_compute(config: Config, compute: str) -> Config:
    """The config with another `model.precision.compute`. Raises SpecError for a dtype that is none of the known."""
    precision = validate(PrecisionSpec, {"compute": compute}, "model.precision")
    return config.model_copy(update={"model": config.model.model_copy(update={"precision": precision})})


def json_schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors that complete YAML."""
    schema = Config.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one value of the raw config in place: `training.steps=20`, `model.layers[0].moe.num_experts=4`."""
    path, equals, text = override.partition("=")
    keys = [int(key) if key.isdigit() else key for key in re.split(r"[.\[\]]+", path.strip().rstrip("]")) if key != ""]
    if not equals or not keys:
        raise SpecError(f"--set {override} is not an override; expected path=value, e.g. --set training.steps=20.")
    target: Any = raw
    for key in keys[:-1]:
        if isinstance(target, dict):
            target = target.setdefault(key, {})
        elif isinstance(target, list) and isinstance(key, int) and key < len(target):
            target = target[key]
        else:
            raise SpecError(f"--set {path} does not exist in the config, at {key!r}. Check the path.")
    try:
        value = parse_value(text)
    except yaml.YAMLError:
        raise SpecError(f"--set {path} has a value that is not YAML; got {text!r}. Quote it.") from None
    last = keys[-1]
    if isinstance(target, dict) or (isinstance(target, list) and isinstance(last, int) and last < len(target)):
        holder: Any = target
        holder[last] = value
    else:
        raise SpecError(f"--set {path} does not exist in the config, at {last!r}. Check the path.")


# --- explaining a validation error -----------------------------------------------------------------------------------
