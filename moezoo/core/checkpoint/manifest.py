"""Checkpoint manifest: the list of files with size and SHA-256, and their verification."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from moezoo.core.errors import CheckpointError, RunError
from moezoo.core.files import read_bounded, reason_of, sha256_of
from moezoo.core.json_text import parse_json

FORMAT_VERSION = 1
_MAX_MANIFEST_BYTES = 100_000_000  # a sharded checkpoint lists thousands of files

WEIGHTS, OPTIMIZER, CONFIG = "weights.safetensors", "optimizer.safetensors", "config.yaml"
_WHOLE = (WEIGHTS, OPTIMIZER, CONFIG)
MANIFEST = "manifest.json"
ARRAYS = "arrays"
"""Folder of a sharded checkpoint's tensors, whose names begin with one of the two prefixes below."""
WEIGHTS_PREFIX, OPTIMIZER_PREFIX = "weights.", "optimizer."
_ARRAY_FILE = re.compile(rf"{ARRAYS}(/[A-Za-z0-9_][A-Za-z0-9_.-]*)+")  # no path can leave the folder
NAME = re.compile(r"step_(\d{8,})")


class Section(BaseModel):
    """Part of a manifest: immutable, with exact types and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ManifestFile(Section):
    """Size and SHA-256 of a file when it was written."""

    bytes: NonNegativeInt
    sha256: str


class Manifest(Section):
    """Content of manifest.json; `files` is keyed by the path in the checkpoint's folder.

    `extra` is part of the file format but unused: it is written empty, and older checkpoints may have values in it.
    """

    format_version: int
    step: NonNegativeInt
    tokens: NonNegativeInt | None
    files: dict[str, ManifestFile]
    extra: dict[str, Any] = {}

    def to_text(self) -> str:
        """Return the manifest as JSON, with a SHA-256 of its own content."""
        content = self.model_dump()
        return json.dumps({**content, "sha256": manifest_digest(content)}, indent=2) + "\n"


def manifest_digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the manifest's own values, which detects a flipped bit in e.g. `step`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def verify(path: Path) -> Manifest:
    """Check size and SHA-256 of every file of a checkpoint and return its manifest.

    Raises CheckpointError that names the first missing or damaged file.
    """
    manifest = read_manifest(path)
    named = NAME.fullmatch(path.name)
    if named is not None and int(named[1]) != manifest.step:
        raise _damaged(path, f"its manifest is for step {manifest.step} (was the folder renamed?)")
    for name, expected in manifest.files.items():
        file = path / name
        try:
            size = file.stat().st_size
        except OSError:
            raise _damaged(path, f"{name} is missing") from None
        if size != expected.bytes:
            raise _damaged(path, f"{name} has {size} bytes; expected {expected.bytes} according to the manifest")
        try:
            digest = sha256_of(file)
        except RunError as error:
            raise _damaged(path, str(error).rstrip(".")) from error
        if digest != expected.sha256:
            raise _damaged(path, f"the SHA-256 of {name} differs from the manifest")
    return manifest


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a checkpoint without verifying its files. Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}. Use a folder step_NNNNNNNN of a run.")
    try:
        content = parse_json(read_bounded(path / MANIFEST, _MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        raise _damaged(path, f"{MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{MANIFEST} cannot be read ({reason_of(error)})") from error
    if not isinstance(content, dict) or "format_version" not in content:
        raise _damaged(path, f"{MANIFEST} is not a manifest")
    stored_digest = content.pop("sha256", None)
    if stored_digest != manifest_digest(content):
        raise _damaged(path, f"the SHA-256 of {MANIFEST} differs from the one stored in it")
    if content["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format version {content['format_version']!r:.80}; expected {FORMAT_VERSION}. "
            "Use the moezoo version that wrote it."
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _damaged(path, f"{MANIFEST} has an invalid {where}: {first['msg'].lower()}") from None
    arrays = set(manifest.files) - {CONFIG}
    sharded = len(arrays) == len(manifest.files) - 1 and f"{ARRAYS}/manifest.ocdbt" in arrays
    if not (sharded and all(_ARRAY_FILE.fullmatch(name) for name in arrays)) and set(manifest.files) != set(_WHOLE):
        raise _damaged(
            path, f"{MANIFEST} lists {str(sorted(manifest.files))[:300]}; expected {sorted(_WHOLE)}, or {ARRAYS}/"
        )
    return manifest


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} is damaged: {problem}. Use another checkpoint.")
