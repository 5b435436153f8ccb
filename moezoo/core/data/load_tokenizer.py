"""Loading of saved tokenizers, from run folders and folders of Hugging Face models."""

import os
from pathlib import Path

from moezoo.core.data.huggingface_tokenizer import HuggingFaceTokenizer
from moezoo.core.data.tokenizer_files import read_object
from moezoo.core.data.tokenizers import (
    TOKENIZER_FILE,
    TOKENIZER_FOLDER,
    ByteTokenizer,
    CharacterTokenizer,
    TokenIds,
    Tokenizer,
    tokenizer_file,
)
from moezoo.core.errors import TokenizerError, nearest
from moezoo.core.files import located


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a run folder, its `tokenizer.json`, or the folder of a Hugging Face tokenizer.

    Raises TokenizerError: no tokenizer, not JSON, an unknown kind, an invalid vocabulary.
    """
    path = Path(path)
    file = tokenizer_file(path)
    if not os.path.lexists(file):
        if path.is_dir() and os.path.lexists(path / "tokenizer_config.json"):
            return HuggingFaceTokenizer(str(path))
        raise TokenizerError(
            f"no tokenizer; got {located(path)}; expected a run folder with {TOKENIZER_FILE}. Check the path."
        )
    saved = read_object(file)
    if "kind" not in saved and "model" in saved:  # written by the tokenizers library under the same name
        return HuggingFaceTokenizer(str(file.parent))
    match saved.get("kind"):
        case "character" if isinstance(saved.get("characters"), str):
            return CharacterTokenizer(saved["characters"])
        case "byte":
            return ByteTokenizer()
        case "ids" if isinstance(saved.get("vocab_size"), int) and saved["vocab_size"] > 0:
            return TokenIds(saved["vocab_size"])
        case "huggingface":
            return HuggingFaceTokenizer(str(file.parent / TOKENIZER_FOLDER))
        case kind:
            kinds = ["character", "byte", "huggingface", "ids"]
            raise TokenizerError(
                f"tokenizer is incomplete or of an unknown kind; got kind {kind!r:.80} with the keys "
                f"{sorted(saved)!s:.200} in {file}; expected one of {', '.join(kinds)}{nearest(str(kind), kinds)}. "
                "Fix it."
            )


def tokenizer_of_model_folder(folder: Path, vocab_size: int) -> Tokenizer:
    """Load the tokenizer of a Hugging Face model's folder; `TokenIds` if the folder has no `tokenizer.json`.

    `vocab_size` is that of the model, which may be larger than the tokenizer's (padding rows) or smaller (tokens used
    only by other parts of a larger model). Raises TokenizerError.
    """
    return HuggingFaceTokenizer(str(folder)) if os.path.lexists(folder / TOKENIZER_FILE) else TokenIds(vocab_size)


def tokenizer_notes(tokenizer: Tokenizer) -> list[str]:
    """Return one-line notes for the user: a tokenizer.json that transformers would not encode by."""
    difference = tokenizer.difference if isinstance(tokenizer, HuggingFaceTokenizer) else None
    return [] if difference is None else [f"text is encoded as the tokenizer's files say; {difference}"]
