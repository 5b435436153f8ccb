"""Scanned layers (compiled once, run in a loop) give the same results as unrolled layers."""

import re

import jax
import numpy as np
import pytest

from moezoo.core.backend import Model, StepMetrics
from moezoo.core.config.optimizers import AdafactorConfig, MuonConfig
from moezoo.core.config.run_config import Config, load_config
from moezoo.core.config.training import Layers
from moezoo.core.config.vocabulary import with_vocab_size
from moezoo.core.errors import SpecError, TrainingError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.random import micro_batch_keys
from moezoo.core.spec import ModelSpec
from moezoo.jax_backend.runtime.step_batch import step_batch
from tests.support.backends_available import require_backend
from tests.support.tolerances import FLOAT32, FLOAT32_GRADIENT, FLOAT32_TRAINING, assert_all_close, assert_close
from tests.support.twins import Twin, V

pytestmark = pytest.mark.slow


def tiny(name: str, repeat: int, place: int = 0) -> Config:
    """Return a tiny config with a layer, the first one, repeated `repeat` times."""
    config = with_vocab_size(load_config(f"configs/tiny/{name}.yaml"), V)
    layers = list(config.model.layers)
    layers[place] = layers[place].model_copy(update={"repeat": repeat})
    return with_layers(config, tuple(layers))


def with_layers(config: Config, layers: tuple) -> Config:
    values = config.model.model_dump() | {"layers": [layer.model_dump() for layer in layers]}
    return config.model_copy(update={"model": ModelSpec.model_validate(values)})


def mixed() -> Config:
    """Return a config of two MoE layers with noise, a dense layer and two MoE layers."""
    moe, dense = tiny("noisy_top_k", 2).model.layers[0], tiny("dense", 1).model.layers[0]
    return with_layers(tiny("noisy_top_k", 1), (moe, dense, moe))


def combined() -> Config:
    """Return a config with state, logits and values of earlier layers, dropout, layer inputs, and a global loss."""
    config = tiny("softmax_with_bias", 3)
    layer = config.model.layers[0]
    losses = tiny("global_balance", 1).model.layers[0].moe.losses
    router = layer.moe.router.model_copy(update={"gating_residual": True})
    attention = layer.attention.model_copy(update={"value_residual": True})
    moe = layer.moe.model_copy(update={"router": router, "losses": losses})
    inputs = {"dropout": tiny("dropout", 1).model.dropout, "layer_inputs": tiny("layer_inputs", 1).model.layer_inputs}
    config = config.model_copy(update={"model": config.model.model_copy(update=inputs)})
    return with_layers(config, (layer.model_copy(update={"attention": attention, "moe": moe}),))


def over_depth() -> Config:
    """Return a config of attention over depth, with two layers to scan before a sum begins, and two after."""
    config = tiny("attention_residual", 4)
    residual = config.model.residual.model_copy(update={"layers_per_block": 3})
    return config.model_copy(update={"model": config.model.model_copy(update={"residual": residual})})


IN_THE_GATE = {"combined": combined()}
ONE_BY_ONE = {
    "mixed": mixed(),
    **{
        name: tiny(name, 3)
        for name in (
            "noisy_top_k",
            "softmax_with_bias",
            "gating_residual",
            "router_mlp",
            "value_residual",
            "global_balance",
        )
    },
    **{
        name: tiny(name, 2)
        for name in (
            *("dropout", "layer_inputs", "expert_choice", "depth_scaled", "hyper_connections", "mamba", "head_router"),
        )
    },
    "gated_streams": tiny("gated_streams", 2, place=1),
    "compressed_attention": tiny("compressed_attention", 2, place=2),
    "attention_residual": over_depth(),
}
OPTIMIZERS = (MuonConfig(kind="muon", learning_rate=1e-3), AdafactorConfig(kind="adafactor", learning_rate=1e-3))
ONE_BY_ONE |= {each.kind: tiny("top_k", 3).model_copy(update={"optimizer": each}) for each in OPTIMIZERS}
CONFIGS = {**IN_THE_GATE, **ONE_BY_ONE}


def windows(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, V, (2, 2, 14), dtype=np.int32)


def started(config: Config, layers: Layers, backend: str = "jax", **options) -> Model:
    weights = initial_weights(config.model, 0, active_adapters=True)  # and maps of residual streams
    model = Twin(backend).backend().build(config.model, weights)
    model.start_training(config.optimizer, layers=layers, **options)
    return model


def stepped(model: Model, steps: range, documents: np.ndarray | None = None) -> StepMetrics:
    for step in steps:
        metrics = model.train_step(
            windows(step), 1e-3, micro_batch_keys(0, step, 2), windows(step)[..., 1:], documents
        ).fetch()
    return metrics


def exported(*models: Model) -> list[dict[str, np.ndarray]]:
    return [model.export_optimizer() for model in models]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "mlx") for name in IN_THE_GATE),  # it compiles nothing
        *(pytest.param(name, "jax", marks=pytest.mark.release) for name in CONFIGS),
    ],
)
def test_scanned_layers_train_like_unrolled_layers(name, backend):
    """Three steps of two micro-batches, with noise; scanned layers recompute blocks in the backward pass."""
    require_backend(backend)
    config = CONFIGS[name]
    plain, scanned = started(config, "unrolled", backend), started(config, "scanned", rematerialize="block")
    assert any(name.startswith("layers.") and "-" in name for name in scanned._parameters)
    expected, found = stepped(plain, range(1)), stepped(scanned, range(1))
    assert_all_close(found.losses, expected.losses, FLOAT32)
    assert_close(found.gradient_norm, expected.gradient_norm, FLOAT32_GRADIENT)
    assert [list(load) for load in found.load] == [list(load) for load in expected.load]
    assert found.dropped == expected.dropped
    kinds = ("",) if backend == "jax" else ("first_moment.",)  # squares differ twice as far between backends
    moments, own = ({key: each[key] for key in each if key.startswith(kinds)} for each in exported(plain, scanned))
    assert_all_close(own, moments, FLOAT32_GRADIENT)
    expected, found = stepped(plain, range(1, 3)), stepped(scanned, range(1, 3))
    assert_all_close(found.losses, expected.losses, FLOAT32_TRAINING)
    assert_all_close(found.state, expected.state, FLOAT32_TRAINING)
    assert_all_close(scanned.export_parameters(), plain.export_parameters(), FLOAT32_TRAINING)


