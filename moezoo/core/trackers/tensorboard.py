"""TensorBoard: an event file per process in the run folder, written by TensorBoard's own writer without TensorFlow."""

import time
from collections.abc import Mapping
from typing import Any

import yaml

from moezoo.core.trackers.tracker import TrackedRun


class TensorBoard:
    """A run in TensorBoard: `tensorboard --logdir runs` shows it. The config is a text."""

    def __init__(self, run: TrackedRun):
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))
        self.place = f"tensorboard --logdir {folder}"
        if run.first_step:  # points of these steps and later ones in earlier files are dropped by readers
            self._add(run.first_step + 1, session_log=SessionLog(status=SessionLog.START))
        text = yaml.safe_dump(dict(run.config), sort_keys=False)
        indented = "".join(f"    {line}\n" for line in text.splitlines())  # a block of code in Markdown
        self._add(run.first_step, summary=text_pb("config", indented))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step, summary=Summary(value=[Summary.Value(tag=name, simple_value=values[name]) for name in values]))
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))
