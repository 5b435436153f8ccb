"""Runs of two MLX processes on this machine: same losses as one process, one writer, a common stop, and failures."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from moezoo.core.checkpoint.store import list_checkpoints
from moezoo.core.distributed import launch
from moezoo.core.errors import TrainingError
from moezoo.core.signals import Interrupted
from moezoo.core.training.metrics import read_metrics
from tests.support.backends_available import require_backend
from tests.support.launched import TIMEOUT_S, assert_ends_with_the_first, begun, lines, start, train
from tests.support.small_run import MODEL, write_config

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
"""Tolerance of the loss of two processes against one over 10 steps: reordered float32 sums, amplified by updates."""
STEPS = 10


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """10 steps with most losses and router states that depend on the global batch, micro-batches, and noise."""
    require_backend("mlx")
    folder = tmp_path_factory.mktemp("several")
    path = write_config(folder, steps=STEPS, batch_size=8, gradient_accumulation=2, seed=5)
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    layer: dict[str, Any] = MODEL["layers"][0]
    router = {"top_k": 2, "score": "sigmoid", "selection_bias": {"rate": 0.01}}
    counted = ["switch_balance", "router_z", "global_balance", "sequence_balance"]
    noisy = {"top_k": 2, "choice": {"kind": "noisy_top_k"}, "weight": "softmax_of_chosen", "renormalize": "none"}
    raw["model"]["dropout"] = 0.1
    raw["model"]["layers"] = [
        {**layer, "repeat": 1, "moe": {**layer["moe"], "router": of, "losses": losses}}
        for of, losses in (
            (router, [{"kind": kind, "coefficient": 0.01} for kind in counted]),
            (noisy, [{"kind": kind, "coefficient": 0.1} for kind in ("importance", "load")]),
        )
    ]
    raw["optimizer"]["schedule"] = {"kind": "constant"}
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEZOO_CACHE", str(folder / "cache"))
        patch.delenv("OPENBLAS_NUM_THREADS", raising=False)
        yield path


@pytest.fixture(scope="module")
def two(config: Path) -> tuple[Path, str]:
    """Run folder and output of 10 steps of two processes."""
    out = config.with_name("two")
    return out, train("mlx", config, out)


def test_two_processes_have_the_losses_of_one_process(config: Path, two: tuple[Path, str]) -> None:
    train("mlx", config, config.with_name("one"), count=1)
    one, other = lines(config.with_name("one")), lines(two[0])
    assert [line["step"] for line in one] == [line["step"] for line in other] == list(range(1, STEPS + 1))
    for a, b in zip(one, other, strict=True):
        for key in ("loss", "cross_entropy", "global_balance", "importance", "load", "gradient_norm"):
            assert b[key] == pytest.approx(a[key], rel=10 * TOLERANCE, abs=TOLERANCE), (a["step"], key)
        assert abs(a["loss"] - b["loss"]) <= TOLERANCE, a["step"]
        for mine, its in zip(a["routing"], b["routing"], strict=True):
            assert its["load"] == pytest.approx(mine["load"], abs=1e-6)
            assert its.get("selection_bias") == pytest.approx(mine.get("selection_bias"), abs=1e-6)
    (validated,), (also,) = (
        [line for line in read_metrics(out / "metrics.jsonl") if "validation_loss" in line]
        for out in (config.with_name("one"), two[0])
    )
    assert also["validation_loss"] == pytest.approx(validated["validation_loss"], abs=TOLERANCE)


def test_only_the_first_process_prints_and_writes(two: tuple[Path, str]) -> None:
    out, output = two
    assert output.count("processes     2, each with all weights and 1/2 of a batch") == 1
    assert output.count("run folder: ") == 1
    assert "[1]" not in output
    assert len(list_checkpoints(out / "checkpoints")) == 1


@pytest.mark.release
def test_mlx_launch_runs_the_same_training(config: Path, two: tuple[Path, str]) -> None:
    out = config.with_name("mlx_launch")
    command = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--env", "OPENBLAS_NUM_THREADS=1"]
    command += ["--", sys.executable, "-m", "moezoo", "train", str(config), "--backend", "mlx", "--out", str(out)]
    quiet, kept_open = os.pipe()  # Trap: at the end of its input mlx.launch keeps reading, and uses a core for it
    done = subprocess.run(command, stdin=quiet, capture_output=True, text=True, timeout=TIMEOUT_S)
    os.close(quiet)
    os.close(kept_open)
    assert [line["loss"] for line in lines(out)] == [line["loss"] for line in lines(two[0])], done.stderr


def test_signal_to_one_process_stops_all_after_the_same_step_and_saves_once(
    config: Path, two: tuple[Path, str]
) -> None:
    out = config.with_name("stopped")
    running, (_, second) = begun("mlx", config, out)
    os.kill(second, signal.SIGTERM)
    output, _ = running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == 0, output
    assert output.count("stopped and saved after step") == 1
    assert f"moezoo launch --nproc 2 train {config} --backend mlx" in output
    (saved,) = list_checkpoints(out / "checkpoints")
    step = lines(out)[-1]["step"]
    assert f"after step {step} of" in output
    assert saved.step == step
    more = ("--set", f"training.steps={step + 2}")
    train("mlx", config, out, *more, "--resume")
    whole = two[0]
    if step + 2 > STEPS:  # on a slow machine the signal comes late
        whole = config.with_name("whole")
        train("mlx", config, whole, *more)
    assert [line["loss"] for line in lines(out)] == [line["loss"] for line in lines(whole)][: step + 2]


@pytest.mark.release
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_hangup_or_scheduler_warning_to_the_launcher_saves(number: signal.Signals, config: Path) -> None:
    out = config.with_name(number.name)
    running, _ = begun("mlx", config, out)
    running.send_signal(number)
    output, _ = running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == 0, output
    assert output.count("stopped and saved after step") == 1
    assert [saved.step for saved in list_checkpoints(out / "checkpoints")] == [lines(out)[-1]["step"]]


def test_a_killed_process_ends_the_group_with_an_error(config: Path) -> None:
    running, (_, second) = begun("mlx", config, config.with_name("killed"))
    os.kill(second, signal.SIGKILL)
    began = time.monotonic()
    output, _ = running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == 1
    assert time.monotonic() - began < launch.GRACE_S + 5
    assert "TrainingError: process 1 of 2 was killed by SIGKILL" in output
    assert subprocess.run(["pgrep", "-f", str(config.with_name("killed"))], check=False).returncode == 1


def test_an_error_of_the_first_process_ends_the_group(config: Path, two: tuple[Path, str]) -> None:
    assert_ends_with_the_first("mlx", config, two[0])


def test_batch_that_is_not_divisible_by_two_is_refused(config: Path) -> None:
    words = ("--set", "training.batch_size=6", "--set", "training.gradient_accumulation=2")
    running = start("train", config, "--backend", "mlx", "--out", config.with_name("odd"), *words)
    output, _ = running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == 1
    assert "SpecError: a micro-batch cannot be divided equally among 2 processes; got 3 sequences" in output


# --- without a backend -----------------------------------------------------------------------------------------------


def waiting(program: str) -> subprocess.Popen[bytes]:
    """Start a Python process and wait until it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os, signal, sys, time\n{program}\nprint(flush=True)\ntime.sleep(60)"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_process_that_ignores_sigterm_is_killed_after_the_grace_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    ignoring, other = waiting("signal.signal(signal.SIGTERM, signal.SIG_IGN)"), waiting("")
    launch._end([ignoring, other])
    assert [ignoring.returncode, other.returncode] == [-signal.SIGKILL, -signal.SIGTERM]
    for process in (ignoring, other):
        process.stdout.close()


