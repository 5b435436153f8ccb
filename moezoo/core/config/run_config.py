"""A run as data: the config file, its sections, and errors that name the path of what is wrong in it."""

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from moezoo.core.config.schedules import CosineSchedule, Schedule
from moezoo.core.distributed.mesh import MeshConfig
from moezoo.core.errors import SpecError, nearest
from moezoo.core.spec import ModelSpec, Part, PrecisionSpec, impossible

_MAX_CONFIG_BYTES = 1_000_000
_Part = TypeVar("_Part", bound=Part)


# --- data ------------------------------------------------------------------------------------------------------------


class TextSource(Part):
    """Plain UTF-8 text: a file, a folder (every *.txt below it), a glob, or any fsspec URL of one."""

    kind: Literal["text"] = "text"
    path: str
    weight: PositiveFloat = 1.0


class JSONLSource(Part):
    """One JSON object a line; the text is its `field`. A file, a folder (every *.jsonl), a glob, or a URL."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    field: str = "text"
    weight: PositiveFloat = 1.0


class TokenShardsSource(Part):
    """Token ids on disk: `.npy` (one dimension of integers), or `.bin` as modded-nanogpt writes it (256 int32, uint16).

    A file, a folder or a glob. Local shards are memory-mapped. The text's tokenizer is the config's.
    """

    kind: Literal["tokens"] = "tokens"
    path: str
    weight: PositiveFloat = 1.0


class DatasetSource(Part):
    """A dataset of `datasets/`, by name: built in, or brought by `moezoo data NAME`."""

    kind: Literal["dataset"] = "dataset"
    name: str
    weight: PositiveFloat = 1.0


class BatchesSource(Part):
    """Token ids in ready batches, one a step in the file's order: integers [steps, B, T] of a `.npy` or a `.npz` file.

    A row is a whole sequence: T tokens, T - 1 targets. `key` names the array of a `.npz` file that has several.
    The last `validation_batches` are held out; where that is 0, validation measures the first batch.
    """

    kind: Literal["batches"] = "batches"
    path: str
    key: str | None = None
    validation_batches: NonNegativeInt = 0


SourceSpec = Annotated[
    TextSource | JSONLSource | TokenShardsSource | DatasetSource | BatchesSource, Field(discriminator="kind")
]


class CharacterTokenizerSpec(Part):
    """One token a character; the vocabulary is the sorted set of characters in the data."""

    kind: Literal["character"] = "character"


class ByteTokenizerSpec(Part):
    """One token a byte of UTF-8; 256 tokens."""

    kind: Literal["byte"] = "byte"


class HuggingFaceTokenizerSpec(Part):
    """A tokenizer that transformers can load: a folder with its files, or a hub id."""

    kind: Literal["huggingface"] = "huggingface"
    path: str


class TokenIdsSpec(Part):
    """No tokenizer: token shards whose text is of no concern. Text cannot be prompted, nor bits per byte given."""

    kind: Literal["ids"] = "ids"
    vocab_size: PositiveInt


TokenizerSpec = Annotated[
    CharacterTokenizerSpec | ByteTokenizerSpec | HuggingFaceTokenizerSpec | TokenIdsSpec,
    Field(discriminator="kind"),
]


class DataConfig(Part):
    """Where tokens come from. Sources are blended by weight; the last `validation_fraction` of each is held out.

    Ready batches stand alone, and say themselves how many of them are held out.
    """

    sources: tuple[SourceSpec, ...]
    tokenizer: TokenizerSpec = CharacterTokenizerSpec()
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _some_sources(self) -> "DataConfig":
        if not self.sources:
            raise impossible("sources", "is empty", "Give at least one source, e.g. {kind: dataset, name: fables}")
        if len(self.sources) > 1 and any(isinstance(source, BatchesSource) for source in self.sources):
            raise impossible(
                "sources", f"blends ready batches with {len(self.sources) - 1} more", "Use ready batches alone"
            )
        return self


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


# --- training --------------------------------------------------------------------------------------------------------


Rematerialize = Literal["none", "experts", "block"]
Layers = Literal["unrolled", "scanned"]


class TrainingConfig(Part):
    """How long and in what pieces. A global step is `batch_size` sequences, in `gradient_accumulation` equal parts.

    `rematerialize: block` keeps, of each attention and each feed-forward, what enters it, and computes the rest again
    on the way back: less memory for about a third more work. `experts` does so with what routed experts make of each
    token's copies alone, neither with attention nor with the router. Source: Chen et al. 2016, arXiv 1604.06174.

    `layers: scanned` compiles equal layers that follow each other once, and loops over them: for deep models, whose
    compiling takes long. A step of few layers is slower so. What is computed, and what is saved, stays the same.
    """

    steps: PositiveInt
    batch_size: PositiveInt
    sequence_length: PositiveInt
    gradient_accumulation: PositiveInt = 1
    rematerialize: Rematerialize = "none"
    layers: Layers = "unrolled"
    seed: NonNegativeInt = 0
    log_every: PositiveInt = 10
    validate_every: PositiveInt | None = None
    validation_sequences: PositiveInt = 64
    checkpoint_every: PositiveInt | None = None
    keep_checkpoints: PositiveInt = 2

    @model_validator(mode="after")
    def _divides(self) -> "TrainingConfig":
        if self.batch_size % self.gradient_accumulation:
            raise impossible(
                "gradient_accumulation",
                f"is {self.gradient_accumulation}, which does not divide batch_size = {self.batch_size}",
                "Use a divisor of batch_size",
            )
        return self


class OptimizerConfig(Part):
    """AdamW with decoupled weight decay and bias correction. Source: Loshchilov and Hutter 2017, arXiv 1711.05101.

    Decay acts on the parameters whose row of the parameter table says so. `clip_norm` bounds the global gradient norm.
    """

    kind: Literal["adamw"] = "adamw"
    learning_rate: PositiveFloat
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    epsilon: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: PositiveFloat | None = 1.0
    schedule: Schedule = CosineSchedule(warmup_steps=100)


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


def load_config(path: str | Path, overrides: Sequence[str] = (), *, begun: Config | None = None) -> Config:
    """Read a YAML config and apply `path=value` overrides.

    What `init_from` names is opened if the file leaves the model or the tokenizer out, unless `begun`, the config of
    the run that goes on, has them from the same. Overrides of the model come after that.

    Raises SpecError: no such file, not YAML, a key twice, an unknown key, a wrong type, impossible sizes.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MAX_CONFIG_BYTES:
            raise SpecError(f"config is larger than {_MAX_CONFIG_BYTES} bytes; got {file}. Give a moezoo YAML config.")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"no such config; got {path}; expected a YAML file. See configs/ for examples.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"config cannot be read; got {path} ({error}); expected a YAML text file.") from None
    return parse_config(text, where=str(path), overrides=overrides, begun=begun)


