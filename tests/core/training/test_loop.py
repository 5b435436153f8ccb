"""The training loop: both backends, resuming, signals, and losses that are not finite."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import moezoo
from moezoo.backends import load_backend
from moezoo.core.backend import Backend
from moezoo.core.checkpoint.store import load_checkpoint
from moezoo.core.config.run_config import load_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.data.prepare import prepare_data
from moezoo.core.errors import CheckpointError, RunError, SpecError, TrainingError
from moezoo.core.random import micro_batch_keys
from moezoo.core.runs.run_folder import load_run, prepare_run
from moezoo.core.training.loop import TrainingResult, train
from moezoo.core.training.metrics import read_metrics
from tests.support.backends_available import require_backend
from tests.support.recording_model import RecordingModel
from tests.support.small_run import write_config

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))


NOISE = (
    "model.layers[0].repeat=1",
    "model.dropout=0.2",
    "model.layers[0].moe.router.choice={kind: noisy_top_k}",
    "model.layers[0].moe.router.jitter={of: logits, amount: 0.2}",
)


def run(backend: str, config_path: Path, out: Path, *overrides: str, resume: bool = False) -> TrainingResult:
    require_backend(backend)
    return run_on(load_backend(backend), config_path, out, *overrides, resume=resume)


def run_on(loaded: Backend, config_path: Path, out: Path, *overrides: str, resume: bool = False) -> TrainingResult:
    config = load_config(config_path, overrides)
    data = prepare_data(config.data, config.training.sequence_length)
    config = with_vocab_size(config, data.tokenizer.vocab_size)
    return train(config, data, loaded, prepare_run(out, config, resume=resume))


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line}


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_resumed_run_has_bit_identical_losses_and_weights(backend: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, checkpoint_every=3, keep_checkpoints=5)
    whole = run(backend, config, tmp_path / "whole", *NOISE)
    assert whole.finished
    assert whole.evaluation is not None
    expected = losses(tmp_path / "whole")
    assert len(expected) == 8
    for last in (
        (6,) if backend == "jax" else (3, 6)
    ):  # as if the process was killed after that checkpoint, with later metrics already written
        out = tmp_path / f"from_{last}"
        shutil.copytree(tmp_path / "whole", out)
        for folder in (out / "checkpoints").iterdir():
            if int(folder.name.removeprefix("step_")) > last:
                shutil.rmtree(folder)
        result = run(backend, config, out, *NOISE, resume=True)
        assert result.finished
        assert losses(out) == expected
        one, other = (load_checkpoint(path / "checkpoints" / "step_00000008") for path in (tmp_path / "whole", out))
        for name, value in one.weights.items():
            assert np.array_equal(value, other.weights[name]), name
        for name, value in one.optimizer.items():
            assert np.array_equal(value, other.optimizer[name]), name


def test_keys_of_a_step_depend_on_seed_step_and_micro_batch_alone(tmp_path: Path) -> None:
    path = write_config(tmp_path, batch_size=4, gradient_accumulation=2, steps=6, seed=3)
    models = {}
    for name, overrides in {
        "whole": [],
        "stopped": ["training.steps=4"],
        "other seed": ["training.seed=4"],
        "other model": ["model.embed_dim=12", "training.sequence_length=9"],
    }.items():
        models[name] = RecordingModel()
        run_on(models[name], path, tmp_path / name, *overrides)
    resumed = RecordingModel()
    run_on(resumed, path, tmp_path / "stopped", resume=True)
    whole = models["whole"].keys
    np.testing.assert_array_equal(whole, [micro_batch_keys(3, step, 2) for step in range(6)])
    np.testing.assert_array_equal(models["stopped"].keys + resumed.keys, whole)
    np.testing.assert_array_equal(models["other model"].keys, whole)
    every = {tuple(key) for run in ("whole", "other seed") for keys in models[run].keys for key in keys}
    assert len(every) == 2 * 6 * 2


def test_run_of_one_backend_resumes_on_the_other(tmp_path: Path) -> None:
    config = write_config(tmp_path, checkpoint_every=4)
    run("jax", config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "step_00000008")
    run("mlx", config, tmp_path / "moved", resume=True)
    one, other = losses(tmp_path / "whole"), losses(tmp_path / "moved")
    assert one.keys() == other.keys()
    assert max(abs(one[step] - other[step]) for step in one) < 1e-5


def test_damaged_newest_checkpoint_is_reported_and_skipped(tmp_path: Path) -> None:
    config = write_config(tmp_path, checkpoint_every=4)
    run("mlx", config, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "step_00000008" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    _, _, checkpoint, problems = load_run(tmp_path / "run")
    assert checkpoint.step == 4
    assert len(problems) == 1
    assert "step_00000008" in problems[0]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    with pytest.raises(CheckpointError, match="step_00000008"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("backend", [pytest.param("jax", marks=pytest.mark.release), "mlx"])
def test_nonfinite_loss_stops_and_keeps_the_last_good_checkpoint(backend: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, checkpoint_every=2, log_every=5, steps=20)
    schedule = "optimizer.schedule={kind: inverse_square_root, warmup_steps: 0}"
    with pytest.raises(
        TrainingError, match=r"not finite.*at step \d+; first parameter that is not finite: embedding"
    ) as seen:
        run(
            backend,
            config,
            tmp_path / "run",
            "optimizer.learning_rate=1e30",
            schedule,
            "training.checkpoint_every=null",
        )
    assert "Nothing was saved yet" in str(seen.value)
    run(backend, config, tmp_path / "good", "training.steps=4")
    with pytest.raises(TrainingError):
        run(backend, config, tmp_path / "bad", "optimizer.learning_rate=1e30", schedule)
    _, _, checkpoint, _ = load_run(tmp_path / "good")
    assert checkpoint.step == 4
    bad = tmp_path / "bad" / "checkpoints"
    assert not bad.exists() or not any(bad.iterdir())


def test_metrics_have_every_loss_term_and_routing(tmp_path: Path) -> None:
    config = write_config(tmp_path, validate_every=4)
    result = run("mlx", config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    line = lines[0]
    assert line["loss"] == pytest.approx(
        line["cross_entropy"] + line["switch_balance_weighted"] + line["router_z_weighted"], abs=1e-6
    )
    assert line["switch_balance_weighted"] == pytest.approx(2 * 0.01 * line["switch_balance"], rel=1e-5)
    assert {
        "tokens",
        "learning_rate",
        "tokens_per_second",
        "gradient_norm",
        "switch_balance",
        "router_z",
    } <= line.keys()
    assert [row["layer"] for row in line["routing"]] == [0, 1]
    assert all(abs(sum(row["load"]) - 1) < 1e-5 and row["dropped"] == 0 for row in line["routing"])
    for name in ("switch_balance", "router_z"):
        one, two = (row["losses"][name] for row in line["routing"])
        assert one != two
        assert (one + two) / 2 == pytest.approx(line[name], rel=1e-5)
    validations = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validations] == [4, 8]
    assert result.evaluation is not None
    assert validations[-1]["validation_loss"] == result.evaluation.validation_loss


def test_existing_run_needs_resume_and_resume_needs_the_same_config(tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=2)
    run("mlx", config, tmp_path / "run")
    with pytest.raises(RunError, match=r"already contains a run. Add --resume"):
        run("mlx", config, tmp_path / "run")
    with pytest.raises(SpecError, match=r"optimizer.learning_rate is 0.5, but the run was started with 0.003"):
        run("mlx", config, tmp_path / "run", "optimizer.learning_rate=0.5", resume=True)
    with pytest.raises(RunError, match="no run to resume"):
        run("mlx", config, tmp_path / "other", resume=True)
    assert run("mlx", config, tmp_path / "run", "training.steps=3", resume=True).step == 3


def test_run_that_cannot_start_leaves_no_folder(tmp_path: Path) -> None:
    config, out = write_config(tmp_path, steps=2), tmp_path / "run"
    with pytest.raises(TrainingError, match="layers is 'scanned', which is not supported on MLX"):
        run("mlx", config, out, "training.layers=scanned")
    assert not out.exists()
    run("mlx", config, out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(TrainingError, match="layers is 'scanned', which is not supported on MLX"):
        run("mlx", config, out, "training.layers=scanned", resume=True)
    assert {**before, out / "config.yaml": (out / "config.yaml").read_bytes()} == {
        file: file.read_bytes() for file in out.rglob("*") if file.is_file()
    }


def test_run_with_scanned_and_recomputed_layers_resumes_without(tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=2)
    run("jax", config, tmp_path / "run", "training.layers=scanned", "training.rematerialize=experts")
    assert run("mlx", config, tmp_path / "run", "training.steps=3", resume=True).step == 3


@pytest.mark.release
def test_run_with_scanned_layers_resumes_with_unrolled_ones(tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=2)
    run("jax", config, tmp_path / "run", "training.layers=scanned")
    assert run("jax", config, tmp_path / "run", "training.steps=3", resume=True).step == 3


def test_saved_model_cannot_be_resumed_and_steps_cannot_decrease(tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=2)
    run("mlx", config, tmp_path / "run")
    with pytest.raises(RunError, match=r"training.steps is 1, but the run has done 2"):
        run("mlx", config, tmp_path / "run", "training.steps=1", resume=True)
    moezoo.load(tmp_path / "run", backend="mlx").save(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"(?s)optimizer state.*first_moment.embedding.weight"):
        run("mlx", config, tmp_path / "saved", "training.steps=3", resume=True)


def test_a_run_resumes_with_its_own_optimizer_only(tmp_path: Path) -> None:
    lion = "optimizer={kind: lion, learning_rate: 1.0e-3}"
    config = write_config(tmp_path, steps=2)
    run("mlx", config, tmp_path / "run", lion)
    with pytest.raises(SpecError, match=r"^optimizer.kind is 'adamw', but the run was started with 'lion'"):
        run("mlx", config, tmp_path / "run", "training.steps=3", resume=True)
    assert run("mlx", config, tmp_path / "run", lion, "training.steps=3", resume=True).step == 3


@pytest.mark.parametrize("backend", [pytest.param("jax", marks=pytest.mark.release), "mlx"])
def test_capacity_is_reported_in_metrics_and_routing(backend: str, tmp_path: Path) -> None:
    require_backend(backend)
    config = write_config(tmp_path, steps=1)
    dispatch = "model.layers[0].moe.dispatch={kind: capacity, factor: 0.5}"
    run(backend, config, tmp_path / "run", dispatch)
    routing = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["routing"]
    assignments = 3 * 24 * 2
    for row in routing:
        counts = np.round(np.array(row["load"]) * assignments)
        capacity = math.ceil(0.5 * assignments / 5)
        assert row["dropped"] == pytest.approx(np.maximum(counts - capacity, 0).sum() / assignments, abs=1e-6)
        assert row["dropped"] > 0
    model = moezoo.load(tmp_path / "run", backend=backend)
    tokens = np.arange(2 * 24).reshape(2, 24) % model.config.model.vocab
    for layer in model.forward(tokens).routing:
        for expert in range(5):
            kept = ((layer.expert == expert) & (layer.weight > 0)).sum()
            assert kept <= math.ceil(0.5 * tokens.size * 2 / 5)
        assert (layer.weight == 0).any()


def test_gradient_accumulation_counts_load_once(tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=2, batch_size=4)
    run("mlx", config, tmp_path / "one")
    run("mlx", config, tmp_path / "two", "training.gradient_accumulation=2")
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("one", "two"))
    counted = [{**row, "losses": None} for row in one["routing"]]  # balance losses of half batches differ
    assert counted == [{**row, "losses": None} for row in two["routing"]]
    assert one["cross_entropy"] == pytest.approx(two["cross_entropy"], rel=1e-6)


def started(config: Path, out: Path) -> "subprocess.Popen[str]":
    """Start a run in its own process and wait for its first step."""
    require_backend("mlx")
    command = [sys.executable, "-m", "moezoo", "train", str(config), "--backend", "mlx", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    deadline = time.monotonic() + 60
    while not losses(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    return process


def assert_saved(out: Path) -> None:
    _, _, checkpoint, problems = load_run(out)
    assert checkpoint.step == max(losses(out))
    assert not problems


def test_signal_saves_and_prints_the_command_to_resume(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = started(write_config(tmp_path, steps=100000), out)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert "stopped and saved after step" in printed
    assert "--resume" in printed
    assert "Traceback" not in printed
    assert_saved(out)


def test_run_whose_output_breaks_goes_on_and_saves_at_a_hangup(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = started(write_config(tmp_path, steps=100000), out)
    assert process.stdout is not None
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert_saved(out)
