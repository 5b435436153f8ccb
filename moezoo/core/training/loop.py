"""The training loop. It uses a backend through its protocol only (`core.backend`), so JAX and MLX share it."""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from moezoo.core.backend import Backend, Model, PendingStep
from moezoo.core.checkpoint.optimizer_state import check_optimizer_state
from moezoo.core.checkpoint.safetensors_file import shapes_of
from moezoo.core.checkpoint.store import Checkpoint
from moezoo.core.config.run_config import Config
from moezoo.core.config.schedules import learning_rate
from moezoo.core.data.prebatched import PrebatchedSplit
from moezoo.core.data.prepare import PreparedData
from moezoo.core.distributed.processes import PendingNumbers
from moezoo.core.errors import DataError, MoezooError, RunError, TrainingError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.parameters.trained import trained_rows
from moezoo.core.random import micro_batch_keys
from moezoo.core.runs.init_from import InitialWeights, open_initial_weights, with_base
from moezoo.core.runs.run_folder import Run, resume_point
from moezoo.core.runs.run_writer import RunWriter
from moezoo.core.signals import stop_on_signal
from moezoo.core.traces.replay import Replay
from moezoo.core.traces.trace import RoutingTrace
from moezoo.core.training.batches import Batches
from moezoo.core.training.check_routers import check_routers
from moezoo.core.training.evaluation import (
    Evaluation,
    ValidationRecord,
    describe_evaluation,
    evaluate,
    known_grammar,
)
from moezoo.core.training.metrics import MetricsFile, Record, has_validation, step_record
from moezoo.core.training.reporter import Reporter, SilentReporter
from moezoo.core.training.saving import CheckpointSaver
from moezoo.core.training.watch import Watch