def test_second_signal_kills_processes_that_ignore_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    program = "import signal, time; signal.signal(2, signal.SIG_IGN); signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    monkeypatch.setattr(launch, "process_commands", lambda *_: [([sys.executable, "-c", program], {})] * 2)
    timers = [threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)) for delay in (0.8, 1.0)]
    for timer in timers:
        timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch.launch(2, [], "mlx")
    assert time.monotonic() - began < 10


def test_stop_signals_are_forwarded_and_only_a_second_urgent_one_interrupts() -> None:
    sent: list[int] = []
    process = SimpleNamespace(send_signal=sent.append)
    asking = (signal.SIGHUP, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM)
    with launch._forwarded([process]):  # type: ignore[list-item]
        for number in asking:
            os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
    assert sent == [*asking, signal.SIGINT]


def test_jax_processes_get_the_address_of_the_first() -> None:
    commands = launch.process_commands(2, ["train", "x.yaml"], "jax", Path("unused"))
    for index, (command, environment) in enumerate(commands):
        assert command[3:5] == ["train", "x.yaml"]
        options = dict(zip(command[5::2], command[6::2], strict=True))
        assert re.fullmatch(r"127\.0\.0\.1:[0-9]+", options["--coordinator"])
        assert (options["--num-processes"], options["--process-id"]) == ("2", str(index))
        assert environment == {"JAX_LOCAL_DEVICE_IDS": str(index)}
    assert commands[0][0][5:7] == commands[1][0][5:7]


def test_failure_names_the_process_and_its_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = ["import time; time.sleep(60)", "import sys; sys.exit(3)"]
    commands = [([sys.executable, "-c", program], {}) for program in programs]
    monkeypatch.setattr(launch, "process_commands", lambda *_: commands)
    with pytest.raises(TrainingError, match=r"process 1 of 2 exited with status 3\. All processes were stopped;"):
        launch.launch(2, [], "mlx")
