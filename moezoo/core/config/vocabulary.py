"""Vocabulary size of a model whose config does not set it."""

from typing import assert_never

from moezoo.core.config.data import ByteTokenizerSpec, CharacterTokenizerSpec, HuggingFaceTokenizerSpec, TokenIdsSpec
from moezoo.core.config.run_config import Config
from moezoo.core.errors import SpecError
from moezoo.core.spec import ModelSpec

ASSUMED_CHARACTERS = 64
_ASSUMED_SUBWORDS = 32_768


def with_vocab_size(config: Config, vocab_size: int, where: str = "config") -> Config:
    """Return the config with `model.vocab_size` set from the tokenizer.

    A larger size in the config is kept: the rows of the embedding that no token has are padding.

    Raises SpecError: the config has a smaller size, or too few ids with logits.
    """
    model = config.model
    if model.vocab_size is None:
        return config.model_copy(update={"model": sized(model, vocab_size)})
    if model.num_logits < vocab_size:
        unused = f" with {model.head.unused} unused ids (model.head.unused)" if model.head.unused else ""
        raise SpecError(
            f"model.vocab_size is {model.vocab_size}{unused}, but the tokenizer ({config.data.tokenizer.kind}) has "
            f"{vocab_size} tokens ({where}). Use at least {vocab_size + model.head.unused}, or null to follow the "
            "tokenizer."
        )
    return config


def sized(spec: ModelSpec, num_tokens: int) -> ModelSpec:
    """Return the spec with a vocabulary of `num_tokens` that have logits, and the head's unused ids."""
    return spec.model_copy(update={"vocab_size": num_tokens + spec.head.unused})


def spec_with_vocab_size(config: Config, *, assumed_subwords: int = _ASSUMED_SUBWORDS) -> tuple[ModelSpec, str | None]:
    """Return the spec with a vocabulary size, without reading data, and a note if the size is an assumption.

    `assumed_subwords`: the size assumed for a Hugging Face tokenizer, which is not opened.
    """
    spec, tokenizer = config.model, config.data.tokenizer
    if spec.vocab_size is not None:
        return spec, None
    assumed = None
    match tokenizer:
        case ByteTokenizerSpec():
            size = 256
        case TokenIdsSpec():
            size = tokenizer.vocab_size
        case CharacterTokenizerSpec():
            size = ASSUMED_CHARACTERS
            assumed = (
                f"a vocabulary of {size} tokens; the real size of a character tokenizer depends on the data, which is "
                "not on this machine or large (--set model.vocab_size=N)"
            )
        case HuggingFaceTokenizerSpec(path=path):
            size = assumed_subwords
            assumed = (
                f"a vocabulary of {size:,} tokens; {path} is not a tokenizer on this machine (--set model.vocab_size=N)"
            )
        case _:
            assert_never(tokenizer)
    return sized(spec, size), assumed
