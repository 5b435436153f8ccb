"""A new config file made from one that ships, with a comment on each common key and a schema for editors."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from moezoo.core.config.model_text import model_text
from moezoo.core.config.run_config import json_schema
from moezoo.core.config.shipped import config_file
from moezoo.core.config.yaml_file import parse_mapping, read_text
from moezoo.core.errors import RunError, SpecError
from moezoo.core.files import write_atomically
from moezoo.core.spec import ModelSpec

SCHEMA_FILE = "moezoo.schema.json"

_COMMENTS: Mapping[str, str] = {
    "model": "architecture; `moezoo zoo --list` shows every part with a config of it",
    "vocab_size": "rows of the embedding; null takes the tokenizer's size",
    "embed_dim": "width of the residual stream",
    "repeat": "this many equal layers; list several entries for layers that differ",
    "attention": "or null, for a layer without; num_heads must be a multiple of num_kv_heads",
    "num_experts": "experts per layer, all of which have parameters",
    "router": "top_k experts compute each token",
    "experts": "hidden_dim is the width of each expert",
    "losses": "balance losses; their coefficients are weights in the total loss",
    "initializer": "std of the initial weights",
    "data": "or `sources: [{kind: text, path: my.txt}]`; kinds: text, jsonl, chat, tokens, dataset",
    "training": "batch_size * sequence_length * steps tokens are trained on",
    "steps": "number of optimizer steps",
    "batch_size": "sequences per step",
    "sequence_length": "tokens per sequence",
    "checkpoint_every": "steps between checkpoints; --resume continues from the newest",
    "optimizer": "AdamW; `kind: muon` and others: writings/optimizer.md",
    "learning_rate": "peak of the schedule",
    "schedule": "constant, cosine, wsd, inverse_square_root",
}
_KEY = re.compile(r"(?P<indent>\s*(?:- )?)(?P<key>\w+):")


def new_config(path: str | Path, source: str | Path = "fables", model: ModelSpec | None = None) -> list[Path]:
    """Write a config made from another, with the JSON Schema of configs beside it; return the files.

    Args:
        path: the new file; `.yaml` is added where it has no suffix.
        source: path or name of the config to start from.
        model: of the checkpoint that `source` is: the rest is that of fables.

    Raises RunError: the file exists, or cannot be written. Raises SpecError: no such source, or it is not YAML.
    """
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise SpecError(f"a config is a YAML file; got {str(path)!r:.200}; expected NAME or NAME.yaml. Rename it.")
    if path.exists():
        raise RunError(f"{path} exists and is not replaced. Use another name, or remove it.")
    text = read_text(config_file(source if model is None else "fables"), "config")
    if model is not None:
        text = model_text(model) + text[text.index("\ndata:") + 1 :]
    parse_mapping(text, str(source), "config")
    header = (
        f"# yaml-language-server: $schema={SCHEMA_FILE}\n"
        f"# Made from {Path(source).stem}. Look at it: moezoo describe {path}\n"
        f"# Train it: moezoo train {path}   Check it in three implementations: moezoo parity {path}\n"
    )
    schema = path.with_name(SCHEMA_FILE)
    write_atomically(schema, json.dumps(json_schema(), indent=1) + "\n")
    write_atomically(path, header + "".join(map(_commented, _without_header(text).splitlines(keepends=True))))
    return [path, schema]


def _without_header(text: str) -> str:
    """Return the text without the comments at its beginning, which are on the source."""
    lines = text.splitlines(keepends=True)
    first = next((index for index, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "".join(lines[first:])


def _commented(line: str) -> str:
    """Return a line with the comment of its key, unless it has one or would be too long."""
    found = _KEY.match(line)
    if found is None or found["key"] not in _COMMENTS or "#" in line:
        return line
    comment = _COMMENTS[found["key"]]
    commented = f"{line.rstrip()}  # {comment}"
    return commented + "\n" if len(commented) <= 120 else f"{' ' * len(found['indent'])}# {comment}\n{line}"
