"""Reader of config.json: every field is parsed, known to be harmless, or rejected by name; none is ignored."""

import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moezoo.core.errors import CheckpointError, SpecError
from moezoo.core.files import read_bounded, reason_of
from moezoo.core.json_text import parse_json
from moezoo.core.spec.model import MAX_LAYERS

_MAX_BYTES = 10_000_000

_MOST_NAMED = 10  # unknown fields in an error
# Larger values are errors or malicious: the spec would be expanded to that many layers before any shape is checked.
_LARGEST, _LARGEST_NUMBER = 2**53, 1e300
_MOST = {"layer": MAX_LAYERS, "expert": 100_000}

# Fields that never affect a text model's forward pass, with any value.
HARMLESS = (
    "architectures",
    "auto_map",
    "*token_id",
    "*_token_ids",
    "chunk_size_feed_forward",
    "dtype",
    "ep_size",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "max_length",
    "model_type",
    "mtp_*",  # multi-token prediction: its layers are kept verbatim
    "name_or_path",
    "_name_or_path",
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "_attn_implementation*",
    "unsloth_*",
    "use_cache",
)
# Defaults that transformers 4 writes into every config inside a multimodal wrapper (generation options, options of
# encoders): harmless with these values. No family here reads them; a field that a family reads is not looked up here.
_USUAL: Mapping[str, Any] = {
    "add_cross_attention": False,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "is_decoder": False,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_scores": False,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict_in_generate": False,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "top_k": 50,
    "top_p": 1.0,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}
