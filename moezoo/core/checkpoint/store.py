"""A run's checkpoints: one folder per saved step, written atomically and verified before it is loaded.

    <run>/checkpoints/step_00001000/
        weights.safetensors      canonical parameter names
        optimizer.safetensors    first_moment.<name>, second_moment.<name>, and other optimizer state
        config.yaml              the run's config, as text
        manifest.json            format version, step, tokens, size and SHA-256 of every file

The checkpoint of a model that is sharded over several devices has a folder `arrays/` in place of the two safetensors
files (sharded_tensors.py): each process writes the shards of its devices, `weights.<name>`,
`optimizer.first_moment.<name>` and so on. Any number of devices can load it, whole or in slices.

A save writes `.step_00001000.partial`, syncs it to disk and renames it. If a save is killed, it can also leave
`.step_00001000.replaced` (complete; the step was being saved again) and `.step_00001000.removed` (being deleted).
The next save cleans up; a replaced folder is renamed back if its step has no other folder, so that a complete
checkpoint exists at any moment.

Only one process at a time may save into a run.
"""

import contextlib
import hashlib
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
    OPTIMIZER,
    OPTIMIZER_PREFIX,
    WEIGHTS,
    WEIGHTS_PREFIX,
    Manifest,
    ManifestFile,
    read_manifest,
    verify,
)
from moezoo.core.checkpoint.safetensors_file import StoredTensors, write_tensors
from moezoo.core.checkpoint.sharded_tensors import ShardedTensors
from moezoo.core.errors import CheckpointError, RunError
from moezoo.core.files import (
    flush_folder,
    flush_tree,
    make_folder,
    read_bounded,
    reason_of,
    remove_folder,
    rename_folder,
    sha256_of,
    write_atomically,
)

Array = npt.NDArray[Any]

_MAX_CONFIG_BYTES = 10_000_000
_ATTEMPTS = 100  # a reader has to verify a checkpoint before the next one is saved; tiny ones take many attempts
_HIDDEN_NAME = re.compile(r"\.(step_\d{8,})\.(partial|replaced|removed)")