@pytest.mark.release
@pytest.mark.parametrize("name", ["combined", "mixed"])
def test_scanned_layers_train_on_packed_documents_like_unrolled_layers(name):
    config, documents = CONFIGS[name], np.repeat([[[0, 1, 2]], [[0, 3, 4]]], [4, 6, 3], axis=-1).repeat(2, axis=1)
    plain, scanned = started(config, "unrolled"), started(config, "scanned", rematerialize="block")
    expected, found = (stepped(model, range(1), documents.astype(np.int32)) for model in (plain, scanned))
    assert_all_close(found.losses, expected.losses, FLOAT32)
    assert_close(found.gradient_norm, expected.gradient_norm, FLOAT32_GRADIENT)
    assert_all_close(scanned.export_optimizer(), plain.export_optimizer(), FLOAT32_GRADIENT)


@pytest.mark.release
@pytest.mark.parametrize("name", ["softmax_with_bias", "mixed"])
def test_a_model_with_scanned_layers_has_the_same_outputs_and_gradients(name):
    """All gradients without rematerialization, with and without forced routing; scores, intermediates, and a cache."""
    config, tokens, targets = CONFIGS[name], windows(0)[0, :, :-1], windows(0)[0, :, 1:]
    plain, scanned = started(config, "unrolled"), started(config, "scanned")
    expected = plain.forward(tokens, targets, record=True)
    assert_all_close(scanned.forward(tokens, targets, record=True).intermediates, expected.intermediates, FLOAT32)
    assert_close(scanned.score(tokens, targets).token_losses, plain.score(tokens, targets).token_losses, FLOAT32)
    assert_close(scanned.prefill(tokens, 16)[0], plain.prefill(tokens, 16)[0], FLOAT32)
    for forced in (None, [routing.expert for routing in expected.routing]):
        pairs = zip(*(m.loss_and_gradients(tokens, targets, forced=forced) for m in (scanned, plain)), strict=True)
        for (found, wanted), tolerance in zip(pairs, (FLOAT32, FLOAT32_GRADIENT), strict=True):
            assert_all_close(found, wanted, tolerance)


@pytest.mark.release
@pytest.mark.parametrize("order", [("scanned", "unrolled"), ("unrolled", "scanned")])
def test_a_run_can_resume_with_the_other_setting(order):
    config = CONFIGS["softmax_with_bias"]
    whole, first = started(config, "unrolled"), started(config, order[0])
    stepped(whole, range(3))
    stepped(first, range(2))
    second = Twin("jax").backend().build(config.model, first.export_parameters())
    second.start_training(config.optimizer, first.export_optimizer(), 2, layers=order[1])
    stepped(second, range(2, 3))
    assert_all_close(second.export_parameters(), whole.export_parameters(), FLOAT32_TRAINING)
    assert_all_close(second.export_optimizer(), whole.export_optimizer(), FLOAT32_TRAINING)


def compiled(layers: Layers, repeat: int) -> jax.stages.Compiled:
    model = started(tiny("top_k", repeat), layers)
    arguments = model._step_inputs(step_batch(windows(0)), 1e-3, None)
    return model._step.lower(*arguments).compile()


@pytest.mark.release
def test_program_size_does_not_grow_with_the_number_of_scanned_layers():
    products = {
        (layers, repeat): len(re.findall(r" dot\(", compiled(layers, repeat).as_text()))
        for layers, repeat in (("scanned", 3), ("scanned", 8), ("unrolled", 3))
    }
    assert products["scanned", 3] == products["scanned", 8] < products["unrolled", 3] / 1.5


def test_micro_batches_need_memory_for_the_gradients_of_one_layer_at_a_time():
    """Temporary memory of a step: the mean of all gradients dominates in a wide model."""
    overrides = ("model.layers[0].repeat=12", "model.embed_dim=256")
    config = with_vocab_size(load_config("configs/tiny/top_k.yaml", overrides), V)
    model = started(config, "scanned", rematerialize="block")
    gradients = sum(value.nbytes for value in model._parameters.values())
    batch = step_batch(np.zeros((2, 1, 9), np.int32))
    arguments = model._step_inputs(batch, 1e-3, None)
    planned = model._step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert gradients < planned < 1.6 * gradients, (planned, gradients)


@pytest.mark.parametrize("name", ["shared_keys", "shortcut", "sliding_window", "attention_residual"])
def test_layers_that_cannot_be_scanned_are_rejected(name):
    with pytest.raises(SpecError, match=r"training.layers is 'scanned', but no two of .*training.layers: unrolled"):
        started(with_vocab_size(load_config(f"configs/tiny/{name}.yaml"), V), "scanned")


def test_scanned_layers_on_mlx_are_rejected():
    require_backend("mlx")
    with pytest.raises(TrainingError, match=r"training.layers is 'scanned', which is not supported on MLX"):
        started(tiny("top_k", 2), "scanned", "mlx")
