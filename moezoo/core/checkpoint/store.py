"""A run's checkpoints: a folder a step, whole or not there, and verified before a byte of it is believed.

    <run>/checkpoints/step_00001000/
        weights.safetensors      canonical parameter names
        optimizer.safetensors    first_moment.<name>, second_moment.<name>, and what else it keeps
        config.yaml              the run's config, as text
        manifest.json            format version, step, tokens, extra, every file's size and SHA-256

Of a model that lies on several devices, `arrays/` is in place of the tensors' files (core/sharded_tensors.py): what
each process wrote of its devices' parts, `weights.<name>`, `optimizer.first_moment.<name>` and so on. It is read in the
same way, whole or in part, wherever.

A save writes `.step_00001000.partial`, flushes it and renames it. The other hidden names of a save that was
killed are `.step_00001000.replaced` (whole; the step was being saved again) and `.step_00001000.removed`
(being deleted). The next save tidies them; a replaced one whose step has no folder yet is put back, so that
no moment is without a checkpoint.

One process at a time saves into a run.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from moezoo.core.checkpoint.manifest import (
    ARRAYS,
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    NAME,
    OF_OPTIMIZER,
    OF_WEIGHTS,
    OPTIMIZER,
    WEIGHTS,
    Manifest,
    ManifestFile,
    read_manifest,
    verified,
)
from moezoo.core.checkpoint.safetensors_file import StoredTensors, write_tensors
from moezoo.core.checkpoint.sharded_tensors import ShardedTensors
from moezoo.core.errors import CheckpointError, RunError
from moezoo.core.files import (
    flush_folder,
    flush_tree,
    make_folder,
    remove_folder,
    rename_folder,
    sha256_of,
    write_atomically,
)

Array = npt.NDArray[Any]

_HIDDEN_NAME = re.compile(r"\.(step_\d{8,})\.(partial|replaced|removed)")


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint's step and its folder; whether it is whole, only reading it tells."""

    step: int
    path: Path


@dataclass(frozen=True)
class Checkpoint:
    """All that a run goes on from: tensors by canonical name, the config's text, and what the caller added.

    Tensors are read from the file when they are asked for; CheckpointError if it was changed since it was verified.

    `step` counts the updates done, `tokens` the tokens trained on (None where the saver did not say).
    """

    step: int
    tokens: int | None
    weights: Mapping[str, Array]
    optimizer: Mapping[str, Array]
    config_text: str
    extra: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    weights: Mapping[str, Array],
    optimizer: Mapping[str, Array],
    config_text: str,
    extra: Mapping[str, Any],
    keep: int | None,
    *,
    tokens: int | None = None,
) -> Path:
    """Save a checkpoint below `folder` (`<run>/checkpoints`, made where missing) and return its own folder.

    `step` >= 0 counts the updates done, `tokens` the tokens trained on. `weights` and `optimizer` are arrays
    by canonical name. `extra` is anything that JSON gives back unchanged. `keep` >= 1 is how many checkpoints
    up to and with this step stay; None keeps all. Those of later steps (an abandoned branch of the run) are
    left alone.

    Saving a step again replaces it. A kill at any moment leaves every checkpoint that was whole before, or
    this one; see the module's text. When this returns, the checkpoint survives a power cut.

    Raises CheckpointError for what cannot be stored and RunError where the folder cannot be written; what was
    whole before then still is.
    """
    _check_request(step, tokens, keep)
    _as_json(extra)
    _as_utf8(config_text)
    partial = begin_checkpoint(folder, step)
    try:
        files = {
            WEIGHTS: _write_tensors(partial / WEIGHTS, weights),
            OPTIMIZER: _write_tensors(partial / OPTIMIZER, optimizer),
        }
        return _complete(partial, step, files, config_text, extra, keep, tokens)
    except (CheckpointError, RunError):
        with contextlib.suppress(RunError):
            _tidy(folder)
        raise


def begin_checkpoint(folder: Path, step: int) -> Path:
    """The folder that a checkpoint below `folder` is written into, before `complete_checkpoint` gives it its name."""
    make_folder(folder)
    _tidy(folder)
    partial = partial_folder(folder, step)
    make_folder(partial)
    return partial


def partial_folder(folder: Path, step: int) -> Path:
    """What `begin_checkpoint` gives, which another process has called."""
    return folder / f".{_name(step)}.partial"