# Steps in flight delay a stop by a signal. Two keep the device busy; more only of short steps, for which waiting would
# cost speed (a fifth for steps of 5 ms).
_IN_FLIGHT, _IN_FLIGHT_S = 2, 0.25


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training run.

    Fields:
        step: updates done.
        finished: all of `training.steps` and the final validation are done; False if a signal stopped the run.
        evaluation: the final evaluation; None unless finished, or if the config leaves it out.
    """

    step: int
    finished: bool
    evaluation: Evaluation | None


def train(
    config: Config,
    data: PreparedData,
    backend: Backend,
    run: Run,
    *,
    reporter: Reporter | None = None,
    replay: RoutingTrace | None = None,
    exits: bool = False,
) -> TrainingResult:
    """Train to `training.steps`, from the run's newest intact checkpoint if it has one.

    A stop signal (`core.signals`) finishes the current step or leaves the validation, saves a checkpoint, and returns
    with `finished` False; a second SIGINT or SIGTERM raises Interrupted, or ends the process where `exits` is True and
    the device does not return. With several processes, all take part in every step and validation and stop after the
    same step, whichever got the signal; only the first one writes files and reports.

    With `replay`, routers take the experts of a trace of the training data, with a domain for each source (R3): weights
    are their own, and keep their gradient. Validation routes freely.

    The folder of a new run is created after its first step, so that a start that is refused leaves nothing behind.

    Raises TrainingError: the loss or a parameter is not finite. Nothing is saved then, so the last good checkpoint
    stays. Raises any MoezooError if training cannot start, or cannot go on: another process trains the run, its folder
    was moved or deleted, the disk is full.
    """
    writer = RunWriter(run) if backend.processes.is_first else None
    try:
        training = _Training(config, data, backend, run, writer, reporter or SilentReporter(), replay)
    except BaseException:
        if writer is not None:
            writer.close()
        raise
    return training.run_to_end(exits)


class _ValidationStopped(Exception):
    """A signal arrived during a validation."""


class _Training:
    """A training run in progress."""

    def __init__(
        self,
        config: Config,
        data: PreparedData,
        backend: Backend,
        run: Run,
        writer: RunWriter | None,
        reporter: Reporter,
        replay: RoutingTrace | None,
    ):
        self.config, self.data, self.run, self.backend = config, data, run, backend
        self.is_first, self.writer = backend.processes.is_first, writer
        self.reporter = reporter if self.is_first else SilentReporter()
        if isinstance(data.train, PrebatchedSplit):
            data.train.check(config.training)
        checkpoint = self._load_checkpoint()
        for warning in check_routers(config, resumed=checkpoint is not None):
            self.reporter.message(warning)
        initial = self._open_initial_weights() if checkpoint is None else None
        self.first_step = 0 if checkpoint is None else checkpoint.step
        self.model = self._build_model(checkpoint, initial)
        self.step = self.first_step
        self.trained = self.first_step  # the last step that was started
        saved_step = None if checkpoint is None else checkpoint.step
        self.saver = CheckpointSaver(config, backend, self.model, run, writer, saved_step)
        self.layout, self.base = (None, None) if initial is None else (initial.layout, initial.base)
        self.metrics: MetricsFile | None = None  # opened when the first step is done
        own = self.model.own_sequences(config.training.batch_size // config.training.gradient_accumulation)
        several, forced = backend.processes.count > 1, None if replay is None else Replay(replay, config.model)
        self.batches = Batches(data.train, config.training, own, ahead=several, replay=forced)
        self.pending: list[tuple[int, float, PendingStep]] = []  # step, learning rate, metrics
        self.in_flight = _IN_FLIGHT
        self.stop_requests: list[PendingNumbers] = []
        self.grammar = known_grammar(config.data)
        self.watch = Watch(config.model.moe_layers)

    def _load_checkpoint(self) -> Checkpoint | None:
        """Open the checkpoint to resume from. The first process verifies its files; the others use the same step."""
        checkpoint: Checkpoint | None = None
        problems: list[str] = []
        if self.writer is not None and not self.run.is_new:
            problems = self.writer.remove_leftovers()
            checkpoint, skipped = resume_point(self.run)
            problems += skipped
        for problem in problems:
            self.reporter.message(problem)
        step = self.backend.gather(-1 if checkpoint is None else checkpoint.step).fetch()[0]
        return checkpoint if self.is_first or step < 0 else resume_point(self.run, step)[0]

    def _open_initial_weights(self) -> InitialWeights | None:
        """Open the weights that `init_from` names, if any."""
        if self.config.init_from is None:
            return None
        initial = open_initial_weights(self.config)
        for problem in initial.problems:
            self.reporter.message(f"{self.config.init_from.path}: {problem}")
        return initial

    def _build_model(self, checkpoint: Checkpoint | None, initial: InitialWeights | None) -> Model:
        """Build the model, and its optimizer with the checkpoint's moments."""
        config = self.config
        model = self.backend.build(  # no local name for the weights: initial ones are freed as soon as they are built
            config.model, self._weights(checkpoint, initial)
        )
        moments = None if checkpoint is None else checkpoint.optimizer
        trained = trained_rows(config.model, config.training.only)
        if moments is not None:
            where = f"the optimizer state of {self.run.path}"
            check_optimizer_state(shapes_of(moments), config.optimizer, trained, where)
        if self.first_step > config.training.steps:
            raise RunError(
                f"training.steps is {config.training.steps}, but the run has done {self.first_step} ({self.run.path}). "
                f"Use steps >= {self.first_step}."
            )
        model.start_training(
            config.optimizer,
            moments,
            self.first_step,
            rematerialize=config.training.rematerialize,
            layers=config.training.layers,
            trained={row.name for row in trained},
        )
        return model

    def _weights(self, checkpoint: Checkpoint | None, initial: InitialWeights | None) -> Mapping[str, Any]:
        """Return the weights to start from."""
        if checkpoint is not None:
            return with_base(self.config, self.run.path, checkpoint.weights)
        return initial_weights(self.config.model, self.config.training.seed) if initial is None else initial.weights

    def run_to_end(self, exits: bool) -> TrainingResult:
        training, evaluation = self.config.training, None
        if self.first_step:
            self.reporter.message(f"resumed after step {self.first_step}")
        self.clock, self.clock_step = time.monotonic(), self.first_step
        try:
            with stop_on_signal(self._say_stopping, exits=exits) as self.stop:
                self.reporter.start(self.first_step, training.steps)
                if self._validation_is_missing():
                    self._validate(self.step, training.validation_sequences)
                self.batches.prepare(self.step + 1)
                while self.step < training.steps and not self._should_stop():
                    self.step += 1
                    self._step(self.step)
                    self._settle(self.in_flight - 1)
                    self.batches.prepare(self.step + 1)
                self._report(self.step)
                self._save(self.step)
                if self.step < training.steps:
                    self._end_together()
                finished = self.step >= training.steps
                if finished and training.final_validation_sequences is not None:
                    evaluation = self._validate(self.step, training.final_validation_sequences, final=True)
                    finished = evaluation is not None
                self.saver.finish()
        except (DataError, RunError) as error:
            self._rescue()
            raise type(error)(f"{error}{self.saver.kept()}") from error
        finally:
            self.reporter.stop()
            self.saver.close()
        return TrainingResult(self.step, finished, evaluation)

    def _say_stopping(self) -> None:
        saving = (
            f"step {self.step} is saved" if self.step == self.saver.saved_step else f"saving after step {self.step}"
        )
        self.reporter.message(f"stopping: {saving} (a second Ctrl-C or SIGTERM ends at once)")

    def _should_stop(self) -> bool:
        """Return whether a signal or unreadable data asks to stop now; all processes get the same answer.

        Any process may have received the signal, or cannot read the batch after the next one, so they all-gather it.
        The result gathered before the previous step is used: it has arrived, so no process waits for the step in
        progress.
        """
        if self.backend.processes.count == 1:
            return self.stop.is_set()
        wants_stop = self.stop.is_set() or self.batches.failure is not None
        self.stop_requests.append(self.backend.gather(int(wants_stop)))
        return len(self.stop_requests) > 1 and any(self.stop_requests.pop(0).fetch())

    def _end_together(self) -> None:
        """Wait until all processes have saved, and raise the error of the data that stopped them, if it is here."""
        self.saver.finish()
        if self.backend.processes.count > 1:
            self.backend.gather(0).fetch()
        if self.batches.failure is not None:
            raise self.batches.failure

    def _step(self, step: int) -> None:
        training, optimizer = self.config.training, self.config.optimizer
        batch = self.batches.take(step)
        rate = learning_rate(optimizer.schedule, optimizer.learning_rate, step - 1, training.steps)
        keys = micro_batch_keys(training.seed, step - 1, training.gradient_accumulation)
        forced = self.batches.forced(step, batch)
        replayed: dict[str, Any] = {} if forced is None else {"forced": forced}
        started = self.model.train_step(batch.windows, rate, keys, batch.targets, batch.documents, **replayed)
        self.pending.append((step, rate, started))
        self.trained = step
        if step % training.log_every == 0 or step == self.first_step + 1:
            self._report(step)
        if self._validates_after(step):
            self._validate(step, training.validation_sequences)
        if training.checkpoint_every and step % training.checkpoint_every == 0 and step != training.steps:
            self._save(step)

    def _validates_after(self, step: int) -> bool:
        """Return whether a validation follows a step; the final one is not meant."""
        every = self.config.training.validate_every
        return every is not None and 0 < step < self.config.training.steps and step % every == 0

    def _validation_is_missing(self) -> bool:
        """Return whether the run to resume was stopped during the validation that follows its last step."""
        if not self._validates_after(self.first_step):
            return False
        missing = self.is_first and not has_validation(self.run.metrics_path, self.first_step)
        return bool(self.backend.gather(int(missing)).fetch()[0])

    def _settle(self, in_flight: int) -> None:
        """Wait until at most `in_flight` steps are not finished, and check the losses of those that are."""
        while len(self.pending) > in_flight:
            step, rate, pending = self.pending.pop(0)
            metrics = pending.fetch()
            if not math.isfinite(metrics.losses["loss"]):
                raise self._loss_error(step, metrics.losses["loss"])
            self.watch.add(step, metrics.losses["loss"], metrics.load)
            self.newest = step, rate, metrics

    def _report(self, step: int) -> None:
        """Wait for all steps, and log the newest one."""
        if not self.pending:
            return
        self._settle(0)
        now = time.monotonic()
        step_s = max(now - self.clock, 1e-9) / max(step - self.clock_step, 1)
        speed, self.in_flight = self._tokens(1) / step_s, max(_IN_FLIGHT, int(_IN_FLIGHT_S / step_s))
        # The first step of a process compiles, so it has no speed and is left out of the next average.
        self.clock, self.clock_step = now, step
        number, rate, metrics = self.newest
        reported = speed if step > self.first_step + 1 else None
        record = step_record(self.config.model, number, self._tokens(number), rate, metrics, reported)
        self._write(record)
        self.reporter.step(record)
        for warning in self.watch.warnings():
            self.reporter.message(warning)
        if reported is None:  # reporters open at the first step, which takes seconds
            self.clock = time.monotonic()

    def _write(self, record: Record) -> None:
        """Log a record; the first one creates the folder of a new run."""
        if self.writer is None:
            return
        if self.metrics is None:
            self.writer.begin(self.config, self.data, self.layout, self.base)
            self.metrics = MetricsFile(self.run.metrics_path, keep_to_step=self.first_step)
            for problem in self.metrics.problems:
                self.reporter.message(problem)
        self.writer.check()
        self.metrics.write(record)

    def _tokens(self, steps: int) -> int:
        return steps * self.config.training.batch_size * self.config.training.sequence_length

    def _validate(self, step: int, sequences: int, *, final: bool = False) -> Evaluation | None:
        """Evaluate and log; the final validation also compares with a known optimum.

        Return None, and log nothing, if a signal arrives before the last window.
        """
        self._report(step)
        training = self.config.training
        if final:
            self.reporter.message("validating ...")
        try:
            evaluation = evaluate(
                self.model,
                self.data.validation,
                self.data.tokenizer,
                sequence_length=training.sequence_length,
                batch_size=training.batch_size,
                max_windows=sequences,
                grammar=self.grammar if final else None,
                on_progress=self._validation_progress,
            )
        except _ValidationStopped:
            return None
        record = ValidationRecord(step, self._tokens(step), evaluation)
        self._write(record)
        self.reporter.validation(record)
        if not final:
            self.reporter.message(f"step {step}: {describe_evaluation(evaluation)}")
        self.clock, self.clock_step = time.monotonic(), step
        return evaluation

    def _validation_progress(self, what: str, done: int, total: int | None) -> None:
        self.reporter.progress(what, done, total)
        if self._should_stop() and done != total:
            raise _ValidationStopped

    def _save(self, step: int) -> None:
        """Save a checkpoint, if a step was done since the last one."""
        if step in (self.first_step, self.saver.saved_step):
            return
        self._report(step)
        self.saver.finish()
        damaged = self.model.nonfinite_parameters()
        if damaged:
            raise TrainingError(
                f"parameter {damaged[0]} is not finite after step {step}; expected finite numbers. {self._advice()}"
            )
        self.saver.save(step, self._tokens(step))
        self.clock, self.clock_step = time.monotonic(), step

    def _rescue(self) -> None:
        """Save the steps done when data or metrics fail, unless saving has failed, or fails as well."""
        alone = self.backend.processes.count == 1  # several would all have to get here
        if alone and self.metrics is not None and not self.saver.failed:
            with suppress(MoezooError):
                self._save(self.trained)
                self.saver.finish()

    def _loss_error(self, step: int, loss: float) -> TrainingError:
        damaged = self.model.nonfinite_parameters()
        first = f"first parameter that is not finite: {damaged[0]}" if damaged else "all parameters are still finite"
        return TrainingError(f"loss is not finite; got {loss} at step {step}; {first}. {self._advice()}")

    def _advice(self) -> str:
        kept = f"The last good checkpoint is kept in {self.run.checkpoints_path}"
        if self.saver.saved_step is None:
            kept = "Nothing was saved yet"
        return f"{kept}. Lower optimizer.learning_rate, or lengthen the warm-up."