def parse_config(
    text: str, where: str = "config", overrides: Sequence[str] = (), *, begun: Config | None = None
) -> Config:
    """`load_config` of a text; `where` names it in errors."""
    raw = read_yaml(text, where)
    first = [override for override in overrides if re.match(r"\s*init_from\b", override)]
    for override in first:
        raw["init_from"] = _as_init_from(raw.get("init_from"))
        _apply_override(raw, override)
    raw["init_from"] = _as_init_from(raw.get("init_from"))
    if raw["init_from"] is not None:
        from moezoo.core.runs.init_from import fill_in

        fill_in(raw, where, begun)
    for override in overrides:
        if override not in first:
            _apply_override(raw, override)
    return validate(Config, raw, where)


def dump_config(config: Config) -> str:
    """YAML text that `parse_config` reads back to an equal config, defaults written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=110)


def with_vocab_size(config: Config, vocab_size: int, where: str = "config") -> Config:
    """The config with `model.vocab_size` set from the tokenizer.

    A larger one that it says itself stays where the tokenizer is a Hugging Face one, and where the model is that of a
    checkpoint: such models have rows of padding.
    Raises SpecError where it says another number.
    """
    given = config.model.vocab_size
    padded = config.data.tokenizer.kind == "huggingface" or config.init_from is not None
    if given is not None and given != vocab_size:
        if padded and given > vocab_size:
            return config
        raise SpecError(
            f"model.vocab_size is {given}, but the tokenizer ({config.data.tokenizer.kind}) has {vocab_size} tokens "
            f"({where}). " + ("Use at least as many." if padded else "Set it to null to follow the tokenizer.")
        )
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    return config.model_copy(update={"model": model})


def with_compute(config: Config, compute: str) -> Config:
    """The config with another `model.precision.compute`. Raises SpecError for a dtype that is none of the known."""
    precision = validate(PrecisionSpec, {"compute": compute}, "model.precision")
    return config.model_copy(update={"model": config.model.model_copy(update={"precision": precision})})


def json_schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors that complete YAML."""
    schema = Config.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def validate(part: type[_Part], raw: object, where: str) -> _Part:
    """Check raw data against a part. Raises one SpecError that names every problem by its path."""
    try:
        return part.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(part, raw, problem, where) for problem in error.errors()]
        raise SpecError("\n".join(lines)) from None


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in result:
            raise SpecError(f"key {key!r} stands twice (line {key_node.start_mark.line + 1}). Keep one of them.")
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        raw = yaml.load(text, _StrictLoader)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise SpecError(f"{where} is not valid YAML; got: {problem}. Mend the file.") from None
    if not isinstance(raw, dict):
        raise SpecError(
            f"{where} is not a config; got {type(raw).__name__}; expected sections model, data, training, ..."
        )
    return raw


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
        value = yaml.load(text, _StrictLoader)
    except yaml.YAMLError:
        raise SpecError(f"--set {path} has a value that is not YAML; got {text!r}. Quote it.") from None
    last = keys[-1]
    if isinstance(target, dict) or (isinstance(target, list) and isinstance(last, int) and last < len(target)):
        holder: Any = target
        holder[last] = value
    else:
        raise SpecError(f"--set {path} does not exist in the config, at {last!r}. Check the path.")