def complete_checkpoint(
    partial: Path, step: int, config_text: str, extra: Mapping[str, Any], keep: int | None, *, tokens: int | None = None
) -> Path:
    """Make a checkpoint of a folder of `begin_checkpoint` whose `arrays/` are written; else as `save_checkpoint`.

    Digests are of what the disk gives back.
    """
    _check_request(step, tokens, keep)
    files = {
        path.relative_to(partial).as_posix(): ManifestFile(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in flush_tree(partial / ARRAYS)
    }
    return _complete(partial, step, files, config_text, extra, keep, tokens)


def _complete(
    partial: Path,
    step: int,
    files: Mapping[str, ManifestFile],
    config_text: str,
    extra: Mapping[str, Any],
    keep: int | None,
    tokens: int | None,
) -> Path:
    folder, target = partial.parent, partial.with_name(_name(step))
    replaced = folder / f".{target.name}.replaced"
    files = {**files, CONFIG: _write(partial / CONFIG, _as_utf8(config_text))}
    manifest = Manifest(format_version=FORMAT_VERSION, step=step, tokens=tokens, files=files, extra=_as_json(extra))
    write_atomically(partial / MANIFEST, manifest.to_text())
    flush_folder(partial)
    if target.exists():
        rename_folder(target, replaced)
    rename_folder(partial, target)
    if replaced.exists():
        _discard(replaced)
    if keep is not None:
        up_to_this = [info for info in list_checkpoints(folder) if info.step <= step]
        for info in up_to_this[:-keep]:
            _discard(info.path)
    return target


def list_checkpoints(folder: Path) -> list[CheckpointInfo]:
    """The checkpoints below `folder` by rising step number, judged by name alone; [] where it is missing.

    A replaced one is listed where a kill left its step without a folder.
    """
    found: dict[int, Path] = {}
    for name in _names(folder):
        hidden = _HIDDEN_NAME.fullmatch(name)
        replaced = hidden is not None and hidden[2] == "replaced"
        step = _step_of(hidden[1] if hidden is not None and replaced else name)
        if step is not None:
            found[step] = folder / name  # hidden names come first, so that a plain one wins
    return [CheckpointInfo(step, found[step]) for step in sorted(found)]


def latest_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """The newest whole checkpoint below `folder`, by step number, and one line for each thing passed over.

    Every file's size and SHA-256 is compared with the manifest, newest step first, until one is whole. Named
    are the damaged ones before it, folders that a killed save left, and folders whose name is almost a
    checkpoint's.

    Raises CheckpointError where none is whole.
    """
    path, _, problems = _newest(folder)
    return path, problems


def load_latest_checkpoint(folder: Path) -> tuple[Checkpoint, Path, list[str]]:
    """The newest whole checkpoint, its folder, and what was passed over, as `latest_checkpoint` finds it."""
    path, manifest, problems = _newest(folder)
    return _opened(path, manifest), path, problems


def load_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, verified as a whole before any of it is read; CheckpointError for what is wrong."""
    return _opened(path, verified(path))


def opened_checkpoint(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of a step below `folder`, of which another process has verified the files."""
    path = folder / _name(step)
    return _opened(path, read_manifest(path))


def _newest(folder: Path) -> tuple[Path, Manifest, list[str]]:
    problems = [problem for name in _names(folder) if (problem := _name_problem(folder, name))]
    for info in reversed(list_checkpoints(folder)):
        try:
            return info.path, verified(info.path), problems
        except CheckpointError as error:
            problems.append(str(error))
    advice = "Train from the start, or name another run."
    if not problems:
        raise CheckpointError(f"there is no checkpoint in {folder}. {advice}")
    raise CheckpointError(f"there is no whole checkpoint in {folder}: {' '.join(problems)} {advice}")


def _opened(path: Path, manifest: Manifest) -> Checkpoint:
    try:
        config_text = (path / CONFIG).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path / CONFIG}: {error}.") from error
    weights: Mapping[str, Array]
    optimizer: Mapping[str, Array]
    if WEIGHTS in manifest.files:
        weights, optimizer = StoredTensors(path / WEIGHTS), StoredTensors(path / OPTIMIZER)
    else:
        weights, optimizer = (ShardedTensors(path / ARRAYS, prefix) for prefix in (OF_WEIGHTS, OF_OPTIMIZER))
    return Checkpoint(
        step=manifest.step,
        tokens=manifest.tokens,
        weights=weights,
        optimizer=optimizer,
        config_text=config_text,
        extra=manifest.extra,
    )


