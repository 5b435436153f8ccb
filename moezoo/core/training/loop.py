"""The train loop, written once: it knows the backend protocol and nothing of JAX or MLX."""

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.core.backend import Backend, Model, PendingStep, StepMetrics
from moezoo.core.checkpoint.manifest import ARRAYS
from moezoo.core.checkpoint.safetensors_file import shapes_of
from moezoo.core.checkpoint.store import (
    Checkpoint,
    begin_checkpoint,
    check_names_and_shapes,
    complete_checkpoint,
    partial_folder,
    save_checkpoint,
)
from moezoo.core.config.run_config import Config, dump_config
from moezoo.core.config.schedules import learning_rate
from moezoo.core.data.prebatched import ReadyBatches
from moezoo.core.data.prepare import PreparedData
from moezoo.core.distributed.processes import PendingNumbers, first_then_others
from moezoo.core.errors import RunError, TrainingError
from moezoo.core.huggingface.layout import write_sidecar
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.random import micro_batch_keys
from moezoo.core.runs.init_from import Start, open_start
from moezoo.core.runs.run_folder import Run, forget_run, resume_point
from moezoo.core.training.evaluation import MAX_WINDOWS, Evaluation, describe_evaluation, evaluate, known_grammar
from moezoo.core.training.metrics import MetricsFile, layer_losses, layer_state, routing_statistics
from moezoo.core.training.reporter import Reporter, SilentReporter


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended: `step` updates done, `finished` or stopped by a signal, the final evaluation if finished."""

    step: int
    finished: bool
    evaluation: Evaluation | None


def train(
    config: Config, data: PreparedData, backend: Backend, run: Run, *, reporter: Reporter | None = None
) -> TrainingResult:
    """Train from the run's newest whole checkpoint, or from the beginning, to `training.steps`.

    SIGINT and SIGTERM end the step, save, and return with `finished` False. Of several processes all take part in
    every step and validation, and stop after the same step, whichever got the signal; the first alone writes and tells.

    Raises TrainingError: the loss or a parameter is not finite. Nothing is saved then; the last good checkpoint stays.
    Raises MoezooError of any kind where the run cannot begin; a folder that was made for it alone is removed then.
    """
    try:
        training = _Training(config, data, backend, run, reporter or SilentReporter())
    except BaseException:
        if backend.processes.is_first:
            forget_run(run)
        raise
    return training.go()


class _Training:
    def __init__(self, config: Config, data: PreparedData, backend: Backend, run: Run, reporter: Reporter):
        self.config, self.data, self.run, self.backend = config, data, run, backend
        self.is_first = backend.processes.is_first
        self.reporter = reporter if self.is_first else SilentReporter()
        if isinstance(data.train, ReadyBatches):
            data.train.check(config.training)
        checkpoint = self._resume_point()
        self.first_step = 0 if checkpoint is None else checkpoint.step
        start = self._start() if checkpoint is None else None
        begins = checkpoint or start
        self.model: Model = backend.build(
            config.model, initial_weights(config.model, config.training.seed) if begins is None else begins.weights
        )
        state = None if checkpoint is None else checkpoint.optimizer
        if state is not None:
            check_names_and_shapes(
                shapes_of(state),
                {
                    f"{moment}.{row.name}": row.shape
                    for moment in ("first_moment", "second_moment")
                    for row in parameter_table(config.model)
                    if row.trained
                },
                f"the optimizer state of {run.path}",
            )
        if self.first_step > config.training.steps:
            raise RunError(
                f"training.steps is {config.training.steps}, but the run has done {self.first_step} ({run.path}). "
                f"Use steps >= {self.first_step}."
            )
        self.model.start_training(
            config.optimizer,
            state,
            self.first_step,
            rematerialize=config.training.rematerialize,
            layers=config.training.layers,
        )
        self.saved: Path | None = None if checkpoint is None else run.checkpoints_path
        self.metrics = MetricsFile(run.metrics_path, keep_to_step=self.first_step) if self.is_first else None
        if self.is_first and start is not None and start.layout is not None:
            write_sidecar(start.layout, run.huggingface_path)
        self.own = self.model.own_sequences(config.training.batch_size // config.training.gradient_accumulation)
        self.pending: list[tuple[int, float, PendingStep]] = []
        self.stops_asked: list[PendingNumbers] = []
        self.background = ThreadPoolExecutor(1)
        self.saving: Future[None] | None = None
        self.grammar = known_grammar(config.data)

    def _resume_point(self) -> Checkpoint | None:
        """The first process verifies the files, and the others believe it."""
        checkpoint, problems = resume_point(self.run) if self.is_first else (None, [])
        for problem in problems:
            self.reporter.message(problem)
        step = self.backend.gather(-1 if checkpoint is None else checkpoint.step).fetch()[0]
        return checkpoint if self.is_first or step < 0 else resume_point(self.run, step)[0]

    def _start(self) -> Start | None:
        if self.config.init_from is None:
            return None
        start = open_start(self.config)
        for problem in start.problems:
            self.reporter.message(f"{self.config.init_from.path}: {problem}")
        return start

    def go(self) -> TrainingResult:
        training = self.config.training
        if self.first_step:
            self.reporter.message(f"resumed after step {self.first_step}")
        self.reporter.start(self.first_step, training.steps)
        self.clock, self.clock_step = time.monotonic(), self.first_step
        try:
            with _stop_on_signal() as stop:
                step = self.first_step
                while step < training.steps and not self._stops(stop):
                    step += 1
                    self._step(step)
                self._report(step)
                self._save(step)
                finished = step >= training.steps
                evaluation = self._validate(step, whole=True) if finished else None
                self._saved()
        finally:
            self.reporter.stop()
            self.background.shutdown(wait=False)  # what is being saved goes on: the interpreter waits for it
            if self.metrics is not None:
                self.metrics.close()
        return TrainingResult(step, finished, evaluation)

    def _stops(self, stop: threading.Event) -> bool:
        """Whether to stop here. Of several processes all get the same answer, since each may have had the signal.

        What they said before the last step is what counts: by then it is there, so nobody waits for the step under way.
        """
        if self.backend.processes.count == 1:
            return stop.is_set()
        self.stops_asked.append(self.backend.gather(int(stop.is_set())))
        return len(self.stops_asked) > 1 and any(self.stops_asked.pop(0).fetch())

    def _step(self, step: int) -> None:
        training, optimizer = self.config.training, self.config.optimizer
        micro_batches = training.gradient_accumulation
        firsts = np.arange(micro_batches) * (training.batch_size // micro_batches)
        windows = self.data.train.batch(
            step - 1,
            training.batch_size,
            training.sequence_length,
            training.seed,
            np.add.outer(firsts, self.own).ravel(),
        )
        windows = windows.reshape(micro_batches, -1, windows.shape[-1])
        rate = learning_rate(optimizer.schedule, optimizer.learning_rate, step - 1, training.steps)
        keys = micro_batch_keys(training.seed, step - 1, training.gradient_accumulation)
        self.pending.append((step, rate, self.model.train_step(windows, rate, keys)))
        if step % training.log_every == 0 or step == self.first_step + 1:
            self._report(step)
        last = step == training.steps
        if training.validate_every and step % training.validate_every == 0 and not last:
            self._validate(step, whole=False)
        if training.checkpoint_every and step % training.checkpoint_every == 0 and not last:
            self._save(step)

    def _report(self, step: int) -> None:
        """Wait for the steps since the last report, check them, and write and show the newest."""
        if not self.pending:
            return
        for number, rate, pending in self.pending:
            metrics = pending.fetch()
            if not math.isfinite(metrics.losses["loss"]):
                raise TrainingError(self._not_finite(number, metrics.losses["loss"]))
            newest = number, rate, metrics
        self.pending.clear()
        now = time.monotonic()
        speed = (step - self.clock_step) * self._tokens(1) / max(now - self.clock, 1e-9)
        # The first step of a process compiles; it would spoil the average of those after it.
        self.clock, self.clock_step = now, step
        record = self._record(*newest, speed if step > self.first_step + 1 else None)
        self._write(record)
        self.reporter.step(record)

    def _write(self, record: Mapping[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(record)

    def _record(self, step: int, rate: float, metrics: StepMetrics, speed: float | None) -> dict[str, Any]:
        kinds: list[str] = [*dict.fromkeys(loss.kind for _, moe in self.config.model.moes for loss in moe.losses)]
        kinds += ["index"] if "index" in metrics.losses else []
        names = ["loss", "cross_entropy", *(name for kind in kinds for name in (kind, f"{kind}_weighted"))]
        routing = routing_statistics(self.config.model.moe_layers, metrics.load, metrics.dropped)
        for row in routing:
            row["losses"] = layer_losses(metrics.losses, row["layer"])
            row.update(layer_state(metrics.state, row["layer"]))
        return {
            "step": step,
            "tokens": self._tokens(step),
            **{name: metrics.losses[name] for name in names},
            "gradient_norm": metrics.gradient_norm,
            "learning_rate": rate,
            "tokens_per_second": None if speed is None else round(speed, 1),
            "routing": routing,
        }

    def _tokens(self, steps: int) -> int:
        return steps * self.config.training.batch_size * self.config.training.sequence_length

    def _validate(self, step: int, *, whole: bool) -> Evaluation:
        self._report(step)
        training = self.config.training
        if whole:
            self.reporter.message("validating ...")
        evaluation = evaluate(
            self.model,
            self.data.validation,
            self.data.tokenizer,
            sequence_length=training.sequence_length,
            batch_size=training.batch_size,
            max_windows=MAX_WINDOWS if whole else training.validation_sequences,
            grammar=self.grammar if whole else None,
            on_progress=self.reporter.validating,
        )
        self._write({"step": step, "tokens": self._tokens(step), **evaluation.to_dict()})
        if not whole:
            self.reporter.message(f"step {step}: {describe_evaluation(evaluation)}")
        self.clock, self.clock_step = time.monotonic(), step
        return evaluation

    def _save(self, step: int) -> None:
        if step == self.first_step and self.saved is not None:
            return
        self._report(step)
        self._saved()
        damaged = self.model.not_finite()
        if damaged:
            raise TrainingError(
                f"parameter {damaged[0]} is not finite after step {step}; expected finite numbers. {self._way_out()}"
            )
        self.saved = self.run.checkpoints_path
        extra: dict[str, Any] = {}
        rest = dump_config(self.config), extra, self.config.training.keep_checkpoints
        writer = self.model.files_writer()
        if writer is None:
            weights, optimizer = self.model.export_parameters(), self.model.export_optimizer()
            if self.is_first:
                save_checkpoint(self.saved, step, weights, optimizer, *rest, tokens=self._tokens(step))
        else:
            begin = begin_checkpoint if self.is_first else partial_folder
            partial = first_then_others(self.backend, lambda: begin(self.run.checkpoints_path, step))
            files = writer(partial / ARRAYS)

            def complete() -> None:
                files.finish()
                if self.is_first:
                    complete_checkpoint(partial, step, *rest, tokens=self._tokens(step))

            self.saving = self.background.submit(complete)
        self.clock, self.clock_step = time.monotonic(), step

    def _saved(self) -> None:
        """Wait for the checkpoint that is being written in the background, if there is one."""
        if self.saving is not None:
            saving, self.saving = self.saving, None
            saving.result()

    def _not_finite(self, step: int, loss: float) -> str:
        damaged = self.model.not_finite()
        first = f"first parameter that is not finite: {damaged[0]}" if damaged else "all parameters are still finite"
        return f"loss is not finite; got {loss} at step {step}; {first}. {self._way_out()}"

    def _way_out(self) -> str:
        kept = (
            f"The last good checkpoint is kept in {self.run.checkpoints_path}"
            if self.saved
            else "Nothing was saved yet"
        )
        return f"{kept}. Lower optimizer.learning_rate, or lengthen the warm-up."


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Set the event at SIGINT or SIGTERM, so that the step under way ends and is saved; a second one ends at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
