"""Generation settings of a checkpoint: Hugging Face's `generation_config.json`, validated, with no hidden defaults."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moezoo.core.errors import DataError, SpecError, check_count, counted
from moezoo.core.files import read_bounded, reason_of
from moezoo.core.json_text import parse_json
from moezoo.core.reference.sampling import SamplingOptions

FILE = "generation_config.json"
_MAX_BYTES = 1_000_000

# Unsupported options that change the text, with the values that have no effect (null and empty have none either).
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
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
_UNSUPPORTED_IN_SAMPLING: dict[str, tuple[object, ...]] = {  # no effect on greedy decoding
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
_FILTERS = ("top_k", "top_p", "min_p")  # no effect on greedy decoding either
_READ = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "max_length",
    "eos_token_id", "pad_token_id",
}  # fmt: skip
_OFF: dict[str, tuple[float, ...]] = {"top_k": (0, -1), "top_p": (0,)}  # as vLLM and llama.cpp write it
_NO_EFFECT = {
    # added by the tokenizer; for encoders; for beam search only
    "bos_token_id", "decoder_start_token_id", "length_penalty", "early_stopping", "low_memory",
    # implementation, and additional outputs
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache", "prefill_chunk_size",
    "compile_config", "disable_compile", "continuous_batching_config", "renormalize_logits", "remove_invalid_values",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    # speculative decoding: the same text, faster
    "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
    # origin of the file
    "transformers_version", "generation_kwargs", "_from_model_config", "_commit_hash", "_name_or_path",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Default generation settings of a model; None where there is no default.

    Fields:
        temperature: 0 is greedy decoding, which a Hugging Face folder without `do_sample` means.
        top_k, top_p, min_p, repetition_penalty: as in SamplingOptions.
        max_new_tokens: number of tokens to generate.
        max_length: prompt and new tokens together; used if there is no `max_new_tokens`.
        end_tokens: end-of-sequence tokens; any of them ends a sequence.
        padding: token after the end of a sequence while others of the batch continue; None: repeat its end token.
        unsupported, unsupported_in_sampling: settings of the file that `options` refuses, for instance `num_beams 4`;
            the latter matter only if tokens are sampled.
        invalid: settings of the file whose value means nothing, by name; `options` and `new_tokens` refuse those that
            they would use.
        unknown: fields that are ignored, because transformers does not know them either.
        where: path of the file, for errors.
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
    unsupported: tuple[str, ...] = ()
    unsupported_in_sampling: tuple[str, ...] = ()
    invalid: Mapping[str, str] = field(default_factory=dict)
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
    ) -> SamplingOptions:
        """Return sampling options: each argument, or else this config's value, or else greedy decoding and no filter.

        Raises SpecError: a value out of range, or a file with unsupported or invalid settings.
        """
        given = {
            "do_sample": temperature,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        options = SamplingOptions(
            temperature=_first(temperature, self.temperature, 0.0),
            top_k=_first(top_k, self.top_k, None),
            top_p=_first(top_p, self.top_p, None),
            min_p=_first(min_p, self.min_p, None),
            repetition_penalty=_first(repetition_penalty, self.repetition_penalty, 1.0),
            seed=seed,
        )
        greedy = options.temperature == 0
        refused = self.unsupported + (() if greedy else self.unsupported_in_sampling)
        if refused:
            raise SpecError(
                f"unsupported generation settings; got {', '.join(refused)} in {self.where}; expected none of them, "
                "because the text would differ. Remove them from a copy of the file, or replace `model.generation`."
            )
        self._refuse_invalid(
            name for name, value in given.items() if value is None and not (greedy and name in _FILTERS)
        )
        return options

    def _refuse_invalid(self, used: Iterable[str]) -> None:
        wrong = [self.invalid[name] for name in used if name in self.invalid]
        if wrong:
            raise SpecError(
                f"invalid generation settings; got {', '.join(wrong)} in {self.where}. Fix a copy of the file, or pass "
                "the setting."
            )

    def new_tokens(self, requested: int | None, prompt: int, default: int) -> int:
        """Return the number of tokens to generate: `requested`, or else this config's, or else `default`.

        `prompt` is the number of tokens in the prompt. `max_length` can only lower `default`.

        Raises DataError: the prompt already has `max_length` tokens. Raises SpecError: an invalid setting of the file;
        `requested` is no number of tokens.
        """
        if requested is not None:
            check_count("max_new_tokens", requested, 0)
            return int(requested)
        self._refuse_invalid(["max_new_tokens"] if self.max_new_tokens is None else [])
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        self._refuse_invalid(["max_length"])
        if self.max_length is None:
            return default
        if prompt >= self.max_length:
            raise DataError(
                f"the prompt has {counted(prompt, 'token')}, but max_length, which includes the prompt, is "
                f"{self.max_length} ({self.where}). Set the number of new tokens (max_new_tokens)."
            )
        return min(default, self.max_length - prompt)

    def ending_with(self, token: int | None) -> "GenerationConfig":
        """Return a copy with this end token, usually the tokenizer's, if the config has none."""
        return self if self.end_tokens or token is None else replace(self, end_tokens=(token,))


