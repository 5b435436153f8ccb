"""Manifest of a run: size and SHA-256 of the files that every later command reads from the run's folder.

`<run>/manifest.json` covers config.yaml, the tokenizer, and the files of the Hugging Face checkpoint that the run
started from. Checkpoints have their own manifests (checkpoint/manifest.py), and each line of metrics.jsonl its own
checksum. A run of an earlier version has no manifest, and is read unchecked.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from moezoo.core.checkpoint.manifest import ManifestFile, Section, manifest_digest
from moezoo.core.errors import RunError
from moezoo.core.files import flush_tree, read_bounded, sha256_of, write_atomically
from moezoo.core.json_text import parse_json

CONFIG_FILE, MANIFEST_FILE = "config.yaml", "manifest.json"
_VERSION = 1
_MAX_BYTES = 10_000_000


class _Manifest(Section):
    format_version: int
    files: dict[str, ManifestFile]


def seal_run(folder: Path, names: tuple[str, ...], config_text: str) -> None:
    """Write the manifest of a new run and then config.yaml, which makes the folder a run.

    `names`: files and folders of the run that the manifest covers, if they exist.
    """
    paths = [
        path for name in names for path in ([folder / name] if (folder / name).is_file() else flush_tree(folder / name))
    ]
    files = {
        path.relative_to(folder).as_posix(): ManifestFile(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in paths
    }
    _write(folder, {**files, CONFIG_FILE: _entry(config_text)})
    write_atomically(folder / CONFIG_FILE, config_text)


def replace_file(folder: Path, name: str, text: str) -> None:
    """Replace a file of a run and its entry in the manifest. A kill leaves the old or the new file, unlisted."""
    files, content, before = _read(folder), text.encode(), None
    with contextlib.suppress(OSError):
        before = read_bounded(folder / name, len(content))
    if before == content and (files is None or name in files):
        return
    if files is not None:
        _write(folder, {other: file for other, file in files.items() if other != name})
    write_atomically(folder / name, text)
    if files is not None:
        _write(folder, {**files, name: _entry(text)})


def verify_run(folder: Path, *names: str) -> None:
    """Check the files that the manifest lists under `names`, files or folders of the run.

    Raises RunError that names the first missing or damaged file.
    """
    files = _read(folder)
    while (problem := _problem(folder, files or {}, names)) is not None:
        before, files = files, _read(folder)
        if files == before:
            raise _damaged(folder, problem)  # else the process that trains the run has replaced a file meanwhile


def _problem(folder: Path, files: Mapping[str, ManifestFile], names: tuple[str, ...]) -> str | None:
    for name, expected in files.items():
        if not any(name == asked or name.startswith(f"{asked}/") for asked in names):
            continue
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != expected.bytes:
            return f"{name} has {size} bytes; expected {expected.bytes} according to the manifest"
        if sha256_of(file) != expected.sha256:
            return f"the SHA-256 of {name} differs from the manifest"
    return None


def _entry(text: str) -> ManifestFile:
    return ManifestFile(bytes=len(text.encode()), sha256=hashlib.sha256(text.encode()).hexdigest())


def _write(folder: Path, files: Mapping[str, ManifestFile]) -> None:
    content = _Manifest(format_version=_VERSION, files=dict(files)).model_dump()
    text = json.dumps({**content, "sha256": manifest_digest(content)}, indent=2)
    write_atomically(folder / MANIFEST_FILE, text + "\n")


def _read(folder: Path) -> dict[str, ManifestFile] | None:
    """Return the listed files; None if the run has no manifest. Raises RunError: it is damaged."""
    try:
        content = parse_json(read_bounded(folder / MANIFEST_FILE, _MAX_BYTES))
        digest = content.pop("sha256")
        if digest != manifest_digest(content):
            raise _damaged(folder, f"the SHA-256 of {MANIFEST_FILE} differs from the one stored in it")
        if content["format_version"] != _VERSION:
            raise RunError(
                f"{folder / MANIFEST_FILE} has format version {content['format_version']!r:.80}; expected {_VERSION}. "
                "Use the moezoo version that wrote it."
            )
        return _Manifest.model_validate(content).files
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError) as error:
        raise _damaged(folder, f"{MANIFEST_FILE} cannot be read ({type(error).__name__})") from None


def _damaged(folder: Path, problem: str) -> RunError:
    return RunError(
        f"run {folder} is damaged: {problem}. Restore the file from a copy; if it was changed on purpose, delete "
        f"{folder / MANIFEST_FILE}, and the files are read as they are."
    )
