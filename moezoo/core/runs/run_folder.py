"""The run folder: all files of a run, sufficient to resume it.

<run>/config.yaml     the resolved config, with defaults and the vocabulary size filled in
<run>/tokenizer.json  or tokenizer/: the tokenizer
<run>/data.json       number of tokens and digest of each source, see runs/run_data.py
<run>/metrics.jsonl   one JSON object per line, see training/metrics.py
<run>/sessions.jsonl  the processes that trained the run: version, command, devices, times, see runs/sessions.py
<run>/picture.png     loss and expert load
<run>/manifest.json   size and SHA-256 of the files that do not change, see runs/run_manifest.py
<run>/trackers/       files of the config's trackers, if it has any, see trackers/tracker.py
<run>/lock.json       the process that trains the run, while it does, see runs/run_lock.py
<run>/checkpoints/    see checkpoint/store.py
<run>/base.json       the base model that an adapter is for, if the run holds an adapter alone, see runs/base.py
<run>/huggingface/    file layout of the Hugging Face checkpoint that the run started from, if any, see
                      huggingface/layout.py
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moezoo.core.checkpoint.manifest import NAME
from moezoo.core.checkpoint.store import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_latest_checkpoint,
    load_verified_checkpoint,
)
from moezoo.core.config.differences import differing_fields
from moezoo.core.config.run_config import Config, load_saved_config, parse_config
from moezoo.core.data.load_tokenizer import load_tokenizer
from moezoo.core.data.tokenizers import TOKENIZER_FILE, TOKENIZER_FOLDER, Tokenizer
from moezoo.core.errors import RunError, SpecError
from moezoo.core.files import check_writable, located
from moezoo.core.huggingface.layout import Layout, open_sidecar
from moezoo.core.runs.run_data import DATA_FILE
from moezoo.core.runs.run_lock import check_unlocked
from moezoo.core.runs.run_manifest import CONFIG_FILE, MANIFEST_FILE, verify_run

LOCK_FILE, HUGGINGFACE_FOLDER, BASE_FILE = "lock.json", "huggingface", "base.json"
CHECKPOINTS_FOLDER = "checkpoints"

STATIC = (TOKENIZER_FILE, TOKENIZER_FOLDER, HUGGINGFACE_FOLDER, BASE_FILE, DATA_FILE)
"""Files and folders that are written when a run is created, besides config.yaml, and covered by its manifest."""

# Fields of `training` that may change when a run is resumed: logging, saving, compilation, rematerialization, and the
# number of steps (which moves the schedule).
_MAY_CHANGE = (
    *("steps", "log_every", "validate_every", "validation_sequences", "final_validation_sequences"),
    *("checkpoint_every", "keep_checkpoints"),
    *("layers", "rematerialize"),
)


@dataclass(frozen=True)
class Run:
    """Paths of the files in a run folder.

    Fields:
        path: the folder.
        is_new: the run is about to start, and its folder is made after the first step.
    """

    path: Path
    is_new: bool = False

    @property
    def config_path(self) -> Path:
        return self.path / CONFIG_FILE

    @property
    def lock_path(self) -> Path:
        return self.path / LOCK_FILE

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def picture_path(self) -> Path:
        return self.path / "picture.png"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / CHECKPOINTS_FOLDER

    @property
    def huggingface_path(self) -> Path:
        return self.path / HUGGINGFACE_FOLDER

    @property
    def name(self) -> str:
        return self.path.resolve().name


def prepare_run(path: Path, config: Config, *, resume: bool) -> Run:
    """Check that a run can start in a new folder, or that the run in a folder can be resumed with this config.

    Nothing is written: `RunWriter` does that, after the first step.

    Raises RunError: the folder contains a run and `resume` is False, contains no run and `resume` is True, contains
    other files, or cannot be written; or a file of the run to resume is damaged. Raises SpecError: the config differs
    from that of the run in more than `_MAY_CHANGE`.
    """
    run = Run(path)
    if run.config_path.exists():
        if not resume:
            check_unlocked(run.lock_path)
            raise RunError(
                f"{path} already contains a run. Add --resume (in Python, resume=True) to continue it, choose another "
                "folder with --out, or delete it."
            )
        _check_same(load_run_config(path), config, run.config_path)
        verify_run(run.path, *STATIC)
        return run
    if unfinished_files(path) is None:
        raise RunError(
            f"{path} exists and is not a run folder; expected a new or empty folder. Choose another with --out."
        )
    if resume:
        raise RunError(
            f"there is no run to resume in {located(path)}. Start one without --resume, or set its folder with --out."
        )
    check_writable(path)
    return Run(path, is_new=True)


def unfinished_files(path: Path) -> list[Path] | None:
    """Return the files in a folder in which a run may start: those of a start that was killed, if any.

    Return None if the folder contains a run or other files.
    """
    if not path.exists():
        return []
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    names = {file.name for file in files if not file.name.endswith(".partial")}
    is_start = LOCK_FILE in names and names <= {LOCK_FILE, MANIFEST_FILE, *STATIC}
    return files if is_start or not files else None


def is_run(path: str | Path) -> bool:
    """Return whether a path is a run folder, or the folder of one of a run's checkpoints."""
    return Run(Path(path)).config_path.exists()


