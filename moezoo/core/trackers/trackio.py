"""trackio: a SQLite database of all runs, in $TRACKIO_DIR or the cache of Hugging Face."""

import io
from collections.abc import Mapping
from contextlib import redirect_stdout

from moezoo.core.trackers.tracker import PROJECT, TrackedRun, Unlogged


class Trackio:
    """A run in trackio's project `moezoo`, under the run's name and id: the database has the runs of all folders."""

    def __init__(self, run: TrackedRun):
        import trackio

        identity, is_resumed = run.known_id("trackio")
        self._unlogged = Unlogged(run, is_resumed=is_resumed)
        with redirect_stdout(io.StringIO()):  # it prints six lines
            self._run = trackio.init(
                project=PROJECT,
                name=f"{run.name}-{identity}",
                resume="must" if is_resumed else "never",
                config=dict(run.config),
                embed=False,
            )
        self.place = f"trackio show --project {PROJECT}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step in self._unlogged:
            self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()
