"""MLX data parallelism: a batch sharded over two processes has the losses, gradients and noise of the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moezoo.core.config.run_config import load_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.distributed.launch import process_commands
from moezoo.core.distributed.processes import Processes
from moezoo.core.errors import BackendError, SpecError
from moezoo.core.parameters.initialize import initial_weights
from tests.layers.data_parallel_part import V, numbers
from tests.support.backends_available import require_backend
from tests.support.tolerances import FLOAT32, FLOAT32_GRADIENT, assert_close

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "configs" / "tiny"
# Every auxiliary loss, all random sampling, and graphs that differ between the two shards of a batch.
CONFIGS = (
    "expert_balance",
    "device_balance",
    "sequence_balance",
    "global_balance",
    "importance_load",
    "heterogeneous",
    "pooled_balance",
    "sparse_attention",
    "dropout",
    "jitter_logits",
    "jitter_mixture",
    "sparsemixer",
    "top_p",
    "zero_computation_dropless",
    "capacity_groups",
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run two processes; return the folder with one result file per config and process."""
    require_backend("mlx")
    folder = tmp_path_factory.mktemp("parts")
    program = [sys.executable, "-m", "tests.layers.data_parallel_part", str(folder)]
    configs = [str(TINY / f"{name}.yaml") for name in CONFIGS]
    running = [
        subprocess.Popen(
            [*program, *configs], env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for _, environment in process_commands(2, [], "mlx", folder / "hosts.json")
    ]
    outputs = [process.communicate(timeout=120)[0].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_two_shards_of_a_batch_equal_the_whole_batch(name: str, parts: Path) -> None:
    whole = numbers(TINY / f"{name}.yaml")
    first, second = (np.load(parts / f"{name}_{rank}.npz") for rank in (0, 1))
    assert set(first.files) == set(second.files) == set(whole)
    assert np.any(whole["dropped"] > 0) == (name == "capacity_groups")
    for key, value in whole.items():
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)
        assert_close(first[key], value, FLOAT32_GRADIENT if key.startswith("gradient") else FLOAT32, key)


def test_collectives_keep_their_order_when_graphs_differ_between_processes(parts: Path) -> None:
    assert [int(np.load(parts / f"order_{rank}.npz")["mismatched"]) for rank in (0, 1)] == [0, 0]


@pytest.fixture
def second_process(monkeypatch: pytest.MonkeyPatch):
    """Simulate the second of two processes."""
    require_backend("mlx")
    from moezoo.mlx_backend.distributed import data_parallel

    monkeypatch.setattr(data_parallel, "processes", lambda: Processes(1, 2))
    return data_parallel


def test_a_process_samples_its_shard_of_the_random_numbers_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    mx = require_backend("mlx")
    from moezoo.mlx_backend.distributed import data_parallel
    from moezoo.mlx_backend.random import uniform

    key, several = mx.array([3, 4], mx.uint32), mx.array([[3, 5], [4, 6]], mx.uint32)
    whole, of_sequences = np.array(uniform(key, (6, 5))), np.array(uniform(several, (3,)))
    monkeypatch.setattr(data_parallel, "processes", lambda: Processes(1, 2))
    np.testing.assert_array_equal(np.array(uniform(key, (3, 5))), whole[3:])
    np.testing.assert_array_equal(np.array(uniform(several, (3,))), of_sequences)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("capacity", "moe.dispatch.group"),
        ("zero_computation", "moe.dispatch.group"),
        ("expert_choice", "moe.router.choice"),
    ],
)
def test_routing_across_all_tokens_of_a_batch_is_rejected(name: str, field: str, second_process) -> None:
    from moezoo.backends import load_backend

    config = with_vocab_size(load_config(TINY / f"{name}.yaml", ["model.vocab_size=null"]), V)
    model = load_backend("mlx").build(config.model, initial_weights(config.model, 0))
    with pytest.raises(SpecError, match=rf"layers\[\]\.{field} is .*2 processes share a batch.*or one process"):
        model.start_training(config.optimizer)


def test_capacity_per_sequence_is_accepted(second_process) -> None:
    config = with_vocab_size(load_config(TINY / "capacity_groups.yaml", ["model.vocab_size=null"]), V)
    second_process.check_shared(config.model)


def test_a_mesh_with_another_number_of_processes_is_rejected(second_process) -> None:
    second_process.check_mesh({"data": 2, "expert": 1, "fsdp": "auto"})
    second_process.check_mesh({"data": "auto"})
    for sizes, field in (({"data": 4}, "mesh.data is 4"), ({"data": 2, "expert": 2}, "mesh.expert is 2")):
        with pytest.raises(SpecError, match=f"{field}, which MLX does not support with 2 processes"):
            second_process.check_mesh(sizes)


def test_launcher_variables_without_peers_are_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_backend("mlx")
    from moezoo.mlx_backend.distributed.data_parallel import _join

    hosts = tmp_path / "hosts.json"
    monkeypatch.setenv("MLX_RANK", "1")
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    with pytest.raises(BackendError, match=r"cannot reach the other processes; got MLX_RANK=1"):
        _join(5)
    hosts.write_text("\n", encoding="utf-8")  # as `mlx.launch -n 1` writes it
    assert _join(5) == Processes()