@dataclass(frozen=True)
class CheckpointInfo:
    """Step and folder of a checkpoint, which is not verified yet."""

    step: int
    path: Path


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the state from which a run resumes.

    Fields:
        step: number of updates done.
        tokens: number of tokens trained on; None if it was not saved.
        weights: lazily read tensors by canonical name. Raises CheckpointError if the file changed after verification.
        optimizer: optimizer state, in the same way.
        config_text: the run's config.
    """

    step: int
    tokens: int | None
    weights: Mapping[str, Array]
    optimizer: Mapping[str, Array]
    config_text: str


def save_checkpoint(
    folder: Path,
    step: int,
    weights: Mapping[str, Array],
    optimizer: Mapping[str, Array],
    config_text: str,
    keep: int | None,
    *,
    tokens: int | None = None,
) -> Path:
    """Save a checkpoint in `folder` (`<run>/checkpoints`, created if missing) and return the checkpoint's folder.

    Saving a step again replaces it. If the process is killed, the old checkpoints are still complete, or the new
    one is; see the module docstring. After the return, the checkpoint survives a power loss.

    Args:
        folder: of the run's checkpoints.
        step: number of updates done, >= 0.
        weights: arrays by canonical name.
        optimizer: optimizer state by name.
        config_text: the run's config.
        keep: maximum number of checkpoints up to and including this step, >= 1; None keeps all. Checkpoints of later
            steps (an abandoned branch of the run) are not touched.
        tokens: number of tokens trained on.

    Raises CheckpointError for a value that cannot be stored and RunError if the folder cannot be written; older
    checkpoints are not affected.
    """
    _check_arguments(step, tokens, keep)
    _encode_config(config_text)
    partial = begin_checkpoint(folder, step)
    try:
        files = {
            WEIGHTS: _write_tensors(partial / WEIGHTS, weights),
            OPTIMIZER: _write_tensors(partial / OPTIMIZER, optimizer),
        }
        return _complete(partial, step, files, config_text, keep, tokens)
    except (CheckpointError, RunError):
        with contextlib.suppress(RunError):
            clean_up(folder)
        raise


def begin_checkpoint(folder: Path, step: int) -> Path:
    """Create and return the temporary folder of a new checkpoint, which `complete_checkpoint` renames."""
    make_folder(folder)
    clean_up(folder)
    partial = partial_folder(folder, step)
    make_folder(partial)
    return partial


def partial_folder(folder: Path, step: int) -> Path:
    """Return the temporary folder of a checkpoint for which another process has called `begin_checkpoint`."""
    return folder / f".{_folder_name(step)}.partial"


def complete_checkpoint(
    partial: Path, step: int, config_text: str, keep: int | None, *, tokens: int | None = None
) -> Path:
    """Complete a sharded checkpoint after `arrays/` was written into the folder of `begin_checkpoint`.

    Arguments, result and errors are as for `save_checkpoint`. SHA-256 digests are computed by reading the files back.
    """
    _check_arguments(step, tokens, keep)
    files = {
        path.relative_to(partial).as_posix(): ManifestFile(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in flush_tree(partial / ARRAYS)
    }
    return _complete(partial, step, files, config_text, keep, tokens)


def _complete(
    partial: Path,
    step: int,
    files: Mapping[str, ManifestFile],
    config_text: str,
    keep: int | None,
    tokens: int | None,
) -> Path:
    folder, target = partial.parent, partial.with_name(_folder_name(step))
    replaced = folder / f".{target.name}.replaced"
    files = {**files, CONFIG: _write(partial / CONFIG, _encode_config(config_text))}
    manifest = Manifest(format_version=FORMAT_VERSION, step=step, tokens=tokens, files=files)
    write_atomically(partial / MANIFEST, manifest.to_text())
    flush_folder(partial)
    if target.exists():
        rename_folder(target, replaced)
    rename_folder(partial, target)
    if replaced.exists():
        _delete(replaced)
    if keep is not None:
        up_to_this = [info for info in list_checkpoints(folder) if info.step <= step]
        for info in up_to_this[:-keep]:
            _delete(info.path)
    return target


def clean_up(folder: Path) -> list[str]:
    """Clean up after a killed save: restore a replaced checkpoint without successor, and remove the rest.

    Return a line for the user about each. No other process may save in `folder`.
    """
    lines = []
    for name in _names(folder):
        hidden = _HIDDEN_NAME.fullmatch(name)
        if hidden is None:
            continue
        if hidden[2] == "replaced" and not (folder / hidden[1]).exists():
            rename_folder(folder / name, folder / hidden[1])
            lines.append(f"restored {folder / hidden[1]}: the save that replaced it was killed")
        elif hidden[2] == "replaced":
            _delete(folder / name)
            lines.append(f"removed {folder / name}: it was replaced by a save that was then killed")
        else:
            remove_folder(folder / name)
            reason = "its save was killed" if hidden[2] == "partial" else "it was being deleted by a killed save"
            lines.append(f"removed {folder / name}: {reason}")
    return lines


def list_checkpoints(folder: Path) -> list[CheckpointInfo]:
    """List the checkpoints in `folder` by increasing step, judged by name only; [] if the folder is missing.

    A `.replaced` folder is listed if a killed save left its step without another folder.
    """
    found: dict[int, Path] = {}
    for name in _names(folder):
        hidden = _HIDDEN_NAME.fullmatch(name)
        replaced = hidden is not None and hidden[2] == "replaced"
        step = _step_of(hidden[1] if hidden is not None and replaced else name)
        if step is not None:
            found[step] = folder / name  # hidden names sort first, so a visible folder wins
    return [CheckpointInfo(step, found[step]) for step in sorted(found)]


def load_latest_checkpoint(folder: Path) -> tuple[Checkpoint, Path, list[str]]:
    """Load the newest complete checkpoint in `folder`; return it, its folder, and one line for each skipped folder.

    Checkpoints are verified with their manifests, newest step first, until one is complete. Skipped are damaged
    checkpoints, and folders whose name is similar to a checkpoint's. Another process may save and prune at the same
    time: a checkpoint that it replaces or prunes before it is open is no damage, and a newer one is loaded.

    Raises CheckpointError if no checkpoint is complete.
    """
    for _ in range(_ATTEMPTS):
        before = _snapshot(folder)
        problems = [problem for name in _names(folder) if (problem := _similar_name(folder, name))]
        for info in reversed(list_checkpoints(folder)):
            try:
                return load_checkpoint(info.path), info.path, problems
            except CheckpointError as error:
                problems.append(str(error))
            if _snapshot(folder) != before:
                break
        if _snapshot(folder) == before:
            raise _none_complete(folder, problems)
    raise CheckpointError(
        f"the checkpoints in {folder} change faster than they can be read, in {_ATTEMPTS} attempts. Wait for the run, "
        "or save less often (training.checkpoint_every)."
    )


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify and load a checkpoint. Raises CheckpointError if it is missing or damaged."""
    return _load(path, verify(path))


