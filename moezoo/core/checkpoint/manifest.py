"""The manifest of a checkpoint: what its files are, whole or in parts, and whether they still are what was written."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from moezoo.core.errors import CheckpointError, RunError
from moezoo.core.files import sha256_of

FORMAT_VERSION = 1

WEIGHTS, OPTIMIZER, CONFIG = "weights.safetensors", "optimizer.safetensors", "config.yaml"
_WHOLE = (WEIGHTS, OPTIMIZER, CONFIG)
MANIFEST = "manifest.json"
ARRAYS = "arrays"
"""The folder of a sharded checkpoint's tensors, whose names begin with one of these."""
OF_WEIGHTS, OF_OPTIMIZER = "weights.", "optimizer."
_OF_ARRAYS = re.compile(rf"{ARRAYS}(/[A-Za-z0-9_][A-Za-z0-9_.-]*)+")  # never a way out of the folder
NAME = re.compile(r"step_(\d{8,})")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ManifestFile(_Section):
    """What a file was when it was written."""

    bytes: NonNegativeInt
    sha256: str


class Manifest(_Section):
    """What a checkpoint says of itself; files by their path in its folder."""

    format_version: int
    step: NonNegativeInt
    tokens: NonNegativeInt | None
    files: dict[str, ManifestFile]
    extra: dict[str, Any]

    def to_text(self) -> str:
        """JSON, with a digest of all of it."""
        content = self.model_dump()
        return json.dumps({**content, "sha256": _digest(content)}, indent=2) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest's own values, so that a flipped bit in `step` or `extra` is noticed too."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def verified(path: Path) -> Manifest:
    """The manifest of a checkpoint whose every file is as it was written; else CheckpointError, one line."""
    manifest = read_manifest(path)
    named = NAME.fullmatch(path.name)
    if named is not None and int(named[1]) != manifest.step:
        raise _damaged(path, f"its manifest is of step {manifest.step} (renamed?)")
    for name, expected in manifest.files.items():
        file = path / name
        try:
            size = file.stat().st_size
        except OSError:
            raise _damaged(path, f"{name} is missing") from None
        if size != expected.bytes:
            raise _damaged(path, f"{name} has {size} bytes; its manifest says {expected.bytes}")
        try:
            digest = sha256_of(file)
        except RunError as error:
            raise _damaged(path, str(error).rstrip(".")) from error
        if digest != expected.sha256:
            raise _damaged(path, f"{name} has another SHA-256 than its manifest says")
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint, of which the files themselves are not looked at."""
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}. Name a folder step_NNNNNNNN of a run.")
    try:
        content = json.loads((path / MANIFEST).read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise _damaged(path, f"{MANIFEST} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"{MANIFEST} cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict) or "format_version" not in content:
        raise _damaged(path, f"{MANIFEST} is not a manifest")
    stored_digest = content.pop("sha256", None)
    if stored_digest != _digest(content):
        raise _damaged(path, f"{MANIFEST} has another SHA-256 than it says")
    if content["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format version {content['format_version']!r}; expected {FORMAT_VERSION}. "
            "Use the moezoo that wrote it."
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _damaged(path, f"{MANIFEST} has a bad {where}: {first['msg'].lower()}") from None
    arrays = set(manifest.files) - {CONFIG}
    sharded = len(arrays) == len(manifest.files) - 1 and f"{ARRAYS}/manifest.ocdbt" in arrays
    if not (sharded and all(_OF_ARRAYS.fullmatch(name) for name in arrays)) and set(manifest.files) != set(_WHOLE):
        raise _damaged(
            path, f"{MANIFEST} lists {str(sorted(manifest.files))[:300]}; expected {sorted(_WHOLE)}, or {ARRAYS}/"
        )
    return manifest


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} is damaged: {problem}. Use another one.")
