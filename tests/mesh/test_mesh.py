"""On 8 simulated devices: as on one, in losses, every gradient and three steps; and what travels between them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends_available import require_backend
from tests.contracts.source_tree import PACKAGE
from tests.tolerances import FLOAT32, FLOAT32_GRADIENT, FLOAT32_TRAINING

SCRIPT = Path(__file__).with_name("on_devices.py")
MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"expert": 8},
    {"data": 4, "tensor": 2},
    {"data": 4, "expert": 2},
    {"data": 2, "expert": 4},
    {"fsdp": 2, "expert": 4},
    {"fsdp": 4, "tensor": 2},
    {"expert": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"data": 2, "expert": 4, "exchange": "allgather"},
    {"expert": 4, "tensor": 2, "exchange": "allgather"},
    {"data": 8, "rules": {"expert": "data"}},
    {"fsdp": 2, "expert": 4, "rematerialize": "block"},
]
MIXED = [MESHES[10], MESHES[11]]


def on_devices(*words: str) -> dict:
    require_backend("jax")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    root = PACKAGE.parent
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def check(found: dict) -> None:
    for mesh, apart in found.items():
        assert apart["losses"] <= FLOAT32.relative, (mesh, apart)
        assert apart["gradients"] <= FLOAT32_GRADIENT.relative, (mesh, apart)
        assert apart["scores"] <= FLOAT32_TRAINING.relative, (mesh, apart)
        assert apart["steps"] <= FLOAT32_TRAINING.relative, (mesh, apart)
        assert apart["parameters"] <= 5 * FLOAT32_TRAINING.relative, (mesh, apart)
        assert apart["state"] <= FLOAT32_TRAINING.relative, (mesh, apart)
        assert apart["loads"], mesh


def test_every_mesh_is_as_one_device():
    found = on_devices("equal", "configs/tiny/top_k.yaml", *map(json.dumps, MESHES))
    assert len(found) == len(MESHES)
    check(found)


@pytest.mark.parametrize(
    "name",
    [
        "shared_gated",  # shared experts with a gate
        "capacity",  # who is dropped is decided over the whole batch
        "expert_choice",  # experts choose from the whole batch
        "zero_computation_dropless",
        "gating_residual",
        "latent_experts",
        "softmax_with_bias",  # the bias moves by the whole batch's load
        "global_balance",
        "importance_load",
        "weight_on_input",
        "clamped_swiglu",  # biases of experts
        "latent_attention",
        "gated_delta",
        "dropout",
        "noisy_top_k",
    ],
)
def test_every_part_is_as_on_one_device(name):
    check(on_devices("equal", f"configs/tiny/{name}.yaml", *map(json.dumps, MIXED)))


def test_tokens_travel_to_experts_and_experts_stay():
    found = on_devices("collectives", "configs/tiny/top_k.yaml", '{"data": 2, "expert": 4}')
    kinds = {name.split()[0] for name in found}
    assert kinds == {"all-to-all", "all-reduce"}  # nothing is gathered, neither an expert's matrix nor a probability
    rows = {name: count for name, count in found.items() if name.startswith("all-to-all f32")}
    assert rows, found


def test_fsdp_puts_each_parameter_together_twice():
    """On the way forward and again on the way back; it is not kept."""
    found = on_devices("collectives", "configs/tiny/top_k.yaml", '{"fsdp": 8}')
    assert "all-to-all" not in {name.split()[0] for name in found}
    gathered = {
        name: count
        for name, count in found.items()
        if name.startswith("all-gather") and "[64," not in name and ",64]" not in name  # embedding and head: once
    }
    assert gathered, found
    assert all(count % 2 == 0 for count in gathered.values()), gathered