def read_generation_config(folder: Path, model_config: Mapping[str, Any]) -> GenerationConfig:
    """Read `generation_config.json` of a Hugging Face folder; without the file, greedy decoding and no limits.

    End and padding tokens come from the file, or else from `model_config` (config.json) or its `text_config`. Without
    `do_sample`, decoding is greedy whatever the temperature is. `top_k` 0 or -1 and `top_p` 0 are off.

    Differs: with `do_sample` and no `top_k`, transformers keeps the 50 most probable tokens, and without any length it
    generates until 20 tokens in total; here a setting that is not in the file is off.

    Raises SpecError: not JSON.
    """
    file = folder / FILE
    raw = _read_json(file) if os.path.lexists(file) else {}
    where = str(file)
    fields = _Fields(raw, model_config)
    return GenerationConfig(
        temperature=fields.sampling("temperature", 1.0) if fields.flag("do_sample") else 0.0,
        top_k=fields.sampling("top_k"),
        top_p=fields.sampling("top_p"),
        min_p=fields.sampling("min_p"),
        repetition_penalty=fields.sampling("repetition_penalty"),
        max_new_tokens=fields.count("max_new_tokens"),
        max_length=fields.count("max_length"),
        end_tokens=fields.token_ids("eos_token_id"),
        padding=next(iter(fields.token_ids("pad_token_id")), None),
        unsupported=_effective(raw, _UNSUPPORTED),
        unsupported_in_sampling=_effective(raw, _UNSUPPORTED_IN_SAMPLING),
        invalid=fields.invalid,
        unknown=tuple(sorted(raw.keys() - _READ - _NO_EFFECT - _UNSUPPORTED.keys() - _UNSUPPORTED_IN_SAMPLING.keys())),
        where=where,
    )


class _Fields:
    """The fields of the file, typed; null counts as missing, and so does an invalid value, noted in `invalid`."""

    def __init__(self, raw: Mapping[str, Any], model_config: Mapping[str, Any]) -> None:
        self._raw, self._model_config = raw, model_config
        self.invalid: dict[str, str] = {}

    def flag(self, name: str) -> bool:
        value = self._raw.get(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        self._refuse(name, value, "true or false")
        return False

    def count(self, name: str) -> int | None:
        value = _whole(self._raw.get(name))
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return value
        self._refuse(name, value, "an integer >= 0")
        return None

    def sampling(self, name: str, default: Any = None) -> Any:
        """Return a field of SamplingOptions, within its range; None if it is off."""
        value = _whole(self._raw.get(name))
        if value is None or (not isinstance(value, bool) and value in _OFF.get(name, ())):
            return default if value is None else None
        try:
            SamplingOptions(**{name: value})
            return value if name == "top_k" else float(value)
        except SpecError as error:
            self._refuse(name, self._raw[name], str(error).partition("; expected ")[2].rstrip("."))
            return None

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Return one token id or a list, from the first source that has any. Some files use a negative id for none."""
        sources = [self._raw, self._model_config]
        for inner in ("thinker_config", "text_config"):
            if isinstance(sources[-1].get(inner), Mapping):
                sources.append(sources[-1][inner])
        for source in sources:
            value = source.get(name)
            ids = [_whole(index) for index in (value if isinstance(value, list) else [] if value is None else [value])]
            if not all(isinstance(index, int) and not isinstance(index, bool) for index in ids):
                self._refuse(name, value, "a token id or a list of them")
            elif ids:
                return tuple(dict.fromkeys(index for index in ids if index >= 0))
        return ()

    def _refuse(self, name: str, value: object, rule: str) -> None:
        self.invalid[name] = f"{name} {value!r:.80} (expected {rule})"


def _whole(value: Any) -> Any:
    """Return a whole number that is written as a float (50.0) as an integer, anything else unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _effective(raw: Mapping[str, Any], table: Mapping[str, tuple[object, ...]]) -> tuple[str, ...]:
    """List the fields of the table whose value has an effect: `num_beams 4`."""
    return tuple(
        f"{name} {value!r:.80}"
        for name, value in raw.items()
        if name in table and value is not None and value != [] and value != {} and value not in table[name]
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = parse_json(read_bounded(file, _MAX_BYTES))
    except (OSError, ValueError) as error:
        raise SpecError(
            f"{file} cannot be read; got: {reason_of(error)}; expected a few lines of JSON. Fix or remove the file."
        ) from None
    if not isinstance(raw, dict):
        raise SpecError(f"{file} is not a mapping; got {type(raw).__name__}; expected fields by name. Fix the file.")
    return raw


def _first(argument: Any, configured: Any, default: Any) -> Any:
    return argument if argument is not None else configured if configured is not None else default
