"""Writing of a run that this process trains: its lock, and its files, which are made after the first step.

A start that is refused, by the first batch for instance, leaves no folder behind. One that is killed while it makes the
folder leaves lock.json and no config.yaml; the next start then removes its files.
"""

from moezoo.core.checkpoint.store import clean_up
from moezoo.core.config.run_config import Config, dump_config
from moezoo.core.data.prepare import PreparedData
from moezoo.core.errors import RunError
from moezoo.core.files import make_folder, remove_empty_folder, remove_folder, remove_partial_files, write_atomically
from moezoo.core.huggingface.layout import Layout, write_sidecar
from moezoo.core.runs.base import Base, dump_base
from moezoo.core.runs.run_data import DATA_FILE, dump_data
from moezoo.core.runs.run_folder import BASE_FILE, STATIC, Run, unfinished_files
from moezoo.core.runs.run_lock import RunLock
from moezoo.core.runs.run_manifest import CONFIG_FILE, replace_file, seal_run


class RunWriter:
    """A run folder that only this process writes to, from its creation until `close`."""

    def __init__(self, run: Run):
        """Lock the run; a new one is locked when it is created. Raises RunError: another process trains it."""
        self._run = run
        self._lock = None if run.is_new else RunLock(run.lock_path)

    def remove_leftovers(self) -> list[str]:
        """Remove what killed processes left in an existing run; return a line for the user about each."""
        if self._lock is None:
            return []
        left_by = self._lock.left_by
        notes = [] if left_by is None else [f"{left_by} ended without closing {self._run.path}; the run is taken over"]
        for folder in (self._run.path, self._run.huggingface_path):
            remove_partial_files(folder)
        return notes + clean_up(self._run.checkpoints_path)

    def begin(self, config: Config, data: PreparedData, layout: Layout | None, base: Base | None = None) -> None:
        """Create the run folder, or save the config and the record of the data with which a run is resumed.

        `layout`: of the Hugging Face checkpoint that a new run starts from; None if there is none. `base`: of a run
        that holds an adapter alone.

        Raises RunError: the folder cannot be written, or another process has started a run in it in the meantime.
        """
        if self._run.is_new:
            self._create(config, data, layout, base)
        else:
            replace_file(self._run.path, CONFIG_FILE, dump_config(config))
            replace_file(self._run.path, DATA_FILE, dump_data(data.summary))

    def check(self) -> None:
        """Raise RunError if the run folder was moved or deleted."""
        if self._lock is not None:
            self._lock.check()

    def close(self) -> None:
        """Release the lock."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def _create(self, config: Config, data: PreparedData, layout: Layout | None, base: Base | None) -> None:
        run = self._run
        is_mine = not run.path.exists()
        make_folder(run.path)
        self._lock = RunLock(run.lock_path)
        try:
            self._remove_unfinished()
            data.tokenizer.save(run.path)
            write_atomically(run.path / DATA_FILE, dump_data(data.summary))
            if base is not None:
                write_atomically(run.path / BASE_FILE, dump_base(base))
            elif layout is not None:
                write_sidecar(layout, run.huggingface_path)
            seal_run(run.path, STATIC, dump_config(config))
        except BaseException:
            if unfinished_files(run.path) is not None:
                self._remove_unfinished()
            self.close()
            if is_mine:
                remove_empty_folder(run.path)
            raise

    def _remove_unfinished(self) -> None:
        files = unfinished_files(self._run.path)
        if files is None:
            raise RunError(
                f"another process has written to {self._run.path} since this one started; expected a new or empty "
                "folder. Nothing was saved. Choose another folder with --out."
            )
        for file in files:
            if file != self._run.lock_path:
                remove_folder(file)