# --- explaining a validation error -----------------------------------------------------------------------------------


def _explain(part: type[Part], raw: object, problem: ErrorDetails, where: str) -> str:
    path, owner = _locate(part, raw, problem["loc"])
    context = problem.get("ctx", {})
    match problem["type"]:
        case "impossible":
            path = ".".join(piece for piece in (path, context["path"]) if piece) or "config"
            return f"{path} {context['problem']} ({where}). {context['advice']}."
        case "extra_forbidden":
            key = str(problem["loc"][-1])
            known = sorted(owner.model_fields) if owner else []
            return f"{path} is not a known key{nearest(key, known) or ''} ({where}). Known here: {', '.join(known)}."
        case "missing":
            return f"{path} is missing ({where}). Give it."
        case "union_tag_invalid":
            given, known_tags = (
                str(context["tag"]),
                str(context["expected_tags"]).replace("'", "").split(", "),
            )
            rule = f"expected one of {', '.join(known_tags)}"
            return f"{path}.kind is {given!r}{nearest(given, known_tags)}; {rule} ({where})."
        case "union_tag_not_found":
            return f"{path}.kind is missing; expected one that names which part this is ({where})."
        case _:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            return f"{path or 'config'} is {problem['input']!r}; {message} ({where})."


def _locate(part: type[Part], raw: object, location: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None]:
    """The path as a reader writes it (union tags left out), and the model that holds its last key."""
    path, value = "", raw
    owner: type[BaseModel] | None = None
    candidates: list[type[BaseModel]] = [part]
    for key in location:
        if isinstance(key, int):
            path += f"[{key}]"
            value = value[key] if isinstance(value, Sequence) and key < len(value) else None
            continue
        tagged = [model for model in candidates if key in _tags(model)]
        is_tag = tagged and len(candidates) > 1 and not (isinstance(value, Mapping) and key in value)
        if is_tag:
            candidates = tagged
            continue
        path += f".{key}" if path else key
        owner = candidates[0] if len(candidates) == 1 else None
        value = value.get(key) if isinstance(value, Mapping) else None
        field = owner.model_fields.get(key) if owner else None
        candidates = list(_models_in(field.annotation)) if field else []
    return path, owner


def _tags(model: type[BaseModel]) -> tuple[object, ...]:
    """The values that `kind` may have in this member of a union."""
    kind = model.model_fields.get("kind")
    return typing.get_args(kind.annotation) if kind else ()


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    """Every model class inside `X`, `X | None`, `tuple[X, ...]` and `Annotated[X, ...]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Annotated:
        arguments = arguments[:1]
    for argument in arguments:
        yield from _models_in(argument)
