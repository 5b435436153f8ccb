"""The run folder: all files of a run, sufficient to resume it.

<run>/config.yaml     the resolved config, with defaults and the vocabulary size filled in
<run>/tokenizer.json  or tokenizer/: the tokenizer
<run>/metrics.jsonl   one JSON object per line, see training/metrics.py
<run>/picture.png     loss and expert load
<run>/checkpoints/    see checkpoint/store.py
<run>/huggingface/    file layout of the Hugging Face checkpoint that the run started from, if any, see
                      huggingface/layout.py
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moezoo.core.checkpoint.store import Checkpoint, list_checkpoints, load_latest_checkpoint, load_verified_checkpoint
from moezoo.core.config.run_config import Config, dump_config, load_saved_config, parse_config
from moezoo.core.data.load_tokenizer import load_tokenizer
from moezoo.core.data.tokenizers import TOKENIZER_FILE, TOKENIZER_FOLDER, Tokenizer
from moezoo.core.errors import RunError, SpecError
from moezoo.core.files import make_folder, remove_folder, write_atomically

# Fields of `training` that may change when a run is resumed: logging, saving, compilation, rematerialization, and the
# number of steps (which moves the schedule).
_MAY_CHANGE = (
    *("steps", "log_every", "validate_every", "validation_sequences", "checkpoint_every", "keep_checkpoints"),
    *("layers", "rematerialize"),
)


@dataclass(frozen=True)
class Run:
    """Paths of the files in a run folder."""

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def picture_path(self) -> Path:
        return self.path / "picture.png"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def huggingface_path(self) -> Path:
        return self.path / "huggingface"

    @property
    def name(self) -> str:
        return self.path.resolve().name


def create_run(path: Path, config: Config, tokenizer: Tokenizer, *, resume: bool) -> Run:
    """Create a run folder, or check that an existing one can be resumed with this config; write config and tokenizer.

    Raises RunError: the folder contains a run and `resume` is False, contains no run and `resume` is True, contains
    other files, or cannot be written. Raises SpecError: the config differs from the run's in more than `_MAY_CHANGE`.
    """
    run = Run(path)
    if run.config_path.exists():
        if not resume:
            raise RunError(
                f"{path} already contains a run. Add --resume to continue it, choose another folder with --out, or "
                "delete it."
            )
        _check_same(load_saved_config(run.config_path), config, run.config_path)
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(
            f"{path} exists and is not a run folder; expected a new or empty folder. Choose another with --out."
        )
    elif resume:
        raise RunError(
            f"there is no run to resume in {path}. Start one without --resume, or set its folder with --out."
        )
    make_folder(path)
    tokenizer.save(path)
    write_atomically(run.config_path, dump_config(config))
    return run


def remove_empty_run(run: Run) -> None:
    """Remove a run folder that contains only what `create_run` wrote; any other folder is left unchanged."""
    if {file.name for file in run.path.iterdir()} <= {run.config_path.name, TOKENIZER_FILE, TOKENIZER_FOLDER}:
        remove_folder(run.path)


def is_run(path: str | Path) -> bool:
    """Return whether a path is a run folder."""
    return Run(Path(path)).config_path.exists()


def open_run(path: str | Path) -> Run:
    """Open an existing run folder. Raises RunError: it is not one."""
    run = Run(Path(path))
    if not is_run(path):
        raise RunError(f"{path} is not a run folder; expected config.yaml in it. Train one with `moezoo train CONFIG`.")
    return run


def load_run(path: str | Path) -> tuple[Config, Tokenizer, Checkpoint, list[str]]:
    """Load config, tokenizer and newest intact checkpoint of a run; also return a line per damaged checkpoint skipped.

    Raises RunError, SpecError, TokenizerError or CheckpointError.
    """
    run = open_run(path)
    checkpoint, newest, problems = _latest(run)
    config = parse_config(checkpoint.config_text, where=str(newest / "config.yaml"), saved=True)
    return config, load_tokenizer(run.path), checkpoint, problems


def resume_point(run: Run, step: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest intact checkpoint to resume from, None if none was saved yet; and a line per one skipped.

    `step`: open this step's checkpoint without verifying its files, because another process has.
    """
    if step is not None:
        return load_verified_checkpoint(run.checkpoints_path, step), []
    if not list_checkpoints(run.checkpoints_path):
        return None, []
    checkpoint, _, problems = _latest(run)
    return checkpoint, problems


def _latest(run: Run) -> tuple[Checkpoint, Path, list[str]]:
    checkpoint, newest, problems = load_latest_checkpoint(run.checkpoints_path)
    return checkpoint, newest, [f"skipped: {problem}" for problem in problems]


def _check_same(old: Config, new: Config, where: Path) -> None:
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for dump in (before, after):
        del dump["mesh"]  # a run may be resumed on other devices
        for name in _MAY_CHANGE:
            del dump["training"][name]
    difference = _first_difference(before, after)
    if difference is not None:
        path, started, resumed = difference
        raise SpecError(
            f"{path} is {resumed!r}, but the run was started with {started!r} ({where}). "
            "Resume with the config that it was started with, or start a new run with --out."
        )


def _first_difference(before: Any, after: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Return path and both values of the first difference between two nested values; None if they are equal."""
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        pairs = [(f"{path}.{key}" if path else key, before[key], after[key]) for key in before]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(f"{path}[{index}]", *pair) for index, pair in enumerate(zip(before, after, strict=True))]
    else:
        return None if before == after else (path, before, after)
    return next((found for pair in pairs if (found := _first_difference(pair[1], pair[2], pair[0]))), None)
