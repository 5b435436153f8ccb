"""How a folder says that its model generates: Hugging Face's `generation_config.json`, read and never guessed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.core.errors import DataError, SpecError
from moezoo.core.reference.sampling import SamplingOptions

FILE = "generation_config.json"
_MAX_BYTES = 1_000_000

# What would change the text and is not done here, and the values with which it changes nothing (null and empty too).
_NOT_DONE: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "encoder_repetition_penalty": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "force_words_ids": (),
    "constraints": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_return_sequences": (1,),
    "stop_strings": (),
    "max_time": (),
    "token_healing": (False,),
    "watermarking_config": (),
    "dola_layers": (),
}
_NOT_DONE_IN_SAMPLING: dict[str, tuple[object, ...]] = {  # greedy text does not depend on these
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
_READ = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "max_length",
    "eos_token_id", "pad_token_id",
}  # fmt: skip
_HARMLESS = {
    # the tokenizer adds it; encoders; beams alone
    "bos_token_id", "decoder_start_token_id", "length_penalty", "early_stopping", "low_memory",
    # how it is computed and what else is returned
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache", "prefill_chunk_size",
    "compile_config", "disable_compile", "continuous_batching_config", "renormalize_logits", "remove_invalid_values",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    # drafts that a model verifies: the same text, sooner
    "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
    # where it comes from
    "transformers_version", "generation_kwargs", "_from_model_config", "_commit_hash", "_name_or_path",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What a folder says about generating; None where it says nothing.

    Fields:
        temperature: 0 is greedy, which is what a Hugging Face folder means that does not ask for `do_sample`.
        top_k, top_p, min_p, repetition_penalty: as in SamplingOptions.
        max_new_tokens: how many to add where the caller does not say.
        max_length: prompt and new tokens together, where neither the caller nor `max_new_tokens` says.
        end_tokens: any of these ends a sequence.
        padding: what follows the end of a sequence while others go on; None: its end token again.
        special_tokens: prompts get the special tokens that the tokenizer adds by itself (a first `<s>`).
        not_done, not_done_in_sampling: what the folder asks for and `options` refuses, such as `num_beams 4`.
        unknown: fields that transformers does not know either, and ignores as we do.
        where: the file, in errors.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    end_tokens: tuple[int, ...] = ()
    padding: int | None = None
    special_tokens: bool = False
    not_done: tuple[str, ...] = ()
    not_done_in_sampling: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    where: str = FILE

    def options(
        self,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
        otherwise: float = 0.0,
    ) -> SamplingOptions:
        """What is given, else what the folder says, else `otherwise` as the temperature and no filter.

        Raises SpecError: a value out of range, or a folder that asks for what is not done here.
        """
        options = SamplingOptions(
            temperature=_first(temperature, self.temperature, otherwise),
            top_k=_first(top_k, self.top_k, None),
            top_p=_first(top_p, self.top_p, None),
            min_p=_first(min_p, self.min_p, None),
            repetition_penalty=_first(repetition_penalty, self.repetition_penalty, 1.0),
            seed=seed,
        )
        refused = self.not_done + (() if options.temperature == 0 else self.not_done_in_sampling)
        if refused:
            raise SpecError(
                f"{self.where} asks for {', '.join(refused)}, which is not done here; expected neither, since the text "
                "would be another one. Take it out of a copy of the file, or replace `model.generation`."
            )
        return options

    def new_tokens(self, asked: int | None, prompt: int, otherwise: int) -> int:
        """How many tokens to add to a prompt of so many: what is asked, else what the folder says, else `otherwise`.

        `max_length` only ever lowers `otherwise`. Raises DataError for a prompt that is as long.
        """
        if asked is not None:
            return asked
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return otherwise
        if prompt >= self.max_length:
            raise DataError(
                f"the prompt has {prompt} tokens, and max_length, which counts it, is {self.max_length} "
                f"({self.where}). Say how many tokens to add (max_new_tokens)."
            )
        return min(otherwise, self.max_length - prompt)

    def ending_with(self, token: int | None) -> "GenerationConfig":
        """The same, with this end token where the folder names none: the tokenizer's, asked last."""
        return self if self.end_tokens or token is None else replace(self, end_tokens=(token,))


