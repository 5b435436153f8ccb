"""What cannot fit into memory is refused before anything is allocated; what may not fit is a warning."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

import moezoo
from moezoo.cli.main import main
from moezoo.core.config.run_config import load_config
from moezoo.core.cost import fits
from moezoo.core.cost.available import Available
from moezoo.core.cost.fits import check_generation, check_scoring, check_training, check_weights
from moezoo.core.cost.memory import cache_bytes, training_memory
from moezoo.core.data.tokenizers import TokenIds
from moezoo.core.distributed.mesh import MESH_AXES, ONE_DEVICE, Devices
from moezoo.core.errors import OutOfMemoryError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.runs.save import save_run
from tests.support.backends_available import require_backend
from tests.support.small_run import write_config

TINY = ("model.vocab_size=64", "training.batch_size=8", "training.sequence_length=16")


def config_of(*overrides: str, name: str = "top_k"):
    return load_config(f"configs/tiny/{name}.yaml", [*TINY, *overrides])


@pytest.fixture
def free(monkeypatch):
    """A function that sets the number of bytes that are free."""

    def set_free(size: int) -> None:
        monkeypatch.setattr(fits, "available_memory", lambda: Available(size, "free memory of this machine"))

    set_free(0)
    return set_free


def least(check) -> int:
    """The largest amount of free memory with which a check refuses, plus one."""
    low, high = 0, 2**50
    while low < high:
        middle = (low + high) // 2
        try:
            check(Devices(ONE_DEVICE.lengths, 1, middle))
            high = middle
        except OutOfMemoryError:
            low = middle + 1
    return low


def saved_bytes(tokens: int) -> int:
    """Activations without attention probabilities, and logits; D = 32, V = 64, E = 7, K = 2, F = 24, Q = 48."""
    layer = 4 * (4 * 32 + 3 * 48) + 8 * 7 + 4 * 2 * (4 * 24 + 2 * 32)
    return tokens * (2 * layer + 2 * 4 * 32 + 8 * 64)


def test_least_is_weights_moments_and_half_of_the_activations():
    config = config_of("training.batch_size=64")
    memory, tokens = training_memory(config), 64 * 16
    expected = memory.parameters + memory.moments + saved_bytes(tokens) // 2 + 4 * 64 * 17
    assert least(lambda devices: check_training(config, devices)) == expected


def test_least_is_weights_moments_and_clipped_gradients_for_a_small_batch():
    config = config_of("training.batch_size=1")
    memory = training_memory(config)
    state = memory.parameters + memory.moments
    assert least(lambda devices: check_training(config, devices)) == state + memory.gradients + 4 * 17
    unclipped = config_of("training.batch_size=1", "optimizer.clip_norm=null")
    assert least(lambda devices: check_training(unclipped, devices)) == state + saved_bytes(16) // 2 + 4 * 17


@pytest.mark.parametrize("name", ["capacity", "top_p", "zero_computation"])
def test_rows_that_the_routing_decides_are_not_certain(name):
    """However wide the experts are, all of their rows may be dropped or go elsewhere."""
    sizes = []
    for width in (24, 240):
        config = config_of(f"model.layers[0].moe.experts.hidden_dim={width}", "training.batch_size=512", name=name)
        memory = training_memory(config)
        state = memory.parameters + memory.moments
        sizes.append(least(lambda devices, config=config: check_training(config, devices)) - state)
    assert sizes[0] == sizes[1]


def test_training_between_least_and_estimate_is_a_warning(free):
    config = config_of("training.batch_size=64")
    estimate = training_memory(config).total + 4 * 64 * 17
    free(estimate)
    assert check_training(config, ONE_DEVICE) == []
    free(estimate - 1)
    (warning,) = check_training(config, ONE_DEVICE)
    assert warning.startswith("training needs about ")
    assert "If it runs out of memory: use a smaller training.batch_size (64)" in warning


def test_simulated_devices_share_the_memory_of_the_host(free):
    """Each of four devices has a quarter of the batch, but all weights and moments."""
    config, lengths = config_of(), dict.fromkeys(MESH_AXES, 1) | {"data": 4}
    free(training_memory(config).total + 4 * 8 * 17)
    assert check_training(config, ONE_DEVICE) == []
    assert check_training(config, Devices(lengths, local=1, free_bytes=None)) == []
    with pytest.raises(OutOfMemoryError):
        check_training(config, Devices(lengths, local=4, free_bytes=None))


def test_overcommit_is_a_warning(free):
    with pytest.raises(OutOfMemoryError) as seen:
        check_training(config_of(), ONE_DEVICE)
    assert "got 0.0 MiB (free memory of this machine)" in str(seen.value)
    (warning,) = check_training(config_of(), ONE_DEVICE, allow_overcommit=True)
    assert warning.startswith("training needs at least ")


def test_advice_for_a_model_that_is_too_large(free):
    with pytest.raises(OutOfMemoryError, match=r"Use a smaller model, or shard it over more devices \(mesh\)"):
        check_training(config_of("model.layers[0].moe.num_experts=1000"), ONE_DEVICE)


def test_weights_are_shared_by_the_devices_that_have_memory_of_their_own():
    lengths = dict.fromkeys(MESH_AXES, 1) | {"fsdp": 4}
    assert check_weights(4000, Devices(lengths, 4, 1000), "runs/a") == []
    with pytest.raises(OutOfMemoryError, match=r"^runs/a needs at least .* \(free memory of the device\)"):
        check_weights(4004, Devices(lengths, 4, 1000), "runs/a")


def test_caches_of_new_tokens_are_certain_only_without_an_end_token(free):
    spec = config_of().model
    logits = 2 * 4 * 64
    free(2 * cache_bytes(spec, 10) + logits)
    assert check_generation(spec, 2, 10, 0, ONE_DEVICE, may_end=True) == []
    (warning,) = check_generation(spec, 2, 10, 10**9, ONE_DEVICE, may_end=True)
    assert "(caches of 2 x 1000000010 tokens)" in warning
    with pytest.raises(OutOfMemoryError, match="Use fewer new tokens"):
        check_generation(spec, 2, 10, 10**9, ONE_DEVICE, may_end=False)


def test_logits_of_an_evaluation_are_certain_in_the_compute_dtype(free):
    float32, bfloat16 = config_of().model, config_of(name="bfloat16").model
    free(4 * 6 * 16 * 64)
    assert check_scoring(float32, 6, 16, ONE_DEVICE) == check_scoring(bfloat16, 6, 16, ONE_DEVICE) == []
    with pytest.raises(OutOfMemoryError, match="logits of 7 x 16 tokens"):
        check_scoring(float32, 7, 16, ONE_DEVICE)
    assert check_scoring(bfloat16, 12, 16, ONE_DEVICE) != []
    with pytest.raises(OutOfMemoryError, match="logits of 13 x 16 tokens"):
        check_scoring(bfloat16, 13, 16, ONE_DEVICE)


@pytest.mark.parametrize("backend", [pytest.param("jax", marks=pytest.mark.release), "mlx"])
def test_training_is_refused_before_there_is_a_folder(backend, tmp_path, free, monkeypatch):
    require_backend(backend)
    monkeypatch.setenv("MOEZOO_CACHE", str(tmp_path / "cache"))
    command = ["train", str(write_config(tmp_path, steps=1)), "--backend", backend, "--out", str(tmp_path / "run")]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("OutOfMemoryError: training needs at least ")
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    if backend == "mlx":  # without a compiler, it trains in a second
        tried = CliRunner().invoke(main, [*command, "--allow-overcommit"])
        assert tried.exit_code == 0, tried.output
        assert tried.stderr.startswith("training needs at least ")


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_models_and_generations_are_refused_before_they_are_made(backend, tmp_path, free):
    require_backend(backend)
    config, run = config_of(), tmp_path / "run"
    save_run(run, config, TokenIds(64), initial_weights(config.model, 0), 0, None)
    with pytest.raises(OutOfMemoryError, match=f"^{run} needs at least "):
        moezoo.load(run, backend)
    for command in (("generate", "--tokens", "1,2"), ("eval", "--data", "none.npy")):
        refused = CliRunner().invoke(main, [command[0], str(run), *command[1:], "--backend", backend])
        assert refused.stderr.startswith(f"OutOfMemoryError: {run} needs at least ")
    loaded = moezoo.load(run, backend, allow_overcommit=True)
    assert loaded.problems[0].startswith(f"{run} needs at least ")
    free(10**6)
    with pytest.raises(OutOfMemoryError, match="Use fewer new tokens"):
        moezoo.load(run, backend).generate([[1, 2]], max_new_tokens=10**9)
    many = ["generate", str(run), "--tokens", "1,2", "--backend", backend, "--samples", "1000000000"]
    refused = CliRunner().invoke(main, many)
    assert refused.stderr.startswith("OutOfMemoryError: generation needs at least ")
    assert "(caches of 1000000000 x 258 tokens)" in refused.stderr


PEAK = """
import json, sys
from moezoo.backends import load_backend
from moezoo.bench.worker import peak_memory
from moezoo.core.config.run_config import load_config
from moezoo.core.parameters.initialize import initial_weights
import numpy as np

config = load_config(sys.argv[2], sys.argv[3:])
backend = load_backend(sys.argv[1])
before = peak_memory()
model = backend.build(config.model, initial_weights(config.model, 0))
model.start_training(config.optimizer)
shape = 1, config.training.batch_size, config.training.sequence_length + 1
model.train_step(np.random.default_rng(0).integers(0, 64, shape, np.int32), 1e-3).fetch()
model.wait()
print(peak_memory() - before)
"""


@pytest.mark.release  # starts a process for each
@pytest.mark.parametrize("backend", ["jax", "mlx"])
@pytest.mark.parametrize("name", ["top_k", "capacity", "dense", "gated_delta", "latent_attention", "bfloat16"])
def test_step_that_was_run_needed_more_than_the_least(backend, name):
    """So nothing that fits is refused: with what a step was seen to use, the check passes."""
    require_backend(backend)
    overrides = (*TINY, "training.batch_size=1024")
    path = f"configs/tiny/{name}.yaml"
    done = subprocess.run(
        [sys.executable, "-c", PEAK, backend, path, *overrides], capture_output=True, text=True, check=True
    )
    used = int(json.loads(done.stdout))
    config = load_config(path, overrides)
    assert least(lambda devices: check_training(config, devices)) < used