def check_names_and_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compare a checkpoint's tensors with the spec's; `where` names the checkpoint (a path).

    Raises one CheckpointError that lists every difference, a line each and by name: `- name` is missing, `+
    name` is unexpected, `~ name` has another shape.
    """
    lines: list[tuple[str, str]] = []
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            lines.append(("-", f"{name} {list(expected[name])} missing"))
        elif name not in expected:
            lines.append(("+", f"{name} {list(found[name])} unexpected"))
        elif tuple(found[name]) != tuple(expected[name]):
            lines.append(("~", f"{name} {list(found[name])} expected {list(expected[name])}"))
    if lines:
        counts = ", ".join(
            f"{sum(mark == sign for mark, _ in lines)} {word}"
            for sign, word in (("-", "missing"), ("+", "unexpected"), ("~", "of another shape"))
        )
        diff = "\n".join(f"  {mark} {text}" for mark, text in lines)
        raise CheckpointError(
            f"{where} does not fit the spec: {counts}. Use the config that it was trained with.\n{diff}"
        )


def _as_json(extra: Mapping[str, Any]) -> dict[str, Any]:
    try:
        copy = json.loads(json.dumps(dict(extra), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"extra cannot be stored as JSON: {error}. Use text, numbers, lists and maps.") from error
    if copy != dict(extra):
        raise CheckpointError(
            f"JSON does not give extra back unchanged; got {extra!s:.200}. Use lists for tuples and text for keys."
        )
    assert isinstance(copy, dict)
    return copy


def _as_utf8(config_text: str) -> bytes:
    try:
        return config_text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"the config's text is not valid Unicode: {error.reason}.") from error


# --- folders ------------------------------------------------------------------------------------------------


def _check_request(step: int, tokens: int | None, keep: int | None) -> None:
    for what, value, least in (("step", step, 0), ("tokens", tokens, 0), ("keep", keep, 1)):
        optional = what != "step"
        if (value is None and optional) or (type(value) is int and value >= least):
            continue
        raise CheckpointError(f"{what} is {value!r}; expected an integer >= {least}{' or None' if optional else ''}.")


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _step_of(name: str) -> int | None:
    """The step of a checkpoint folder's name; None for any other, such as `step_1` or `step_000000001`."""
    match = NAME.fullmatch(name)
    return int(match[1]) if match and _name(int(match[1])) == name else None


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"cannot list {folder}: {(error.strerror or str(error)).lower()}.") from error


def _name_problem(folder: Path, name: str) -> str | None:
    hidden = _HIDDEN_NAME.fullmatch(name)
    if hidden is not None and hidden[2] == "partial":
        return f"{folder / name} was left by a save that was killed; the next save removes it."
    if hidden is not None and hidden[2] == "removed":
        return f"{folder / name} was being deleted; the next save removes it."
    if hidden is not None:
        return f"{folder / name} was being replaced when its save was killed; the next save tidies it."
    if name.startswith("step_") and _step_of(name) is None:
        return f"{folder / name} is not a checkpoint's name; expected step_ and eight digits. Rename it."
    return None


def _write_tensors(path: Path, tensors: Mapping[str, Array]) -> ManifestFile:
    size, digest = write_tensors(path, tensors, {})
    return ManifestFile(bytes=size, sha256=digest)


def _write(path: Path, content: bytes) -> ManifestFile:
    write_atomically(path, content)
    # The digest is of what was meant, in memory, and not of what a reading back gives.
    return ManifestFile(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _discard(path: Path) -> None:
    """Delete a checkpoint: first its name, so that a half-deleted one never looks whole."""
    name = path.name.removeprefix(".").removesuffix(".replaced")
    removed = path.with_name(f".{name}.removed")
    remove_folder(removed)
    rename_folder(path, removed)
    remove_folder(removed)


def _tidy(folder: Path) -> None:
    """Clean up after a save that was killed: put back what has no successor, and remove the rest."""
    for name in _names(folder):
        hidden = _HIDDEN_NAME.fullmatch(name)
        if hidden is None:
            continue
        if hidden[2] == "replaced" and not (folder / hidden[1]).exists():
            rename_folder(folder / name, folder / hidden[1])
        elif hidden[2] == "replaced":
            _discard(folder / name)
        else:
            remove_folder(folder / name)
