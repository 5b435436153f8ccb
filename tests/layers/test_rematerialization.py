"""Rematerialization: the backward pass recomputes activations; loss, gradients, counts and state stay the same."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from moezoo.core.backend import Model, StepMetrics
from moezoo.core.config.run_config import load_config
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.random import micro_batch_keys
from moezoo.core.tokens import IGNORED, PADDING
from tests.support.backends_available import require_backend
from tests.support.tolerances import FLOAT32, FLOAT32_GRADIENT, assert_all_close, assert_close
from tests.support.twins import Twin, V

pytestmark = pytest.mark.slow

TINY, COMBINATIONS = Path("configs/tiny"), Path("tests/data/combinations")
# Noise and dropout, state, an MoE output that joins a layer later, shared keys, other kinds of layers, a dense one.
CONFIGS = [
    *("noisy_top_k", "dropout", "softmax_with_bias", "shortcut", "shared_keys", "latent_attention", "gated_delta"),
    *("sparse_attention", "global_balance", "dense"),
    *("weight_on_input", "latent_experts", "clamped_swiglu", "zero_computation"),
]
# The same parts together: what recomputes experts and what recomputes a whole block.
IN_THE_GATE = [
    ("zero_computation", "experts"),  # an MoE output that joins a layer later, a capacity
    ("delta_attention", "block-packed"),  # state, experts in a latent space; packed documents
]
BEFORE_A_RELEASE = [
    ("delta_attention", "block"),
    ("delta_attention", "experts-packed"),
    ("sparse_attention", "block-packed"),
    ("windows", "block-packed"),
    ("zero_computation", "block"),
    ("learned_positions", "block"),  # noise, biases of experts
    ("learned_positions", "experts"),
]


@cache
def trained(path: Path, rematerialize: str, backend: str, *, packed: bool = False) -> tuple[Model, StepMetrics]:
    """Return the model after one step of two micro-batches, and the metrics of the step.

    Packed documents begin in the middle of a chunk of the gated delta rule, and continue in the next one.
    """
    config = with_vocab_size(load_config(path), V)
    model = Twin(backend).backend().build(config.model, initial_weights(config.model, 0))
    model.start_training(config.optimizer, rematerialize=rematerialize)
    windows = np.random.default_rng(0).integers(0, V, (2, 2, 42 if packed else 14), dtype=np.int32)
    targets = documents = None
    if packed:
        documents = np.repeat([[[0, 1, 2, PADDING]], [[0, 3, 4, 5]]], [9, 1, 27, 4], axis=-1).repeat(2, axis=1)
        targets = np.where(documents == PADDING, IGNORED, windows[..., 1:])
    return model, model.train_step(windows, 1e-3, micro_batch_keys(0, 0, 2), targets, documents).fetch()


def cases():
    """JAX compiles each for seconds, so most are release tests; on MLX those of single parts."""
    combined = [(COMBINATIONS / f"{name}.yaml", how) for name, how in [*IN_THE_GATE, *BEFORE_A_RELEASE]]
    single = [(TINY / f"{name}.yaml", how) for name in CONFIGS for how in ("experts", "block")]
    name = "{}-{}-{}".format
    for path, how in [*combined, *single]:
        for backend in ("jax", "mlx"):
            marks = () if backend == "mlx" and (path, how) in combined else pytest.mark.release
            yield pytest.param(
                path, how, backend, backend, id=name("/".join(path.parts[-2:]), how, backend), marks=marks
            )
    for path, how in combined[: len(IN_THE_GATE)]:  # JAX's beside MLX's, which compiles nothing
        yield pytest.param(path, how, "jax", "mlx", id=name("/".join(path.parts[-2:]), how, "jax-beside-mlx"))


@pytest.mark.parametrize(("path", "how", "backend", "beside"), [*cases()])
def test_a_step_is_the_same_with_and_without_rematerialization(path, how, backend, beside):
    how, _, packed = how.partition("-")
    for each in (backend, beside):
        require_backend(each)
    plain, expected = trained(path, "none", beside, packed=bool(packed))
    recomputed, found = trained(path, how, backend, packed=bool(packed))
    assert_all_close(found.losses, expected.losses, FLOAT32)
    assert_close(found.gradient_norm, expected.gradient_norm, FLOAT32_GRADIENT)
    assert [list(load) for load in found.load] == [list(load) for load in expected.load]
    assert found.dropped == expected.dropped
    assert_all_close(found.state, expected.state, FLOAT32)
    moments = plain.export_optimizer()
    assert_all_close(recomputed.export_optimizer(), moments, FLOAT32_GRADIENT)
    assert any(np.abs(value).max() > 0 for value in moments.values())


@pytest.mark.release  # three programs of four layers
def test_jax_stores_less_for_the_backward_pass():
    """Temporary memory of one step, as planned by XLA: four layers, one of them live at a time.

    `blocks` store two of the formula's four arrays of hidden width: the gate and up projections.
    """
    from moezoo.jax_backend.kernels.grouped_product import block_rows
    from moezoo.jax_backend.runtime.step_batch import step_batch

    overrides = ("model.layers[0].repeat=4", "model.embed_dim=64")
    config = with_vocab_size(load_config(TINY / "top_k.yaml", overrides), V)
    windows = np.zeros((1, 4, 129), np.int32)
    planned = {}
    for how in ("none", "experts", "block"):
        model = Twin("jax").backend().build(config.model, initial_weights(config.model, 0))
        model.start_training(config.optimizer, rematerialize=how)
        arguments = model._step_inputs(step_batch(windows), 1e-3, None)
        planned[how] = model._step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert planned["block"] < 0.65 * planned["none"], planned
    moe = config.model.layers[0].moe
    rows = 4 * 128 * moe.router.top_k
    rows += moe.num_experts * block_rows(rows, moe.num_experts)  # experts' blocks are padded, here by 44 %
    stored = 4 * rows * (2 * moe.experts.hidden_dim + 2 * config.model.embed_dim)
    assert 0.9 * 3 * stored < planned["none"] - planned["experts"] < 1.2 * 3 * stored, (planned, stored)


@pytest.mark.release  # of scanned layers the gate shows it
def test_micro_batches_need_memory_for_the_gradients_of_one_block_at_a_time():
    """Temporary memory of a step: the sum of all gradients dominates in a wide model."""
    from moezoo.jax_backend.runtime.step_batch import step_batch

    overrides = ("model.layers[0].repeat=6", "model.embed_dim=256")
    config = with_vocab_size(load_config(TINY / "top_k.yaml", overrides), V)
    model = Twin("jax").backend().build(config.model, initial_weights(config.model, 0))
    model.start_training(config.optimizer, rematerialize="block")
    gradients = sum(value.nbytes for value in model._parameters.values())
    batch = step_batch(np.zeros((2, 1, 9), np.int32))
    arguments = model._step_inputs(batch, 1e-3, None)
    planned = model._step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert gradients < planned < 1.6 * gradients, (planned, gradients)
