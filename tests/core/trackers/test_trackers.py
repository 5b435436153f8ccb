"""Trackers get what metrics.jsonl has, continue a resumed run, and never end it. tests/external has the real ones."""

from pathlib import Path
from typing import ClassVar

import pytest
from click.testing import CliRunner

from moezoo.cli.main import main
from moezoo.core.config.run_config import load_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.data.prepare import prepare_data
from moezoo.core.errors import SpecError
from moezoo.core.runs.run_folder import prepare_run
from moezoo.core.trackers import reporter as module
from moezoo.core.trackers.reporter import TrackerReporter, check_installed, tracker_reporters
from moezoo.core.trackers.tracker import TrackedRun, Unlogged
from moezoo.core.trackers.values import step_values, validation_values
from moezoo.core.training.evaluation import Evaluation, Optimum, ValidationRecord
from moezoo.core.training.loop import train
from moezoo.core.training.metrics import LayerRecord, RoutingStatistics, StepRecord, read_metrics
from moezoo.core.training.reporter import Reporters, SilentReporter
from tests.support.recording_model import RecordingModel
from tests.support.small_run import write_config

LAYER = RoutingStatistics(3, (0.75, 0.25), 1.5, 0.125)


class Messages(SilentReporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


class Recorded:
    """A tracker that keeps what it gets, and fails at one step if it is told to."""

    place = "nowhere"
    fails_at = 0
    opened: ClassVar[list["Recorded"]] = []

    def __init__(self, run: TrackedRun):
        self.run, self.identity = run, run.known_id("recorded")
        self.logged: dict[int, dict[str, float]] = {}
        self.ended: bool | None = None
        Recorded.opened.append(self)

    def log(self, step: int, values: dict[str, float]) -> None:
        if step == self.fails_at:
            raise ConnectionError("the server\nis gone")
        self.logged[step] = {**self.logged.get(step, {}), **values}

    def close(self, *, failed: bool) -> None:
        self.ended = failed


@pytest.fixture(autouse=True)
def _recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Recorded, "opened", [])
    monkeypatch.setattr(module, "_is_installed", lambda package: True)
    monkeypatch.setitem(module._OPENERS, "wandb", Recorded)


def run(folder: Path, *overrides: str, resume: bool = False) -> tuple[list[str], Path]:
    """Train without arithmetic, with a recorded tracker; return the messages and the run."""
    config = load_config(write_config(folder, validate_every=4, checkpoint_every=4), ["trackers=wandb", *overrides])
    data = prepare_data(config.data, config.training.sequence_length)
    config = with_vocab_size(config, data.tokenizer.vocab_size)
    prepared, messages = prepare_run(folder / "run", config, resume=resume), Messages()
    reporters = Reporters(messages, *tracker_reporters(config, prepared, messages.message))
    train(config, data, RecordingModel(), prepared, reporter=reporters)
    return messages.lines, folder / "run"


def test_records_have_flat_names() -> None:
    losses = {"loss": 2.5, "cross_entropy": 2.25, "router_z": 0.5, "router_z_weighted": 0.25}
    layer = LayerRecord(LAYER, {"router_z": 0.5}, {"selection_bias": [0.5, -0.5]})
    assert step_values(StepRecord(7, 640, losses, float("nan"), 0.001, None, (layer,))) == {
        **{"loss/total": 2.5, "loss/cross_entropy": 2.25, "loss/router_z": 0.5, "loss/router_z_weighted": 0.25},
        **{"train/tokens": 640, "train/learning_rate": 0.001},
        **{"layers.3/max_vio": 0.5, "layers.3/entropy": pytest.approx(0.8112781), "layers.3/dropped": 0.125},
        **{"layers.3/load/0": 1.5, "layers.3/load/1": 0.5, "layers.3/loss/router_z": 0.5},
        **{"layers.3/selection_bias/0": 0.5, "layers.3/selection_bias/1": -0.5},
    }
    evaluation = Evaluation(2.0, None, 4, 8, 16, (LAYER,), Optimum(9, 1.5, 1.0, 1.1), 2.25)
    values = validation_values(ValidationRecord(7, 640, evaluation))
    assert [values[f"validation/{name}"] for name in ("loss", "inference_loss", "above_optimum")] == [2.0, 2.25, 0.5]
    assert values["validation/layers.3/load/1"] == 0.5
    assert "validation/bits_per_byte" not in values


