"""Weights & Biases: an offline run in the run folder, or one that is uploaded if WANDB_MODE=online is set."""

import os
from collections.abc import Mapping

from moezoo.core.trackers.tracker import PROJECT, TrackedRun, Unlogged

_FLUSH = {"x_transaction_log_flush_interval": 1.0}  # seconds; with wandb's own 15 a kill loses more


class Wandb:
    """A run in wandb. A resumed run has the same id, and offline a further folder."""

    def __init__(self, run: TrackedRun):
        import wandb

        identity, is_resumed = run.known_id("wandb")
        self._unlogged = Unlogged(run, is_resumed=is_resumed)
        mode = os.environ.get("WANDB_MODE", "offline")
        flush = {name: _FLUSH[name] for name in _FLUSH.keys() & wandb.Settings.model_fields.keys()}
        # `console`: wandb does not take over what the terminal shows. `resume`: wandb ignores it offline.
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=identity,
            dir=str(run.folder),
            mode=mode,
            resume="allow",
            config=dict(run.config),
            settings=wandb.Settings(console="off", silent=True, **flush),
        )
        offline = f"{mode}; to upload: wandb sync {run.folder}/wandb/offline-run-*"
        self.place = self._run.url if mode == "online" else offline

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step in self._unlogged:
            self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
