"""Files of a Hugging Face tokenizer, and their loading by the rules of tokenizer.json.

transformers' AutoTokenizer takes from tokenizer.json only the vocabulary in many families, and rebuilds normalizer,
pre-tokenizer and decoder from the class that tokenizer_config.json or config.json names; the ids are then others than
those that the model was trained on, without a word. Here the file's own rules are used in every family.
"""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moezoo.core.data.tokenizer_rules import check_rules, first_line, library_errors
from moezoo.core.data.tokenizers import MAX_FILE_BYTES, TOKENIZER_FILE
from moezoo.core.errors import TokenizerError
from moezoo.core.extras import check_installed
from moezoo.core.files import located, open_regular, read_bounded, reason_of
from moezoo.core.hub import Snapshot, hub_id, readable_errors
from moezoo.core.json_text import parse_json

TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATES = "additional_chat_templates"
TEXT_FILES = (
    *(TOKENIZER_FILE, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
"""Files that decide the tokens of a text or of a conversation, in a repository that has a tokenizer.json."""

_NAMES = (*TEXT_FILES, "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return the tokenizer's files in a folder, by name: vocabulary, special tokens, and chat templates."""
    names = [*_NAMES, *(f"{TEMPLATES}/{file.name}" for file in sorted((folder / TEMPLATES).glob("*.jinja")))]
    return {name: folder / name for name in names if (folder / name).is_file()}


def tokenizer_folder(path: str, *, ask: bool = True) -> Path:
    """Return the folder of a tokenizer: a local one, or that of a hub id in the hub's cache, fetched first.

    `path`: a folder, the tokenizer.json in it, or a hub id. `ask`: whether the hub may be asked, or only its cache.

    Raises TokenizerError: no such folder or repository, or the hub does not answer and the cache lacks a file.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    expected = "expected a folder with a tokenizer.json, or a hub id, organization/name (data.tokenizer.path)"
    if local.is_file():
        if local.name == TOKENIZER_FILE:
            return local.parent
        raise TokenizerError(f"the tokenizer is a file; got {path}; {expected}. Put it into a folder, by that name.")
    repository = hub_id(path)
    if repository is None:
        raise TokenizerError(f"no such tokenizer; got {located(path)}; {expected}. Check the path.")
    with readable_errors(
        repository, TokenizerError, "Or use a local folder with a tokenizer.json (data.tokenizer.path)."
    ):
        snapshot = Snapshot(repository, ask=ask)
        folder = snapshot.fetch([*_NAMES, "config.json"], TEXT_FILES)
        snapshot.fetch([f"{TEMPLATES}/*.jinja"])
    return folder


class LoadedTokenizer(NamedTuple):
    """A tokenizer as transformers' object.

    Fields:
        inner: the object.
        folder: of its tokenizer.json; None if it was converted from other files.
        post_processor: the file's own, before `add_bos_token` was heeded.
    """

    inner: Any
    folder: Path | None
    post_processor: Any


def load_with_transformers(path: str) -> LoadedTokenizer:
    """Load a tokenizer by the rules of its tokenizer.json; special tokens and chat templates are in files beside it.

    A folder without tokenizer.json (sentencepiece, or vocab.json and merges.txt) is converted by AutoTokenizer.

    Raises TokenizerError.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # they recommend installing PyTorch
    check_installed("transformers", purpose=f"the tokenizer of {path}")
    try:
        folder = tokenizer_folder(path)
        _check_files(folder)
        exact = (folder / TOKENIZER_FILE).is_file()
        inner = _exact(folder) if exact else _converted(folder)
    except TokenizerError:
        raise
    except Exception as error:  # transformers and the hub client raise many types, from OSError to KeyError
        raise TokenizerError(
            f"the tokenizer cannot be loaded; got {path} ({first_line(error):.200}); expected a folder with a "
            "tokenizer.json, or a hub id that is cached or reachable (data.tokenizer.path). Check the name, "
            "or download its files to a folder and use that."
        ) from error
    if not getattr(inner, "is_fast", False):
        raise TokenizerError(
            f"the tokenizer has no tokenizer.json; got {path} ({type(inner).__name__}); expected a fast tokenizer "
            "(data.tokenizer.path). Convert it with transformers' convert_slow_tokenizer."
        )
    # Trap: a tokenizer.json can enable truncation and padding, which would silently truncate text.
    inner.backend_tokenizer.no_truncation()
    inner.backend_tokenizer.no_padding()
    post_processor = inner.backend_tokenizer.post_processor
    if _read_config(folder).get("add_bos_token") is True:
        _add_bos_token(inner)
    return LoadedTokenizer(inner, folder if exact else None, post_processor)


def _check_files(folder: Path) -> None:
    """Check that what transformers may read is regular and not too large. Raises TokenizerError."""
    for file in [*(folder / name for name in (*_NAMES, "config.json")), *(folder / TEMPLATES).glob("*.jinja")]:
        if os.path.lexists(file):
            try:
                open_regular(file, MAX_FILE_BYTES).close()
            except OSError as error:
                raise TokenizerError(
                    f"a file of the tokenizer cannot be read; got {file} ({reason_of(error)}). Replace or remove it."
                ) from None
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_object(folder / name)


def first_tokens(backend: Any) -> tuple[int, ...]:
    """Return the special tokens that the post-processor of a `tokenizers.Tokenizer` puts before every text."""
    for text in itertools.chain("a", (backend.id_to_token(index) or "" for index in range(backend.get_vocab_size()))):
        try:
            encoded = backend.encode(text)
        except Exception:  # a vocabulary without this text, nor a token for the unknown
            continue
        if 0 in (added := encoded.special_tokens_mask):
            return tuple(encoded.ids[: added.index(0)])
    return ()


def _add_bos_token(inner: Any) -> None:
    """Add the BOS token to texts, unless the post-processor does so already.

    Trap: transformers 5 ignores `add_bos_token` if there is a tokenizer.json; the post-processors of some (DeepSeek-V3)
    rely on it.
    """
    from tokenizers import processors

    bos, name, backend = inner.bos_token_id, inner.bos_token, inner.backend_tokenizer
    if bos is None or bos in first_tokens(backend):
        return
    adding = processors.TemplateProcessing(f"{name}:0 $A:0", f"{name}:0 $A:0 {name}:1 $B:1", [(name, bos)])
    before = [] if backend.post_processor is None else [backend.post_processor]
    backend.post_processor = processors.Sequence([*before, adding])


class _Shared:
    """A tokenizer that transformers takes as it is; it deep-copies any other, which takes longer than to read one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __deepcopy__(self, memo: object) -> Any:
        return self.tokenizer


def _exact(folder: Path) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    with library_errors("be read", str(folder / TOKENIZER_FILE)):
        backend = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    check_rules(backend, str(folder / TOKENIZER_FILE))
    options: dict[str, Any] = {
        "tokenizer_object": _Shared(backend),
        "split_special_tokens": False,
        "fix_mistral_regex": False,  # it would replace the pre-tokenizer
    }
    config = _read_config(folder)
    if "added_tokens_decoder" in config:
        # Trap: transformers would replace the stripping and normalization of the file's tokens by those listed here.
        listed = _listed_tokens(config, folder)
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        options["added_tokens_decoder"] = {i: token for i, token in listed.items() if token["content"] not in known}
    from_pretrained: Callable[..., Any] = PreTrainedTokenizerFast.from_pretrained
    inner = from_pretrained(str(folder), **options)
    for index, token in options.get("added_tokens_decoder", {}).items():
        if backend.token_to_id(token["content"]) != int(index):
            raise TokenizerError(
                f"added_tokens_decoder has {token['content']!r:.80} as id {index}, but tokenizer.json continues with "
                f"{backend.token_to_id(token['content'])} ({folder / TOKENIZER_CONFIG}). Fetch both files again."
            )
    return inner


def _listed_tokens(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the added tokens that tokenizer_config.json lists, by id. Raises TokenizerError: it has something else."""
    listed = config["added_tokens_decoder"] or {}
    if not isinstance(listed, dict) or not all(
        index.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)
        for index, token in listed.items()
    ):
        raise TokenizerError(
            f"added_tokens_decoder has no tokens by id; got {listed!r:.80} ({folder / TOKENIZER_CONFIG}). "
            "Fetch the file again."
        )
    return listed


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / TOKENIZER_CONFIG
    return read_object(file) if file.is_file() else {}


def read_object(file: Path) -> dict[str, Any]:
    """Read a file that is a JSON object. Raises TokenizerError."""
    try:
        value = parse_json(read_bounded(file, MAX_FILE_BYTES))
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"a file of the tokenizer cannot be read; got {file} ({reason_of(error)}). Replace or remove it."
        ) from None
    if not isinstance(value, dict):
        raise TokenizerError(f"a file of the tokenizer is not a JSON object; got {value!r:.80} ({file}). Replace it.")
    return value


def _converted(folder: Path) -> Any:
    from transformers import AutoTokenizer

    from_pretrained: Callable[..., Any] = AutoTokenizer.from_pretrained
    # Trap: by default, transformers asks on the terminal whether to run code from the folder.
    return from_pretrained(str(folder), trust_remote_code=False)
