"""The run folder: everything that a run leaves behind, and enough to go on from.

<run>/config.yaml     the resolved config: defaults written out, the vocabulary's size filled in
<run>/tokenizer.json  or tokenizer/: what turns text into tokens
<run>/metrics.jsonl   one object a line, see metrics.py
<run>/picture.png     loss and expert load
<run>/checkpoints/    see checkpoint.py
<run>/huggingface/    of a run that began from a Hugging Face checkpoint: how its files were laid out, see
                      huggingface/layout.py
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moezoo.core.checkpoint.store import Checkpoint, list_checkpoints, load_latest_checkpoint, opened_checkpoint
from moezoo.core.config.run_config import Config, dump_config, load_config, parse_config
from moezoo.core.data.tokenizers import TOKENIZER_FILES, Tokenizer, load_tokenizer
from moezoo.core.errors import RunError, SpecError
from moezoo.core.files import make_folder, remove_folder, write_atomically

# What may differ when a run is resumed: how it is watched, how it is compiled, what it keeps in memory, and how long it
# goes on (which moves the schedule).
_MAY_CHANGE = (
    *("steps", "log_every", "validate_every", "validation_sequences", "checkpoint_every", "keep_checkpoints"),
    *("layers", "rematerialize"),
)


@dataclass(frozen=True)
class Run:
    """The names of a run folder's files."""

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
    """Make a run folder, or check that an existing one may be resumed with this config, and write config and tokenizer.

    Raises RunError: the folder already holds a run and `resume` is off, holds something else, or cannot be written.
    Raises SpecError: resumed with a config that computes something else.
    """
    run = Run(path)
    if run.config_path.exists():
        if not resume:
            raise RunError(
                f"{path} already holds a run. Add --resume to go on with it, "
                "choose another folder with --out, or delete it."
            )
        _check_same(load_config(run.config_path), config, run.config_path)
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(
            f"{path} exists and is not a run folder; expected none, or an empty one. Choose another with --out."
        )
    elif resume:
        raise RunError(
            f"there is no run to resume at {path}. Start it without --resume, or name its folder with --out."
        )
    make_folder(path)
    tokenizer.save(path)
    write_atomically(run.config_path, dump_config(config))
    return run


def forget_run(run: Run) -> None:
    """Remove the folder that `create_run` made, of a run that could not begin; one that holds more stays as it is."""
    if {file.name for file in run.path.iterdir()} <= {run.config_path.name, *TOKENIZER_FILES}:
        remove_folder(run.path)


def is_run(path: str | Path) -> bool:
    """Whether a path is a run folder."""
    return Run(Path(path)).config_path.is_file()


def open_run(path: str | Path) -> Run:
    """An existing run folder. Raises RunError where it is none."""
    run = Run(Path(path))
    if not is_run(path):
        raise RunError(f"{path} is not a run folder; expected config.yaml in it. Make one with `moezoo train CONFIG`.")
    return run


def load_run(path: str | Path) -> tuple[Config, Tokenizer, Checkpoint, list[str]]:
    """Config, tokenizer and newest whole checkpoint of a run, and a line about each damaged checkpoint passed over.

    Raises RunError, SpecError, TokenizerError or CheckpointError.
    """
    run = open_run(path)
    checkpoint, newest, problems = _latest(run)
    config = parse_config(checkpoint.config_text, where=str(newest / "config.yaml"))
    return config, load_tokenizer(run.path), checkpoint, problems


def resume_point(run: Run, step: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint to go on from, or None where none was written yet; and damaged ones passed over.

    `step`: the one of that step, which another process has found so, and verified.
    """
    if step is not None:
        return opened_checkpoint(run.checkpoints_path, step), []
    if not list_checkpoints(run.checkpoints_path):
        return None, []
    checkpoint, _, problems = _latest(run)
    return checkpoint, problems


def _latest(run: Run) -> tuple[Checkpoint, Path, list[str]]:
    checkpoint, newest, problems = load_latest_checkpoint(run.checkpoints_path)
    return checkpoint, newest, [f"passed over: {problem}" for problem in problems]


def _check_same(old: Config, new: Config, where: Path) -> None:
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for dump in (before, after):
        del dump["mesh"]  # a run may go on with other devices
        for name in _MAY_CHANGE:
            del dump["training"][name]
    difference = _first_difference(before, after)
    if difference is not None:
        path, was, given = difference
        raise SpecError(
            f"{path} is {given!r}, but the run was started with {was!r} ({where}). "
            "Resume with the config that it was started with, or start a new run with --out."
        )


def _first_difference(before: Any, after: Any, path: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        pairs = [(f"{path}.{key}" if path else key, before[key], after[key]) for key in before]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(f"{path}[{index}]", *pair) for index, pair in enumerate(zip(before, after, strict=True))]
    else:
        return None if before == after else (path, before, after)
    return next((found for pair in pairs if (found := _first_difference(pair[1], pair[2], pair[0]))), None)
