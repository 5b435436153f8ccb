"""Runs of two and four JAX processes on this machine: they match the losses of one, and handle failures."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from moezoo.cli.main import main
from moezoo.core.checkpoint.store import list_checkpoints, load_checkpoint
from moezoo.core.training.metrics import read_metrics
from tests.support.backends_available import require_backend
from tests.support.launched import TIMEOUT_S, assert_ends_with_the_first, await_steps, begun, lines, run, start, train
from tests.support.small_run import MODEL, write_config
from tests.support.source_tree import PACKAGE

FROM_ONE = 1e-5
"""Tolerance of losses against one process over 20 steps: reordered float32 sums, amplified by updates."""
MESH = ("--mesh", "data=auto")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Config with losses over the whole batch, micro-batches and dropout; 20 steps."""
    require_backend("jax")
    folder = tmp_path_factory.mktemp("processes")
    path = write_config(folder, steps=20, batch_size=8, gradient_accumulation=2, seed=5)
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    layer = MODEL["layers"][0]
    moe = {
        **layer["moe"],
        "num_experts": 8,
        "router": {"top_k": 2, "score": "sigmoid", "selection_bias": {"rate": 0.01}},
        "losses": [{"kind": kind, "coefficient": 0.01} for kind in ("switch_balance", "router_z", "global_balance")],
    }
    raw["model"] = {**MODEL, "dropout": 0.1, "layers": [{**layer, "repeat": 1, "moe": moe}]}
    raw["optimizer"]["schedule"] = {"kind": "constant"}
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEZOO_CACHE", str(folder / "cache"))
        yield path


@pytest.fixture(scope="module")
def one(config: Path) -> Path:
    out = config.with_name("one")
    train("jax", config, out, count=1)
    return out


@pytest.fixture(scope="module")
def two(config: Path) -> tuple[Path, str]:
    """Run folder and output of 20 steps of two processes."""
    out = config.with_name("two")
    return out, train("jax", config, out, *MESH)


def assert_same_losses(run: Path, other: Path) -> None:
    assert [line["step"] for line in lines(run)] == [line["step"] for line in lines(other)] == list(range(1, 21))
    for a, b in zip(lines(run), lines(other), strict=True):
        assert abs(a["loss"] - b["loss"]) <= FROM_ONE, a["step"]
        for key in ("cross_entropy", "switch_balance", "global_balance", "router_z", "gradient_norm"):
            assert b[key] == pytest.approx(a[key], rel=10 * FROM_ONE, abs=FROM_ONE), (a["step"], key)
        for mine, its in zip(a["routing"], b["routing"], strict=True):
            assert its["load"] == pytest.approx(mine["load"], abs=1e-6)
            assert its["selection_bias"] == pytest.approx(mine["selection_bias"], abs=1e-6)
    (validated,), (also,) = (
        [line for line in read_metrics(out / "metrics.jsonl") if "validation_loss" in line] for out in (run, other)
    )
    assert also["validation_loss"] == pytest.approx(validated["validation_loss"], abs=FROM_ONE)


def test_two_processes_match_the_losses_of_one(one: Path, two: tuple[Path, str]) -> None:
    assert_same_losses(one, two[0])


