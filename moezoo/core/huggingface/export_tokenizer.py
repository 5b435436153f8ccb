"""The tokenizer of an exported folder: its files, and the special tokens that the folder's configs name."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.data.load_tokenizer import tokenizer_of_model_folder
from moezoo.core.data.tokenizer_files import tokenizer_files
from moezoo.core.data.tokenizers import MAX_FILE_BYTES, TokenIds, Tokenizer
from moezoo.core.errors import TokenizerError
from moezoo.core.files import make_folder, read_bounded, write_atomically
from moezoo.core.huggingface.family import family_of
from moezoo.core.huggingface.fields import Fields, text_config
from moezoo.core.huggingface.folder import read_json_object
from moezoo.core.huggingface.layout import CONFIG, Layout


@dataclass(frozen=True)
class ExportedTokenizer:
    """The tokenizer that a run used, as an export writes it.

    Fields:
        files: content by name, for instance `tokenizer.json`.
        special_tokens: `eos_token_id`, `bos_token_id` and `pad_token_id`; None where the tokenizer has none, since the
            families' own defaults (2 in Mixtral's) would end a text anywhere.
    """

    files: Mapping[str, bytes]
    special_tokens: Mapping[str, int | None]

    def write(self, folder: Path) -> None:
        """Write the files into a folder, and the special tokens into its config.json and generation_config.json.

        A token on which the computation depends stays in config.json.
        """
        for name, content in self.files.items():
            make_folder((folder / name).parent)
            write_atomically(folder / name, content)
        config = read_json_object(folder / CONFIG)
        computed = family_of(Fields(config, CONFIG)).computed_tokens
        tokens = {name: token for name, token in self.special_tokens.items() if name not in computed}
        text = text_config(config)
        if text is not config:
            text.update({name: token for name, token in tokens.items() if name in text})
        write_atomically(folder / CONFIG, json.dumps(config | tokens, indent=2) + "\n")
        generation = folder / "generation_config.json"
        settings: dict[str, Any] = read_json_object(generation) if generation.is_file() else {}
        if settings or self.special_tokens["eos_token_id"] is not None:
            write_atomically(generation, json.dumps(settings | dict(self.special_tokens), indent=2) + "\n")


def exported_tokenizer(tokenizer: Tokenizer) -> ExportedTokenizer:
    """Return a tokenizer as an export writes it. Raises TokenizerError: no files give the same ids."""
    first = next(iter(tokenizer.first_tokens), None)
    padding = tokenizer.padding if isinstance(tokenizer, HuggingFaceTokenizer) else None
    tokens = {"eos_token_id": tokenizer.end_of_text, "bos_token_id": first, "pad_token_id": padding}
    return ExportedTokenizer(tokenizer.files(), tokens)


def is_own(tokenizer: Tokenizer, layout: Layout) -> bool:
    """Return whether a run's tokenizer is another than that of the Hugging Face checkpoint that it started from.

    It is the same if it has the same ids, special tokens and chat template. Ids without a tokenizer are taken for those
    of the checkpoint.
    """
    if isinstance(tokenizer, TokenIds):
        return False
    original = {name: read_bounded(file, MAX_FILE_BYTES) for name, file in tokenizer_files(layout.path).items()}
    if tokenizer.files() == original:
        return False
    try:
        return _identity(tokenizer) != _identity(tokenizer_of_model_folder(layout.path, layout.description.spec.vocab))
    except TokenizerError:
        return True  # damaged: what the run used counts


def _identity(tokenizer: Tokenizer) -> tuple[object, ...]:
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return (tokenizer.content_hash,)
    return (tokenizer.content_hash, tokenizer.chat_template)