def test_a_run_is_tracked_step_by_step_and_resumed_under_its_id(tmp_path: Path) -> None:
    lines, path = run(tmp_path, "training.steps=6")
    assert "tracker wandb: nowhere" in lines
    (first,) = Recorded.opened
    assert (first.run.name, first.run.first_step, first.run.logged_to, first.ended) == ("run", 0, 0, False)
    assert first.run.config["training"]["steps"] == 6
    assert sorted(first.logged) == [1, 2, 3, 4, 5, 6]
    assert [step for step in first.logged if "validation/loss" in first.logged[step]] == [4, 6]
    rows = {row["step"]: row for row in read_metrics(path / "metrics.jsonl") if "loss" in row}
    assert [first.logged[step]["train/learning_rate"] for step in rows] == [
        row["learning_rate"] for row in rows.values()
    ]
    run(tmp_path, "training.steps=8", resume=True)
    resumed = Recorded.opened[1]
    assert (resumed.run.first_step, resumed.run.logged_to) == (6, 6)
    assert sorted(resumed.logged) == [7, 8]
    assert (first.identity[1], resumed.identity) == (False, (first.identity[0], True))


def test_tracker_that_fails_is_reported_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorded, "fails_at", 3)
    lines, path = run(tmp_path)
    assert [line for line in lines if "warning" in line] == [
        "warning: tracker wandb failed at step 3 and is off; training goes on (ConnectionError: the server is gone)"
    ]
    assert sorted(Recorded.opened[0].logged) == [1, 2]
    assert len([row for row in read_metrics(path / "metrics.jsonl") if "loss" in row]) == 8


def test_tracker_that_does_not_open_or_close_is_reported(tmp_path: Path) -> None:
    def refuses(run: TrackedRun) -> Recorded:
        raise OSError("no space left")

    messages = Messages()
    record = StepRecord(1, 1, {"loss": 1.0}, 1.0, 1.0, None)
    tracked = TrackedRun("run", tmp_path, {}, 0, 0)
    reporter = TrackerReporter("wandb", refuses, tracked, messages.message)
    reporter.start(0, 2)
    reporter.step(record)
    reporter.step(record)
    reporter.stop()
    assert messages.lines == [
        "warning: tracker wandb failed at step 1 and is off; training goes on (OSError: no space left)"
    ]


def test_run_that_fails_tells_its_trackers(tmp_path: Path) -> None:
    reporter = TrackerReporter("wandb", Recorded, TrackedRun("run", tmp_path, {}, 0, 0), print)
    reporter.step(StepRecord(1, 1, {"loss": 1.0}, 1.0, 1.0, None))
    try:
        raise ValueError("the loss is not finite")
    except ValueError:
        reporter.stop()
    assert Recorded.opened[0].ended is True


def test_steps_that_were_logged_before_a_kill_are_skipped_once(tmp_path: Path) -> None:
    tracked = TrackedRun("run", tmp_path, {}, first_step=40, logged_to=55)
    unlogged = Unlogged(tracked, is_resumed=True)
    assert [step for step in (40, 41, 55, 56) if step in unlogged] == [40, 56]
    assert all(step in Unlogged(tracked, is_resumed=False) for step in (41, 55, 56))


def test_package_that_is_missing_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    (tmp_path / "wandb").mkdir()  # of earlier runs: not the package
    monkeypatch.syspath_prepend(str(tmp_path))
    for package in ("wandb", "trackio"):
        monkeypatch.delitem(module.sys.modules, package, raising=False)
    monkeypatch.setattr(module.importlib.util, "find_spec", find_spec_of(tmp_path))
    with pytest.raises(SpecError, match=r"trackers lists wandb, trackio, not installed.*pip install wandb trackio"):
        check_installed(["wandb", "trackio"])
    result = CliRunner().invoke(main, ["train", str(write_config(tmp_path)), "--set", "trackers=[trackio]"])
    assert result.exit_code == 1
    assert result.stderr.startswith("SpecError: trackers lists trackio")
    assert len(result.stderr.splitlines()) == 1


def find_spec_of(folder: Path):
    """The look-up of packages in one folder alone, whatever is installed beside moezoo."""
    from importlib.machinery import PathFinder

    return lambda package: PathFinder.find_spec(package, [str(folder)])


def test_a_tracker_may_be_named_alone_but_not_twice(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert load_config(config, ["trackers=tensorboard", "model.vocab_size=9"]).trackers == ("tensorboard",)
    with pytest.raises(SpecError, match="trackers lists one twice"):
        load_config(config, ["trackers=[wandb, wandb]", "model.vocab_size=9"])
    with pytest.raises(SpecError, match=r"trackers\[0\]"):
        load_config(config, ["trackers=[mlflow]", "model.vocab_size=9"])
