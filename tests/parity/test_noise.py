"""Dropout, router jitter, noise and sampled experts of a whole model: equal on every side, and functions of the key.

Uniform numbers are compared bit for bit in tests/layers/test_random.py; this checks which key each use draws from, and
that scoring draws none.
"""

import numpy as np
import pytest

from moezoo.core.config.optimizers import AdamWConfig
from moezoo.core.config.update_rules import update_rules
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.random import micro_batch_keys
from moezoo.core.reference.losses import expert_counts, loss_and_gradients, token_losses
from moezoo.core.reference.optimizer import global_norm, optimizer_step, zero_state
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import (
    GroupedQueryAttentionSpec,
    JitterSpec,
    LayerSpec,
    LoadLossSpec,
    ModelSpec,
    MoESpec,
    NoisyTopKChoiceSpec,
    PlainFeedForwardSpec,
    RouterSpec,
    RouterZLossSpec,
    SparseMixerChoiceSpec,
)
from tests.support.tolerances import FLOAT32, FLOAT32_GRADIENT, ROUTING_MARGIN, assert_all_close, assert_close
from tests.support.twins import D, E, F, H, K, M, N, T, V, normal

ATTENTION = GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H)
EXPERTS = PlainFeedForwardSpec(kind="gelu", hidden_dim=F)
NOISY = MoESpec(
    num_experts=E,
    router=RouterSpec(top_k=K, choice=NoisyTopKChoiceSpec(), jitter=JitterSpec(of="input", amount=0.1)),
    experts=EXPERTS,
    losses=(LoadLossSpec(coefficient=0.01), RouterZLossSpec(coefficient=0.001)),
)
DRAWN = MoESpec(
    num_experts=E,
    router=RouterSpec(
        top_k=K,
        choice=SparseMixerChoiceSpec(jitter=0.5),
        renormalize="none",
        jitter=JitterSpec(of="logits", amount=0.2),
    ),
    experts=EXPERTS,
)
SPEC = ModelSpec(
    vocab_size=V,
    embed_dim=D,
    dropout=0.2,
    layers=(
        LayerSpec(attention=ATTENTION, feed_forward=EXPERTS, moe=NOISY, shortcut=True),
        LayerSpec(attention=ATTENTION, moe=DRAWN),
    ),
)
WEIGHTS = {
    row.name: np.float32(initial + 0.2 * normal(number, *row.shape))
    for number, (row, initial) in enumerate(zip(parameter_table(SPEC), initial_weights(SPEC, 0).values(), strict=True))
}
PARAMETERS = {name: value.astype(np.float64) for name, value in WEIGHTS.items()}
WINDOW = np.random.default_rng(0).integers(0, V, (2, 3, T + 1)).astype(np.int32)  # [A, B, T + 1]
# Keys by seed and step. The first key is used twice, and only the last step has a learning rate above 0.
KEYS = {"one": micro_batch_keys(5, 0, 2), "other": micro_batch_keys(5, 1, 2)}
STEPS = (("one", 0.0), ("other", 0.0), ("one", 0.0), ("other", 0.01))
# Epsilon is large, as in test_optimizer.py, so that an update is not the sign of a gradient that is rounding.
OPTIMIZER = AdamWConfig(learning_rate=0.01, epsilon=1e-2)


def reference_pass(keys):
    """Return mean losses, mean gradients, and the load per layer of both micro-batches."""
    losses, gradients, load = [], [], []
    for part, key in zip(WINDOW, keys, strict=True):
        routings = forward(SPEC, PARAMETERS, part[:, :-1], key=key).routings
        assert min(np.min(routing.margin_P) for routing in routings) > ROUTING_MARGIN
        terms, named = loss_and_gradients(SPEC, PARAMETERS, part[:, :-1], part[:, 1:], key=key)
        losses.append(terms)
        gradients.append(named)
        load.append([expert_counts(routing) for routing in routings])
    mean = {name: (losses[0][name] + losses[1][name]) / 2 for name in losses[0]}
    return mean, {name: (gradients[0][name] + gradients[1][name]) / 2 for name in gradients[0]}, np.sum(load, axis=0)


@pytest.fixture(scope="module")
def expected():
    return {name: reference_pass(keys) for name, keys in KEYS.items()}


@pytest.fixture(scope="module")
def model(twin):
    return twin.backend().build(SPEC, WEIGHTS)


@pytest.fixture(scope="module")
def clean(model):
    """Scores of the first micro-batch, before any training step."""
    return model.score(WINDOW[0, :, :-1], WINDOW[0, :, 1:])


@pytest.fixture(scope="module")
def steps(model, clean):
    """Metrics of each of STEPS."""
    model.start_training(OPTIMIZER)
    return [model.train_step(WINDOW, rate, KEYS[name]).fetch() for name, rate in STEPS]


def test_scores_have_no_noise(clean):
    logits, routings, _ = forward(SPEC, PARAMETERS, WINDOW[0, :, :-1])
    assert_close(clean.token_losses, token_losses(logits, WINDOW[0, :, 1:]), FLOAT32)
    for counts, routing in zip(clean.load, routings, strict=True):
        np.testing.assert_array_equal(counts, expert_counts(routing))


def test_step_has_the_noise_of_its_keys_on_every_side(steps, expected):
    for (name, _), metrics in zip(STEPS, steps, strict=True):
        losses, gradients, load = expected[name]
        assert_all_close(metrics.losses, losses, FLOAT32)
        assert_close(metrics.gradient_norm, global_norm(gradients), FLOAT32)
        np.testing.assert_array_equal(metrics.load, load)


def test_equal_keys_have_bit_identical_steps_and_other_keys_do_not(steps):
    one, other, again, _ = steps
    assert again.losses == one.losses
    assert again.gradient_norm == one.gradient_norm
    assert abs(other.losses["loss"] - one.losses["loss"]) > 1e-3
    assert np.any(np.not_equal(other.load, one.load))


def test_noise_changes_the_loss_and_the_load(steps, expected):
    without = [forward(SPEC, PARAMETERS, part[:, :-1]) for part in WINDOW]
    losses = [token_losses(each.logits_BTV, part[:, 1:]).mean() for each, part in zip(without, WINDOW, strict=True)]
    load = np.sum([[expert_counts(routing) for routing in each.routings] for each in without], axis=0)
    for metrics in steps[:2]:
        assert abs(metrics.losses["cross_entropy"] - np.mean(losses)) > 1e-3
        assert all(np.any(own != counts) for own, counts in zip(metrics.load, load, strict=True))


def test_weights_and_moments_after_noisy_steps_equal_the_references(model, steps, expected):
    rules = update_rules(OPTIMIZER, parameter_table(SPEC))
    parameters, moments = PARAMETERS, zero_state(rules, PARAMETERS)
    for update, (name, rate) in enumerate(STEPS, start=1):
        parameters, moments = optimizer_step(
            OPTIMIZER, rules, parameters, expected[name][1], moments, learning_rate=rate, update=update
        )
    assert_all_close(model.export_parameters(), parameters, FLOAT32)
    assert_all_close(model.export_optimizer(), moments, FLOAT32_GRADIENT)
