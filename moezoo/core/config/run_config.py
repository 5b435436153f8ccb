"""Run configs: the config file as a pydantic model, reading, overrides and writing."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from moezoo.core.config.data import DataConfig
from moezoo.core.config.optimizers import OptimizerConfig
from moezoo.core.config.renamed_keys import with_new_keys
from moezoo.core.config.shipped import config_file
from moezoo.core.config.training import TrainingConfig
from moezoo.core.config.validate import validate
from moezoo.core.config.yaml_file import parse_mapping, parse_value, read_text
from moezoo.core.distributed.mesh import MeshConfig
from moezoo.core.errors import SpecError
from moezoo.core.spec import ModelSpec, Part, PrecisionSpec, impossible

_MAX_DEPTH = 20  # of the path of an override

# --- the config ------------------------------------------------------------------------------------------------------


class InitFrom(Part):
    """Initial weights from a checkpoint: the folder or hub id of a Hugging Face checkpoint, or a run folder.

    If the config has no `model` section, the checkpoint's model is used, with the auxiliary losses of its family.
    `selection_bias_rate` overrides the family's rate; 0 keeps the selection bias constant. `adapter`: a run or folder
    with an adapter for it, to go on training.
    """

    path: str
    adapter: str | None = None
    selection_bias_rate: Annotated[float, Field(ge=0)] | None = None


TrackerName = Literal["tensorboard", "wandb", "trackio"]


def _as_trackers(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_init_from(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


class Config(Part):
    """A complete run config. Model and tokenizer may be omitted if `init_from` provides them.

    A file may also have `adapter` at the top (`AdapterSpec`), which becomes a part of the model. `trackers` log the run
    besides metrics.jsonl, on this machine (writings/runs.md).
    """

    init_from: Annotated[
        InitFrom | None, BeforeValidator(_as_init_from, json_schema_input_type=str | InitFrom | None)
    ] = None
    model: ModelSpec
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig = MeshConfig()
    trackers: Annotated[
        tuple[TrackerName, ...],
        BeforeValidator(_as_trackers, json_schema_input_type=TrackerName | tuple[TrackerName, ...]),
    ] = ()

    @model_validator(mode="before")
    @classmethod
    def _adapter_into_model(cls, raw: Any) -> Any:
        """Move `adapter` into the model, whose part it is; fields that the model's has besides stay."""
        if not isinstance(raw, dict) or "adapter" not in raw:
            return raw
        raw = dict(raw)
        adapter, model = raw.pop("adapter"), raw.get("model")
        if isinstance(model, dict):
            own = model.get("adapter")
            both = {**own, **adapter} if isinstance(own, dict) and isinstance(adapter, dict) else adapter
            raw["model"] = {**model, "adapter": both}
        return raw

    @model_validator(mode="after")
    def _trackers_are_unique(self) -> "Config":
        if len(set(self.trackers)) < len(self.trackers):
            raise impossible("trackers", f"lists one twice: {', '.join(self.trackers)}", "List each once")
        return self

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


_DECIDES_WHAT_IS_TAKEN = re.compile(r"\s*(init_from\b|(model|data\.tokenizer)\s*=\s*(null|~|)\s*$)")
"""Overrides that name the checkpoint of `init_from`, or remove what would be used instead of the checkpoint's own."""

Resolve = Callable[[dict[str, Any], str], None]
"""Function that adds model and tokenizer from `init_from` to a raw config, in place; the string names it in errors."""


def load_config(path: str | Path, overrides: Sequence[str] = (), *, resolve: Resolve | None = None) -> Config:
    """Read a YAML config, by its path or the name of one that ships (`fables`), and apply `path=value` overrides.

    `resolve` opens the checkpoint of `init_from`, for a config that omits the model or the tokenizer (see
    `load_resolved_config`); without it such a config is an error. Overrides of the model are applied after it, except
    `model=null` and `data.tokenizer=null`, which omit them.

    Raises SpecError: no such file, not YAML, a duplicate or unknown key, a wrong type, impossible sizes.
    """
    path = config_file(path)
    return parse_config(read_text(path, "config"), where=str(path), overrides=overrides, resolve=resolve)


def load_saved_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load the resolved config of a run, also of one that an earlier version saved. Raises as `load_config`."""
    return parse_config(read_text(path, "config"), where=str(path), overrides=overrides, saved=True)


def parse_config(
    text: str,
    where: str = "config",
    overrides: str | Sequence[str] = (),
    *,
    resolve: Resolve | None = None,
    saved: bool = False,
) -> Config:
    """Parse the text of a config as `load_config` does; `where` names it in errors. `overrides`: several, or one.

    `saved`: the text was written by a run; keys that were renamed since then are read by their new names.
    """
    raw = parse_mapping(text, where, "config")
    raw = with_new_keys(raw) if saved else raw
    overrides = [overrides] if isinstance(overrides, str) else overrides
    first = [override for override in overrides if _DECIDES_WHAT_IS_TAKEN.match(override)]
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
    """Return YAML text with all defaults written out; `parse_config` of it returns an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)


def config_text(config: Config | Mapping[str, Any]) -> str:
    """Return the YAML text of a config, or of the content of one. Raises SpecError: values that YAML does not have."""
    if isinstance(config, Config):
        return dump_config(config)
    try:
        return yaml.safe_dump(dict(config), sort_keys=False)
    except (yaml.YAMLError, RecursionError) as error:
        raise SpecError(
            f"the config cannot be written as YAML; got {' '.join(str(error).split())[:200]}; expected text, numbers, "
            "true, false, none, lists and mappings. Replace the value."
        ) from None


def with_compute(config: Config, compute: str) -> Config:
    """Return the config with another `model.precision.compute`. Raises SpecError for an unknown dtype."""
    precision = validate(PrecisionSpec, {"compute": compute}, "model.precision")
    return config.model_copy(update={"model": config.model.model_copy(update={"precision": precision})})


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a config file, for YAML completion in editors."""
    schema = Config.model_json_schema()
    schema["properties"]["adapter"] = schema["$defs"]["ModelSpec"]["properties"]["adapter"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one value of the raw config in place: `training.steps=20`, `model.layers[0].moe.num_experts=4`."""
    path, equals, text = override.partition("=")
    *outer, last = [key for key in re.split(r"[.\[\]]+", path.strip()) if key] or [""]
    if not equals or not last or len(outer) > _MAX_DEPTH:
        raise SpecError(f"--set {override:.80} is not of the form path=value; expected e.g. --set training.steps=20.")
    target: Any = raw
    for key in outer:
        target = target.setdefault(key, {}) if isinstance(target, dict) else target[_index(target, key, path)]
    value = parse_value(text, f"the value of --set {path:.80}")
    target[last if isinstance(target, dict) else _index(target, last, path)] = value


def _index(target: Any, key: str, path: str) -> int:
    """Return the index of an item of a list. Raises SpecError if there is none."""
    if not isinstance(target, list) or re.fullmatch("[0-9]{1,9}", key) is None or int(key) >= len(target):
        raise SpecError(f"--set {path:.80}: the config has no {key:.80} at this place. Check the path.")
    return int(key)
