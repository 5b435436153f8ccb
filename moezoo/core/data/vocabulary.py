"""Vocabulary size of a config's model from the tokenizer or the data, if they are on this machine."""

from moezoo.core.config.run_config import Config
from moezoo.core.config.vocabulary import sized, spec_with_vocab_size
from moezoo.core.data.prepare import tokenizer_on_this_machine
from moezoo.core.spec import ModelSpec


def spec_with_real_vocab_size(config: Config, where: str = "config") -> tuple[ModelSpec, str | None]:
    """Return the spec with a vocabulary size, and a note if the size is an assumption: see `spec_with_vocab_size`.

    Nothing is assumed if `tokenizer_on_this_machine` has the tokenizer, whose errors are raised.
    """
    if config.model.vocab_size is None and config.data.tokenizer.kind in ("character", "huggingface"):
        tokenizer = tokenizer_on_this_machine(config.data, where)
        if tokenizer is not None:
            return sized(config.model, tokenizer.vocab_size), None
    return spec_with_vocab_size(config)