def read_generation_config(folder: Path, model_config: Mapping[str, Any]) -> GenerationConfig:
    """`generation_config.json` of a Hugging Face folder, or what holds where there is none.

    End and padding tokens are those of the file, else those of `model_config` (config.json), of a wrapper's
    `text_config` too. Without `do_sample` generation is greedy, whatever temperature is written; `top_k` 0 is off.

    Differs: where `do_sample` is set and `top_k` is not written, transformers keeps the 50 most probable tokens; here
    no filter is on that nobody wrote. Where nothing is said of lengths, it adds up to 20 tokens in all.

    Raises SpecError: not JSON, a field of a wrong type or out of range.
    """
    file = folder / FILE
    raw = _read_json(file) if file.is_file() else {}
    where = str(file)
    fields = _Fields(raw, where)
    temperature = fields.number("temperature", 1.0) if fields.flag("do_sample") else 0.0
    found = GenerationConfig(
        temperature=temperature,
        top_k=fields.integer("top_k") or None,
        top_p=fields.number("top_p", None),
        min_p=fields.number("min_p", None),
        repetition_penalty=fields.number("repetition_penalty", None),
        max_new_tokens=fields.integer("max_new_tokens"),
        max_length=fields.integer("max_length"),
        end_tokens=_token_ids("eos_token_id", raw, model_config, where),
        padding=next(iter(_token_ids("pad_token_id", raw, model_config, where)), None),
        special_tokens=True,
        not_done=_asked(raw, _NOT_DONE),
        not_done_in_sampling=_asked(raw, _NOT_DONE_IN_SAMPLING),
        unknown=tuple(sorted(raw.keys() - _READ - _HARMLESS - _NOT_DONE.keys() - _NOT_DONE_IN_SAMPLING.keys())),
        where=where,
    )
    try:
        replace(found, not_done=(), not_done_in_sampling=()).options(temperature=fields.number("temperature", None))
    except SpecError as error:
        raise SpecError(f"{error} ({where})") from None
    return found


class _Fields:
    """Fields of the file by type; null is as if not there."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._raw, self._where = raw, where

    def flag(self, name: str) -> bool:
        value = self._raw.get(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self._refused(name, "true or false")

    def integer(self, name: str) -> int | None:
        value = self._raw.get(name)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return value
        raise self._refused(name, "an integer >= 0")

    def number(self, name: str, default: float | None) -> float | None:
        value = self._raw.get(name)
        if value is None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
            return float(value)
        raise self._refused(name, "a finite number")

    def _refused(self, name: str, rule: str) -> SpecError:
        return SpecError(f"{name} is {self._raw[name]!r}; expected {rule} or null ({self._where}). Mend the file.")


def _asked(raw: Mapping[str, Any], table: Mapping[str, tuple[object, ...]]) -> tuple[str, ...]:
    """`num_beams 4`: fields of the table with a value that changes something."""
    return tuple(
        f"{name} {value!r}"
        for name, value in raw.items()
        if name in table and value is not None and value != [] and value != {} and value not in table[name]
    )


def _token_ids(name: str, raw: Mapping[str, Any], model_config: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """One id or a list of them, from the first place that has some. An id below 0 is how some files write none."""
    inner = model_config.get("text_config")
    for place, source in (
        (where, raw),
        ("config.json", model_config),
        ("config.json: text_config", inner if isinstance(inner, Mapping) else {}),
    ):
        value = source.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(index, int) and not isinstance(index, bool) for index in ids):
            raise SpecError(f"{name} is {value!r}; expected a token id, a list of them, or null ({place}). Mend it.")
        if ids:
            return tuple(dict.fromkeys(index for index in ids if index >= 0))
    return ()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise SpecError(f"{file} is larger than {_MAX_BYTES} bytes; expected a few lines of JSON. Mend it.")
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{file} cannot be read; got {error}; expected JSON. Mend or remove it.") from None
    if not isinstance(raw, dict):
        raise SpecError(f"{file} is not a mapping; got {type(raw).__name__}; expected fields by name. Mend it.")
    return raw


def _first(given: Any, said: Any, otherwise: Any) -> Any:
    return given if given is not None else said if said is not None else otherwise