def is_step(path: str | Path) -> bool:
    """Return whether a path is the folder of one of a run's checkpoints: `RUN/checkpoints/step_00001000`."""
    folder = Path(path).absolute()
    return folder.parent.name == CHECKPOINTS_FOLDER and NAME.fullmatch(folder.name) is not None and is_run(folder)


def run_of(path: str | Path) -> Path:
    """Return the run folder of a checkpoint's folder; any other path as it is."""
    return Path(path).absolute().parent.parent if is_step(path) else Path(path)


def open_run(path: str | Path) -> Run:
    """Open an existing run folder. Raises RunError: it is not one."""
    run = Run(Path(path))
    if not is_run(path):
        raise RunError(
            f"{located(path)} is not a run folder; expected config.yaml in it. Train one with `moezoo train CONFIG`."
        )
    return run


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load the config of a run, checked with the run's manifest. Raises RunError or SpecError."""
    run = run_of(path)
    verify_run(run, CONFIG_FILE)
    return load_saved_config(Run(run).config_path, overrides)


def load_run_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a run, checked with the run's manifest. Raises RunError or TokenizerError."""
    run = run_of(path)
    verify_run(run, TOKENIZER_FILE, TOKENIZER_FOLDER)
    return load_tokenizer(run)


def load_run_layout(path: str | Path) -> Layout | None:
    """Load the layout of the Hugging Face checkpoint that a run started from, checked with the run's manifest.

    Return None if there is none. Raises RunError or CheckpointError.
    """
    run = run_of(path)
    verify_run(run, HUGGINGFACE_FOLDER)
    return open_sidecar(Run(run).huggingface_path)


def load_run(path: str | Path) -> tuple[Config, Tokenizer, Checkpoint, list[str]]:
    """Load config, tokenizer and newest intact checkpoint of a run; also return a line per damaged checkpoint skipped.

    Of the folder of a checkpoint, load this one.

    Raises RunError, SpecError, TokenizerError or CheckpointError.
    """
    run, problems = open_run(path), list[str]()
    if is_step(path):
        checkpoint, newest = load_checkpoint(run.path), run.path
    else:
        checkpoint, newest, problems = _latest(run)
    config = parse_config(checkpoint.config_text, where=str(newest / "config.yaml"), saved=True)
    return config, load_run_tokenizer(path), checkpoint, problems


def resume_point(run: Run, step: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest intact checkpoint to resume from, None if none was saved yet; and lines for the user.

    The lines name what was skipped, or what the run loses because it starts anew.

    `step`: open this step's checkpoint without verifying its files, because another process has.
    """
    if step is not None:
        return load_verified_checkpoint(run.checkpoints_path, step), []
    if not list_checkpoints(run.checkpoints_path):
        dropped = f"; the steps in {run.metrics_path} are dropped" if run.metrics_path.exists() else ""
        return None, [f"no checkpoint was saved in {run.path}: training starts anew, at step 1{dropped}"]
    checkpoint, _, problems = _latest(run)
    return checkpoint, problems


def _latest(run: Run) -> tuple[Checkpoint, Path, list[str]]:
    checkpoint, newest, problems = load_latest_checkpoint(run.checkpoints_path)
    return checkpoint, newest, [f"skipped: {problem}" for problem in problems]


def _check_same(old: Config, new: Config, where: Path) -> None:
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    for dump in (before, after):
        del dump["mesh"], dump["trackers"]  # a run may be resumed on other devices, and be tracked elsewhere
        for name in _MAY_CHANGE:
            del dump["training"][name]
    for path, (started, resumed) in differing_fields([before, after]):
        raise SpecError(
            f"{path} is {resumed!r:.80}, but the run was started with {started!r:.80} ({where}). "
            "Resume with the config that it was started with, or start a new run with --out."
        )
