"""Saving of a run's checkpoints while it trains: whole files at once, sharded ones in the background."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from moezoo.core.backend import Backend, Model, PendingFiles
from moezoo.core.checkpoint.manifest import ARRAYS
from moezoo.core.checkpoint.store import (
    begin_checkpoint,
    clean_up,
    complete_checkpoint,
    list_checkpoints,
    partial_folder,
    save_checkpoint,
)
from moezoo.core.config.run_config import Config, dump_config
from moezoo.core.distributed.processes import first_process_first
from moezoo.core.errors import MoezooError, RunError
from moezoo.core.runs.base import saved_names
from moezoo.core.runs.run_folder import Run
from moezoo.core.runs.run_writer import RunWriter


class CheckpointSaver:
    """Saves checkpoints of a model that is trained. Every process of a group has one.

    Fields:
        saved_step: step of the newest checkpoint, None if there is none; a sharded one may still be written.
        failed: a checkpoint could not be saved.
    """

    def __init__(
        self,
        config: Config,
        backend: Backend,
        model: Model,
        run: Run,
        writer: RunWriter | None,
        saved_step: int | None,
    ):
        self._config, self._backend, self._model, self._run, self._writer = config, backend, model, run, writer
        self._background = ThreadPoolExecutor(1)
        self._saving: Future[None] | None = None
        self.saved_step, self.failed = saved_step, False
        self._names = saved_names(config)

    def save(self, step: int, tokens: int) -> None:
        """Save a checkpoint of `step`; a sharded one is started. Raises RunError, also of one that was started before.

        After an error, earlier checkpoints are complete and nothing else is left.
        """
        self.finish()
        if self._writer is not None:
            self._writer.check()
        try:
            writer = self._model.checkpoint_writer(self._names)
            if writer is None:
                self._save_whole(step, tokens)
            else:
                self._start(step, tokens, writer)
        except MoezooError:
            self.failed = True
            raise
        self.saved_step = step

    def finish(self) -> None:
        """Wait for the checkpoint that is being written in the background, if there is one. Raises RunError."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def close(self) -> None:
        """Release the run, behind a save in progress: the interpreter waits for that at exit."""
        if self._writer is not None:
            released = self._background.submit(self._writer.close)
            if self._saving is None:
                released.result()
        self._background.shutdown(wait=False)

    def kept(self) -> str:
        """Return a sentence for the user about the newest checkpoint on disk; empty if this run has none."""
        mine = self._writer is not None and self.saved_step is not None
        saved = list_checkpoints(self._run.checkpoints_path) if mine else []
        return f" The checkpoint of step {saved[-1].step} is kept: continue with --resume." if saved else ""

    def _save_whole(self, step: int, tokens: int) -> None:
        weights, optimizer = self._model.export_parameters(self._names), self._model.export_optimizer()
        if self._writer is not None:
            text, keep = dump_config(self._config), self._config.training.keep_checkpoints
            save_checkpoint(self._run.checkpoints_path, step, weights, optimizer, text, keep, tokens=tokens)

    def _start(self, step: int, tokens: int, writer: Callable[[Path], PendingFiles]) -> None:
        """Start a checkpoint whose arrays are written by all processes, each its own shards."""
        folder_of = partial_folder if self._writer is None else begin_checkpoint
        partial = first_process_first(self._backend, lambda: folder_of(self._run.checkpoints_path, step))
        files = writer(partial / ARRAYS)

        def complete() -> None:
            try:
                files.finish()
                if self._writer is not None:
                    text, keep = dump_config(self._config), self._config.training.keep_checkpoints
                    complete_checkpoint(partial, step, text, keep, tokens=tokens)
            except MoezooError:
                self.failed = True
                if self._writer is not None:
                    with suppress(RunError):
                        clean_up(self._run.checkpoints_path)
                raise

        self._saving = self._background.submit(complete)