# Fields of a multimodal wrapper's config, outside its text_config.
_OUTER_HARMLESS = (
    *HARMLESS,
    "text_config",
    "*vision*",
    "*audio*",
    "*image*",
    "*video*",
    "*projector*",
    "alignment_intermediate_size",  # of Cohere's projector, as the next one
    "downsample_factor",
    "merged_hidden_size",  # of MiniMax-M3's projector
    "ignore_index",  # of Kimi-VL and Kimi-K2.5, as the next one
    "projection_*",
    "boa_*",
    "boi_*",
    "eoa_*",
    "eoi_*",
    *("thinker_config", "talker_config", "code2wav_config", "position_id_per_seconds", "seconds_per_chunk"),  # Omni's
)
INNER = ("thinker_config", "text_config")
"""Objects of a multimodal wrapper's config that lead to the text model's, each inside of the one before."""


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the text model's object in a multimodal wrapper's config.json; of any other config itself."""
    for name in INNER:
        inner = config.get(name)
        config = inner if isinstance(inner, dict) else config
    return config


class Fields:
    """Fields of a config.json (of its `text_config` in a multimodal wrapper), which tracks the fields that are read.

    A field that is absent or null takes the caller's default; without a default it is required. Raises SpecError in
    one line with field, value and file. `max_length`: maximum sequence length, for RoPE scaling that depends on it;
    None if the caller did not set one.
    """

    def __init__(self, values: Mapping[str, Any], where: str, max_length: int | None = None):
        self.where = where
        self.max_length = max_length
        self.raw = dict(values)
        self._seen: dict[str, None] = {}
        self.notes: list[str] = []
        values = {name: _with_floats(value) for name, value in values.items()}
        self._values: dict[str, Any] = values
        around: list[Mapping[str, Any]] = []
        for name in INNER:
            if isinstance(self._values.get(name), Mapping):
                around.append(self._values)
                self._values = dict(self._values[name])
        for outer in around:
            if "tie_word_embeddings" in outer:  # the outer value of a wrapper takes precedence
                self._values["tie_word_embeddings"] = outer["tie_word_embeddings"]
            for name in ("quantization", "quantization_config"):
                if name in outer:
                    self._values.setdefault(name, outer[name])
            self._refuse_unread(
                {key: value for key, value in outer.items() if key not in self._values}, _OUTER_HARMLESS
            )

    @classmethod
    def read(cls, path: Path, max_length: int | None = None) -> "Fields":
        """Read a file. Raises CheckpointError if it does not exist, SpecError if it is not a JSON object."""
        try:
            values = parse_json(read_bounded(path, _MAX_BYTES))
        except FileNotFoundError:
            raise CheckpointError(f"there is no {path.name} in {path.parent}. Use a checkpoint folder.") from None
        except (OSError, ValueError) as error:
            raise SpecError(f"{path} cannot be read as JSON ({reason_of(error)}). Fetch it again.") from None
        if not isinstance(values, dict):
            raise SpecError(f"{path} is {type(values).__name__}; expected a JSON object. Fetch it again.")
        return cls(values, str(path), max_length)

    @property
    def model_type(self) -> str:
        """The config's `model_type`; in a multimodal wrapper that of the text model. May be empty."""
        return str(self._values.get("model_type") or self.raw.get("model_type") or "")

    @property
    def last(self) -> str:
        """Name of the field that was read last."""
        return next(reversed(self._seen), "none")

    # --- reading a field -----------------------------------------------------------------------------------------

    def _saw(self, name: str) -> None:
        self._seen.pop(name, None)
        self._seen[name] = None

    def __contains__(self, name: str) -> bool:
        """Return True if the field is present and not null; this counts as reading it."""
        return self.get(name) is not None

    def get(self, name: str, default: Any = None, likely: Sequence[Any] = ()) -> Any:
        """Return the field's JSON value. `likely`: values with another effect than the default, for the inverse."""
        self._saw(name)
        value = self._values.get(name)
        return default if value is None else value

    def null(self, name: str) -> bool:
        """Return True if the field is present and null, for fields where null differs from absent."""
        self._saw(name)
        return name in self._values and self._values[name] is None

    def integer(self, name: str, default: int | None = None) -> int:
        """Return an integer field, at least 0; 16.0 counts as 16."""
        value = _whole(self._required(name, default))
        most = next((most for word, most in _MOST.items() if word in name), _LARGEST)
        if type(value) is not int or not 0 <= value <= most:
            bound = "" if type(value) is not int else " of at least 0" if value < 0 else f" of at most {most}"
            raise self.refuse(name, f"an integer{bound}")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """Return an integer field, at least 1."""
        value = self.integer(name, default)
        if value < 1:
            raise self.refuse(name, "an integer of at least 1")
        return value

    def count_or_null(self, name: str, default: int | None = None) -> int | None:
        """Return an integer field, at least 1, or None if it is null; `default` applies only if it is absent."""
        self._saw(name)
        value = _whole(self._values.get(name, default))
        if value is not None and (type(value) is not int or not 1 <= value <= _LARGEST):
            raise self.refuse(name, "an integer of at least 1, or null")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a field that is a finite number."""
        value = self._required(name, default)
        if type(value) not in (int, float) or not -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER:  # NaN fails too
            raise self.refuse(name, "a number")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """Return a boolean field."""
        value = self._required(name, default)
        if type(value) is not bool:
            raise self.refuse(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Return a string field."""
        value = self._required(name, default)
        if type(value) is not str:
            raise self.refuse(name, "a string")
        return value

    def choice(self, name: str, known: Mapping[str, Any], default: str | None = None) -> Any:
        """Return the value that `known` maps a string field to. Raises SpecError for any other string."""
        value = self.text(name, default)
        if value not in known:
            raise self.refuse(name, f"one of {', '.join(known)}")
        return known[value]

    def items(
        self, name: str, length: int, default: Sequence[Any] | None = None, known: Sequence[Any] = ()
    ) -> list[Any]:
        """Return a list field with one item per layer (`length`), each one of `known` if there are any."""
        value = self._required(name, None if default is None else list(default))
        if type(value) is not list or len(value) != length:
            raise self.refuse(name, f"a list of {length} items, one per layer")
        if known and any(item not in known for item in value):
            raise self.refuse(name, f"each layer to be one of {', '.join(map(str, known))}")
        return list(value)

    def counts(self, name: str, length: int, default: int | None = None) -> list[int]:
        """Return an integer of at least 1 per layer (`length`), from a list or from one number for all layers."""
        if not isinstance(self.get(name), list):
            return [self.count(name, default)] * length
        self.items(name, length)
        numbers = self.integers(name)
        if any(number < 1 for number in numbers):
            raise self.refuse(name, "integers of at least 1")
        return numbers

    def integers(self, name: str, default: Sequence[int] = ()) -> list[int]:
        """Return a field that is a list of integers, each at least 0."""
        value = self._required(name, list(default))
        found = [_whole(item) for item in value] if type(value) is list else None
        if found is None or any(type(item) is not int or item < 0 for item in found):
            raise self.refuse(name, "a list of integers of at least 0")
        return found

    def either(self, *names: str) -> str:
        """Return whichever alias of a field is present (the first if none is); aliases must have equal values."""
        there = [name for name in names if name in self]
        for name in there[1:]:
            self.expect(name, self.get(there[0]))
        return there[0] if there else names[0]

    def agree(self, name: str, value: Any, older: Mapping[str, Any]) -> None:
        """Check that a field, if present, has the value that follows from older spellings of it that are present too.

        `older`: each with the default that transformers writes beside any value of the field, which therefore means
        nothing; None if it writes none.
        """
        there = [other for other, written in older.items() if other in self and self.get(other) != written]
        if there and name in self and self.get(name) != value:
            says = " and ".join(f"{other} {json.dumps(self.get(other)):.80}" for other in there)
            raise self.refuse(name, f"{json.dumps(value):.120}, which follows from {says}")

    def expect(self, name: str, *values: Any, because: str = "") -> None:
        """Check that the field is absent, null, or one of these values; no other is supported, for the given reason."""
        value = self.get(name)
        if value is not None and value not in values:
            known = " or ".join(json.dumps(each) for each in values) if values else "none"
            raise self.refuse(name, f"{known}, because {because}" if because else known)

    def only_in_training(self, name: str) -> None:
        """Read a training-only field, such as a dropout rate, that moezoo does not apply; adds a note if it is set."""
        if self.get(name):
            self.notes.append(f"{name} {self.get(name)} is not supported: moezoo trains without it")

    def inside(self, name: str, default: Mapping[str, Any] | None = None) -> "Fields | None":
        """Return the fields of a nested object (`rope_scaling`), or None; call `finish` on them too."""
        value = self.get(name, default)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.refuse(name, "a JSON object")
        return Fields(value, f"{self.where}, {name}")

    def refuse(self, name: str, expected: str) -> SpecError:
        """Return the error for a field's value."""
        got = json.dumps(self._values.get(name))
        return SpecError(f"{name} is {got:.200}; expected {expected} ({self.where}).")

    @property
    def present(self) -> dict[str, Any]:
        """The fields that are there and not null."""
        return {name: value for name, value in self._values.items() if value is not None}

    @property
    def understood(self) -> list[str]:
        """Fields that are present and have been read, in file order."""
        return [name for name, value in self._values.items() if name in self._seen and value is not None]

    @property
    def no_effect(self) -> list[str]:
        """Fields that are present and have not been read; after `finish`, all of them are known to be harmless."""
        return [name for name, value in self._values.items() if name not in self._seen and value is not None]

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Raise SpecError if there are unread fields that are not known to be harmless."""
        unread = {key: value for key, value in self._values.items() if key not in self._seen}
        self._refuse_unread(unread, (*HARMLESS, *harmless))

    def _refuse_unread(self, unread: Mapping[str, Any], harmless: Iterable[str]) -> None:
        patterns = tuple(harmless)
        unknown = [
            name
            for name, value in unread.items()
            if value is not None
            and value != _USUAL.get(name, ...)
            and not any(fnmatchcase(name, pattern) for pattern in patterns)
        ]
        if unknown:
            named = ", ".join(f"{name:.80} {json.dumps(unread[name]):.80}" for name in sorted(unknown)[:_MOST_NAMED])
            named += f" and {len(unknown) - _MOST_NAMED} more" if unknown[_MOST_NAMED:] else ""
            raise SpecError(
                f"config.json has fields that are unknown for this family: {named} ({self.where}). If they do not "
                "affect the computation, list them as harmless in moezoo/core/huggingface/families; otherwise this "
                "model is not supported yet."
            )

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            raise SpecError(f"{name} is missing ({self.where}). Fetch the checkpoint's config.json again.")
        return value


def _with_floats(value: Any) -> Any:
    """Return JSON with the numbers that transformers writes as objects, such as `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {name: _with_floats(inner) for name, inner in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def _whole(value: Any) -> Any:
    """Return a whole number that is written as a float (16.0) as an integer, anything else unchanged."""
    return int(value) if type(value) is float and value.is_integer() else value
