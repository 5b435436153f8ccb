"""The vocabulary size of a model whose config leaves it to the tokenizer."""

from typing import assert_never

from moezoo.core.config.data import ByteTokenizerSpec, CharacterTokenizerSpec, HuggingFaceTokenizerSpec, TokenIdsSpec
from moezoo.core.config.run_config import Config
from moezoo.core.errors import SpecError
from moezoo.core.spec import ModelSpec

ASSUMED_CHARACTERS = 64
_ASSUMED_SUBWORDS = 32_768


def with_vocab_size(config: Config, vocab_size: int, where: str = "config") -> Config:
    """Return the config with `model.vocab_size` set from the tokenizer.

    A larger size in the config is kept if the tokenizer is a Hugging Face one or the model comes from a checkpoint:
    such models have padding rows in the embedding.

    Raises SpecError: the config has another size.
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
        case TokenIdsSpec(vocab_size=given):
            size = given
        case CharacterTokenizerSpec():
            size = ASSUMED_CHARACTERS
            assumed = f"{size} tokens in the vocabulary; a character tokenizer takes them from its data"
        case HuggingFaceTokenizerSpec(path=path):
            size = assumed_subwords
            assumed = f"{size:,} tokens in the vocabulary; that of {path} is not read here (--set model.vocab_size=N)"
        case _:
            assert_never(tokenizer)
    return spec.model_copy(update={"vocab_size": size}), assumed