@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        pytest.param(4, 1, {"data": 2, "expert": 2}, id="four", marks=pytest.mark.release),
        pytest.param(2, 2, {"fsdp": 2, "expert": "auto"}, id="two_devices_each", marks=pytest.mark.release),
        pytest.param(2, 1, {"tensor": 2}, id="same_sequences", marks=pytest.mark.release),
    ],
)
def test_sharded_processes_match_the_losses_of_one(
    config: Path, one: Path, count: int, devices: int, mesh: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    monkeypatch.setenv("XLA_FLAGS", flags)
    out = config.with_name("_".join([str(count), *mesh]))
    train("jax", config, out, "--mesh", ",".join(f"{axis}={size}" for axis, size in mesh.items()), count=count)
    assert_same_losses(one, out)


def test_only_the_first_process_prints_and_writes(two: tuple[Path, str]) -> None:
    out, said = two
    assert said.count("processes      2, each with 1 device") == 1
    assert said.count("run folder: ") == 1
    assert [line for line in said.splitlines() if line.startswith("[1]") and "Gloo" not in line] == []
    assert len(list_checkpoints(out / "checkpoints")) == 1


# Of one file each, and of the shards; (MLX) on several processes, and on another mesh.
GO_ON = {
    "jax_1": ("jax", "whole", ("--mesh", "data=1"), 1),
    "mlx_1": ("mlx", "shards", (), 1),
    "mlx_2": ("mlx", "whole", (), 2),
    "jax_4": ("jax", "shards", ("--mesh", "data=2,expert=2"), 4),
}


@pytest.mark.parametrize(
    "names", [["jax_1", "mlx_1"], pytest.param(list(GO_ON), marks=pytest.mark.release)], ids=["gate", "all"]
)
def test_run_of_two_processes_resumes_on_one_device_on_mlx_and_consolidated(
    config: Path, two: tuple[Path, str], names: list[str], tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    result = CliRunner().invoke(main, ["convert", str(two[0]), str(whole), "--whole"])
    assert result.exit_code == 0, result.output
    (folder,) = (info.path for info in list_checkpoints(whole / "checkpoints"))
    assert {file.name for file in folder.iterdir()} >= {"weights.safetensors", "optimizer.safetensors"}
    (sharded,) = (info.path for info in list_checkpoints(two[0] / "checkpoints"))
    (one, other) = (load_checkpoint(path) for path in (sharded, folder))
    for mine, its in ((one.weights, other.weights), (one.optimizer, other.optimizer)):
        assert sorted(mine) == sorted(its)
        for name in mine:
            np.testing.assert_array_equal(mine[name], its[name])
    more = ("--resume", "--set", "training.steps=24")
    after = {}
    for name in names:
        backend, source, mesh, count = GO_ON[name]
        out = tmp_path / name
        shutil.copytree({"whole": whole, "shards": two[0]}[source], out)
        train(backend, config, out, *mesh, *more, count=count)
        after[name] = [line["loss"] for line in lines(out) if line["step"] > 20]
        assert len(after[name]) == 4
    expected = after["jax_1"]
    for name, losses in after.items():
        np.testing.assert_allclose(losses, expected, rtol=FROM_ONE, err_msg=name)


@pytest.mark.release  # the gate shows it with MLX: tests/core/distributed/test_launch.py
def test_a_killed_process_ends_the_group_and_a_restart_continues_bit_identically(
    config: Path, two: tuple[Path, str]
) -> None:
    out = config.with_name("killed")
    often = ("--set", "training.checkpoint_every=40", "--set", "training.keep_checkpoints=1")
    running, (_, second) = begun("jax", config, out, *MESH, *often, steps=70)
    os.kill(second, signal.SIGKILL)
    killed = time.monotonic()
    said, _ = running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == 1
    assert time.monotonic() - killed < 15
    assert "TrainingError: process 1 of 2 was killed by SIGKILL" in said
    assert subprocess.run(["pgrep", "-f", str(out)], check=False).returncode == 1
    before = lines(out)
    assert [line["loss"] for line in before[:20]] == [line["loss"] for line in lines(two[0])]
    saved = [info.step for info in list_checkpoints(out / "checkpoints")][-1]
    assert saved % 40 == 0
    assert saved < len(before)
    said = train("jax", config, out, *MESH, "--resume", "--set", f"training.steps={len(before)}")
    assert f"resumed after step {saved}" in said
    same = ("step", "loss", "gradient_norm", "routing")
    assert [[line[key] for key in same] for line in lines(out)] == [[line[key] for key in same] for line in before]


@pytest.mark.release  # the gate shows it with MLX: tests/core/distributed/test_launch.py
def test_a_signal_to_one_process_stops_all_after_the_same_step_and_saves_once(config: Path) -> None:
    out = config.with_name("stopped")
    running, (_, second) = begun("jax", config, out, *MESH)
    os.kill(second, signal.SIGTERM)
    said, _ = running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == 0, said
    assert said.count("stopped and saved after step") == 1
    (saved,) = list_checkpoints(out / "checkpoints")
    assert f"after step {saved.step} of" in said
    assert lines(out)[-1]["step"] == saved.step


@pytest.mark.release  # the gate shows it with MLX: tests/core/distributed/test_launch.py
def test_an_error_of_the_first_process_ends_the_group(config: Path, two: tuple[Path, str]) -> None:
    assert_ends_with_the_first("jax", config, two[0], *MESH)


@pytest.mark.release
def test_processes_without_a_mesh_are_an_error(config: Path) -> None:
    running = start("train", config, "--backend", "jax", "--out", config.with_name("no_mesh"))
    said, _ = running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == 1
    assert "SpecError: mesh is one device, but there are 2 processes with 2 devices. Use a mesh of all" in said


# --- without a launcher, as on several machines ----------------------------------------------------------------------


def by_hand(config: Path, out: Path, index: int, port: int, *words: object) -> subprocess.Popen[str]:
    group = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id", index)
    return run("train", config, "--backend", "jax", "--out", out, *MESH, *group, *words)


@pytest.mark.release
def test_stopped_process_ends_the_other_within_the_heartbeat(config: Path, free_port: int) -> None:
    out = config.with_name("still")
    words = ("--heartbeat-timeout", 3, "--set", "training.steps=100000")
    first, second = (by_hand(config, out, index, free_port, *words) for index in (0, 1))
    await_steps(first, out)
    second.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    said, _ = first.communicate(timeout=TIMEOUT_S)
    second.kill()
    second.communicate()
    assert first.returncode != 0
    assert time.monotonic() - stopped < 20
    assert "another task died" in said


FAILS = """
import sys, threading
from moezoo.core.distributed.process_group import ProcessGroup
from moezoo.jax_backend.runtime import processes
processes.join(ProcessGroup("127.0.0.1:" + sys.argv[2], 2, int(sys.argv[1])))
processes.gather(0).fetch()
if sys.argv[1] == "1":
    threading.Thread(target=threading.Event().wait).start()  # it would keep the interpreter
    raise ValueError("a mistake")
print(processes.gather(0).fetch())
"""


def test_exception_ends_its_process_at_once_and_the_others_with_one_line(free_port: int) -> None:
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", FAILS, index, str(free_port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(PACKAGE.parent)},
        )
        for index in ("0", "1")
    )
    said, also = (process.communicate(timeout=30)[0] for process in (second, first))
    assert (first.returncode, second.returncode) == (1, 1)
    assert said.splitlines()[-1] == "ValueError: a mistake"
    assert also.splitlines()[-1].startswith("moezoo.core.errors.TrainingError: another process of the run has ended")


