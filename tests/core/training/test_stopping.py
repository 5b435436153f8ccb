"""A signal during training or validation: saved, answered with a message, and the device is not far ahead."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo.core.backend import Scores, StepMetrics
from moezoo.core.checkpoint.store import list_checkpoints
from moezoo.core.config.run_config import load_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.data.prepare import prepare_data
from moezoo.core.data.splits import Split
from moezoo.core.distributed.processes import Numbers, Processes
from moezoo.core.errors import DataError
from moezoo.core.runs.run_folder import prepare_run
from moezoo.core.training import loop
from moezoo.core.training.loop import TrainingResult, train
from moezoo.core.training.metrics import read_metrics
from moezoo.core.training.reporter import SilentReporter
from tests.core.training.test_loop import RecordingModel
from tests.support.small_run import write_config


class Model(RecordingModel):
    """Calls functions at steps and at scored batches, and counts steps in flight."""

    def __init__(self, at_step: Callable[[int], None] = int, at_batch: Callable[[int], None] = int) -> None:
        super().__init__()
        self.at_step, self.at_batch, self.batches, self.in_flight, self.most = at_step, at_batch, 0, 0, 0

    def train_step(
        self,
        windows: np.ndarray,
        learning_rate: float,
        keys: np.ndarray,
        targets: np.ndarray,
        documents: np.ndarray | None = None,
    ) -> "RecordingModel":
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        pending = super().train_step(windows, learning_rate, keys, targets)
        self.at_step(len(self.keys))
        return pending

    def fetch(self) -> StepMetrics:
        self.in_flight -= 1
        return super().fetch()

    def score(self, tokens: np.ndarray, targets: np.ndarray, **options: object) -> Scores:
        self.batches += 1
        self.at_batch(self.batches)
        return super().score(tokens, targets)


class Messages(SilentReporter):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def send_at(number: int, name: str) -> Callable[[int], None]:
    return lambda index: os.kill(os.getpid(), getattr(signal, name)) if index == number else None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[TrainingResult, list[str]]]:
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))

    def start(model: Any, *, resume: bool = False, **training: object) -> tuple[TrainingResult, list[str]]:
        config = load_config(write_config(tmp_path, **training))
        data = prepare_data(config.data, config.training.sequence_length)
        config = with_vocab_size(config, data.tokenizer.vocab_size)
        reporter = Messages()
        prepared = prepare_run(tmp_path / "run", config, resume=resume)
        return train(config, data, model, prepared, reporter=reporter), reporter.messages

    return start


def saved(tmp_path: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints")]


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGUSR1"])
def test_signal_during_a_step_saves_after_it(name: str, run: Any, tmp_path: Path) -> None:
    result, messages = run(Model(at_step=send_at(3, name)))
    assert (result.step, result.finished, saved(tmp_path)) == (3, False, [3])
    answers = ("saving after step 3", "step 3 is saved")  # the save may be over before the thread that answers runs
    assert messages in [[f"stopping: {answer} (a second Ctrl-C or SIGTERM ends at once)"] for answer in answers]


def test_signal_during_the_final_validation_leaves_it_and_resuming_repeats_it(run: Any, tmp_path: Path) -> None:
    model = Model(at_batch=send_at(2, "SIGTERM"))
    result, messages = run(model)
    assert (result.finished, result.evaluation, model.batches, saved(tmp_path)) == (False, None, 2, [8])
    assert "stopping: step 8 is saved (a second Ctrl-C or SIGTERM ends at once)" in messages
    again = Model()
    resumed, _ = run(again, resume=True)
    assert (resumed.finished, len(again.keys), saved(tmp_path)) == (True, 0, [8])
    assert resumed.evaluation is not None
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "windows" in line] == [8]


def test_signal_during_a_validation_between_steps_saves_that_step(run: Any, tmp_path: Path) -> None:
    model = Model(at_batch=send_at(1, "SIGHUP"))
    assert run(model, validate_every=4)[0].step == 4
    assert (model.batches, saved(tmp_path)) == (1, [4])


def test_resuming_repeats_the_validation_that_a_signal_ended(run: Any, tmp_path: Path) -> None:
    run(Model(at_batch=send_at(1, "SIGHUP")), validate_every=4)
    run(Model(), validate_every=4, resume=True)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert [line["step"] for line in lines if "windows" in line] == [4, 8]


@pytest.mark.parametrize(("ahead_s", "most"), [(0.0, 2), (60.0, 15)])
def test_only_short_steps_are_in_flight_beyond_two(
    ahead_s: float, most: int, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_IN_FLIGHT_S", ahead_s)
    model = Model()
    run(model, steps=30, log_every=15)
    assert (model.most, model.in_flight, len(model.keys)) == (most, 0, 30)


@pytest.mark.parametrize("sequences", [2, None])
def test_final_validation_has_the_windows_of_the_config_or_is_left_out(sequences: int | None, run: Any) -> None:
    result, _ = run(Model(), steps=1, final_validation_sequences=sequences)
    assert result.finished
    assert (result.evaluation and result.evaluation.windows) == sequences


# --- data that cannot be read ----------------------------------------------------------------------------------------


class OneOfTwo(Model):
    """The first of two processes; the other one asks to stop in its gather number `other_at`."""

    processes = Processes(0, 2)

    def __init__(self, other_at: int = -1) -> None:
        super().__init__()
        self.other_at, self.gathered = other_at, list[int]()

    def gather(self, number: int) -> Numbers:
        self.gathered.append(number)
        return Numbers((number, int(len(self.gathered) == self.other_at)))


def fail_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Split.batch

    def failing(split: Split, index: int, *arguments: Any) -> Any:
        if index == step - 1:
            raise DataError("the shard was truncated.")
        return batch(split, index, *arguments)

    monkeypatch.setattr(Split, "batch", failing)


@pytest.mark.parametrize("model", [Model, OneOfTwo])
def test_data_that_cannot_be_read_on_saves_the_steps_done(
    model: type[Model], run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(6, monkeypatch)
    made = model()
    with pytest.raises(DataError, match=r"^the shard was truncated\. The checkpoint of step 5 is kept"):
        run(made)
    assert len(made.keys) == 5
    assert [saved.step for saved in list_checkpoints(tmp_path / "run" / "checkpoints")] == [5]


def test_process_stops_where_another_one_cannot_read_on(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(6, monkeypatch)
    failed = OneOfTwo()
    with pytest.raises(DataError):
        run(failed)
    shutil.rmtree(tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    other = OneOfTwo(other_at=failed.gathered.index(1) + 1)
    result, _ = run(other)
    assert (result.step, result.finished) == (5, False)
    assert [saved.step for saved in list_checkpoints(tmp_path / "run" / "checkpoints")] == [5]
    assert len(other.gathered) == len(failed.gathered)