def load_verified_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Load the checkpoint of a step in `folder` whose files another process has verified."""
    path = folder / _folder_name(step)
    return _load(path, read_manifest(path))


def _none_complete(folder: Path, problems: list[str]) -> CheckpointError:
    advice = "Train from the start, or use another run."
    saves = [folder / name for name in _names(folder) if name.endswith(".partial")]
    problems = [*problems, *(f"{save} is incomplete: it is being saved, or its save was killed." for save in saves)]
    if not problems:
        return CheckpointError(f"there is no checkpoint in {folder}. {advice}")
    return CheckpointError(f"there is no complete checkpoint in {folder}: {' '.join(problems)} {advice}")


def _snapshot(folder: Path) -> list[tuple[Path, int]]:
    """Return the checkpoints and their inodes, which change when a process saves, replaces or prunes one."""
    found = []
    for info in list_checkpoints(folder):
        with contextlib.suppress(FileNotFoundError):
            found.append((info.path, info.path.stat().st_ino))
    return found


def _load(path: Path, manifest: Manifest) -> Checkpoint:
    try:
        config_text = read_bounded(path / CONFIG, _MAX_CONFIG_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path / CONFIG}: {reason_of(error)}. Use another checkpoint.") from error
    weights: Mapping[str, Array]
    optimizer: Mapping[str, Array]
    if WEIGHTS in manifest.files:
        # Held open, so that they stay readable when a training process prunes the checkpoint.
        weights, optimizer = (StoredTensors(path / name, hold=True) for name in (WEIGHTS, OPTIMIZER))
    else:
        weights, optimizer = (ShardedTensors(path / ARRAYS, prefix) for prefix in (WEIGHTS_PREFIX, OPTIMIZER_PREFIX))
    return Checkpoint(
        step=manifest.step,
        tokens=manifest.tokens,
        weights=weights,
        optimizer=optimizer,
        config_text=config_text,
    )


def check_names_and_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compare names and shapes of a checkpoint's tensors with those of the spec; `where` names the checkpoint.

    Raises one CheckpointError with a line for each difference, sorted by name: `- name` is missing, `+ name` is
    unexpected, `~ name` has another shape.
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
            for sign, word in (("-", "missing"), ("+", "unexpected"), ("~", "with another shape"))
        )
        diff = "\n".join(f"  {mark} {text}" for mark, text in lines)
        raise CheckpointError(
            f"{where} does not match the spec: {counts}. Use the config that it was trained with.\n{diff}"
        )


def _encode_config(config_text: str) -> bytes:
    try:
        return config_text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"the config's text is not valid Unicode: {error.reason}.") from error


# --- folders ------------------------------------------------------------------------------------------------


def _check_arguments(step: int, tokens: int | None, keep: int | None) -> None:
    for what, value, least in (("step", step, 0), ("tokens", tokens, 0), ("keep", keep, 1)):
        optional = what != "step"
        if (value is None and optional) or (type(value) is int and value >= least):
            continue
        raise CheckpointError(f"{what} is {value!r}; expected an integer >= {least}{' or None' if optional else ''}.")


def _folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _step_of(name: str) -> int | None:
    """Return the step of a checkpoint folder's name; None for other names, e.g. `step_1` or `step_000000001`."""
    match = NAME.fullmatch(name)
    return int(match[1]) if match and _folder_name(int(match[1])) == name else None


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"cannot list {folder}: {(error.strerror or str(error)).lower()}.") from error


def _similar_name(folder: Path, name: str) -> str | None:
    if name.startswith("step_") and _step_of(name) is None:
        return f"{folder / name} is not a checkpoint's name; expected step_ and eight digits. Rename it."
    return None


def _write_tensors(path: Path, tensors: Mapping[str, Array]) -> ManifestFile:
    size, digest = write_tensors(path, tensors, {})
    return ManifestFile(bytes=size, sha256=digest)


def _write(path: Path, content: bytes) -> ManifestFile:
    write_atomically(path, content)
    # The digest is of the content in memory, not of the file read back.
    return ManifestFile(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _delete(path: Path) -> None:
    """Rename and delete a checkpoint, so that a half-deleted one never looks complete."""
    name = path.name.removeprefix(".").removesuffix(".replaced")
    removed = path.with_name(f".{name}.removed")
    remove_folder(removed)
    rename_folder(path, removed)
    remove_folder(removed)