@pytest.mark.release
def test_slurm_variables_give_coordinator_and_index(config: Path, two: tuple[Path, str]) -> None:
    out = config.with_name("slurm")
    told = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    command = [sys.executable, "-m", "moezoo", "train", str(config), "--backend", "jax", "--out", str(out), *MESH]
    running = [
        subprocess.Popen(
            [*command, "--coordinator", "auto"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **told, "SLURM_PROCID": index, "SLURM_LOCALID": index, "JAX_PLATFORMS": "cpu"},
        )
        for index in ("0", "1")
    ]
    said = [process.communicate(timeout=TIMEOUT_S)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert [line["loss"] for line in lines(out)] == [line["loss"] for line in lines(two[0])]


def test_unreachable_coordinator_is_an_error(config: Path, free_port: int) -> None:
    lonely = by_hand(config, config.with_name("lonely"), 1, free_port, "--startup-timeout", 1)
    said, _ = lonely.communicate(timeout=TIMEOUT_S)
    assert lonely.returncode == 1
    (line,) = said.splitlines()
    assert line.startswith("BackendError: cannot reach the first process within 1 s: connection refused; got --coord")


def test_occupied_coordinator_port_is_an_error(config: Path, taken_port: int) -> None:
    first = by_hand(config, config.with_name("taken"), 0, taken_port)
    said, _ = first.communicate(timeout=TIMEOUT_S)
    assert first.returncode == 1
    (line,) = said.splitlines()
    assert line.startswith("BackendError: cannot listen there: address already in use")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--coordinator", "here"), "--coordinator is 'here'; expected HOST:PORT of the first process with a port"),
        (
            ("--coordinator", "a:1", "--process-id", "0"),
            "needs --num-processes and --process-id; got --coordinator a:1",
        ),
        (("--coordinator", "auto", "--num-processes", "2"), "--coordinator auto detects the number of processes"),
        (("--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"), "--process-id is 2 of --num-process"),
        (
            ("--process-id", "1"),
            "--num-processes and --process-id need --coordinator; got none. Add --coordinator HOST:PORT",
        ),
        (("--coordinator", "auto", "--backend", "mlx"), "process group options are for backend jax only"),
    ],
)
def test_inconsistent_process_options_are_errors(config: Path, words: tuple[str, ...], problem: str) -> None:
    result = CliRunner().invoke(main, ["train", str(config), "--out", str(config.with_name("bad")), *words])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("BackendError: ")
    assert problem in line
