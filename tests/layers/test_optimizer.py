import numpy as np
import pytest

from moezoo.core.config.optimizers import AdafactorConfig, AdamWConfig, LionConfig, MuonConfig, SGDConfig
from moezoo.core.config.update_rules import UpdateRule, update_rules
from moezoo.core.config.validate import validate
from moezoo.core.errors import DataError, SpecError
from moezoo.core.parameters import MatrixAxes, parameter_table
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.losses import loss_and_gradients
from moezoo.core.reference.optimizer import global_norm, optimizer_step, zero_state
from moezoo.core.spec import (
    CapacitySpec,
    DroplessSpec,
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    RouterSpec,
    RouterZLossSpec,
    SwitchBalanceLossSpec,
)
from moezoo.core.tokens import IGNORED
from tests.support.backends_available import require_backend
from tests.support.tolerances import (
    FLOAT32,
    FLOAT32_GRADIENT,
    FLOAT32_UPDATE,
    FLOAT64,
    assert_all_close,
    assert_close,
)
from tests.support.twins import D, E, F, H, K, M, N, T, Twin, V, beside, normal

MOE = MoESpec(num_experts=E, router=RouterSpec(top_k=K), experts=GatedFeedForwardSpec(hidden_dim=F))
ATTENTION = GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H, qkv_bias=True)
SPEC = ModelSpec(
    vocab_size=V,
    embed_dim=D,
    layers=(
        LayerSpec(attention=ATTENTION, moe=MOE),
        LayerSpec(attention=ATTENTION, moe=MOE.model_copy(update={"dispatch": CapacitySpec(factor=0.5)})),
    ),
)
DROPLESS = ModelSpec(vocab_size=V, embed_dim=D, layers=(LayerSpec(attention=ATTENTION, moe=MOE),))
DENSE = ModelSpec(
    vocab_size=V, embed_dim=D, layers=(LayerSpec(attention=ATTENTION, feed_forward=GatedFeedForwardSpec(hidden_dim=F)),)
)
RATES = (0.03, 0.02, 0.01)  # large, so that a float32 weight near 1 shows four digits of its update
# The step divides by sqrt(v) + epsilon: with the usual 1e-8 a gradient of 1e-9, a sum that should cancel, would move
# its parameter by a full learning rate in a direction that is rounding. 1e-2 keeps the comparison about the formula.
EPSILON = 1e-2
CONFIGS = {
    "clipped and decayed": AdamWConfig(learning_rate=1e-3, epsilon=EPSILON, clip_norm=0.2, weight_decay=0.3),
    "no clip, no decay": AdamWConfig(learning_rate=1e-3, epsilon=EPSILON, clip_norm=None, weight_decay=0.0),
    "other betas": AdamWConfig(learning_rate=1e-3, epsilon=EPSILON, beta1=0.5, beta2=0.8, clip_norm=100.0),
}


def weights_of(spec: ModelSpec) -> dict[str, np.ndarray]:
    return {name: 2 * value for name, value in initial_weights(spec, seed=0).items()}


def decayed_of(spec: ModelSpec) -> set[str]:
    return {row.name for row in parameter_table(spec) if row.decay}


def windows_of(steps: int, micro_batches: int, batch: int) -> np.ndarray:
    """int32 [steps, A, B, T + 1]."""
    return np.random.default_rng(0).integers(0, V, (steps, micro_batches, batch, T + 1)).astype(np.int32)


def reference_run(spec, config, windows, rates):
    """Return parameters, moments and per-step (losses, norm), in float64."""
    parameters = {name: value.astype(np.float64) for name, value in weights_of(spec).items()}
    rules, measured = update_rules(config, parameter_table(spec)), []
    moments = zero_state(rules, parameters)
    for update, (window, rate) in enumerate(zip(windows, rates, strict=True), start=1):
        losses, gradients = loss_and_gradients(spec, parameters, window[0, :, :-1], window[0, :, 1:])
        measured.append((losses, global_norm(gradients)))
        parameters, moments = optimizer_step(
            config, rules, parameters, gradients, moments, learning_rate=rate, update=update
        )
    return parameters, moments, measured


@pytest.mark.parametrize("kind", CONFIGS)
def test_three_steps_match_the_reference(twin, kind):
    config, windows = CONFIGS[kind], windows_of(3, 1, 4)
    spec = SPEC if kind == "clipped and decayed" else DENSE
    parameters, moments, measured = reference_run(spec, config, windows, RATES)
    model = twin.backend().build(spec, weights_of(spec))
    model.start_training(config)
    for window, rate, (losses, norm) in zip(windows, RATES, measured, strict=True):
        metrics = model.train_step(window, rate).fetch()
        assert_all_close(metrics.losses, losses, FLOAT32)
        assert_close(metrics.gradient_norm, norm, FLOAT32)
    assert (config.clip_norm is not None and norm > config.clip_norm) == (kind == "clipped and decayed")
    assert_all_close(model.export_parameters(), parameters, FLOAT32)
    before = weights_of(spec)
    assert all(np.max(np.abs(value - before[name])) > 1e-4 for name, value in parameters.items())
    assert_all_close(model.export_optimizer(), moments, FLOAT32_GRADIENT)


def test_weight_decay_acts_on_matrices_only(twin):
    """Steps with and without decay differ by rate * decay * weight for rows with `decay`, and not at all for others."""
    windows, before = windows_of(1, 1, 4), weights_of(DENSE)
    after = {}
    for decay in (0.0, 0.5):
        model = twin.backend().build(DENSE, before)
        model.start_training(AdamWConfig(learning_rate=1.0, weight_decay=decay, epsilon=EPSILON))
        model.train_step(windows[0], 0.1).fetch()
        after[decay] = model.export_parameters()
    for name, value in before.items():
        if name in decayed_of(DENSE):
            assert_close(after[0.0][name] - after[0.5][name], 0.1 * 0.5 * value, FLOAT32_UPDATE, name)
        else:
            np.testing.assert_array_equal(after[0.0][name], after[0.5][name], err_msg=name)


@pytest.mark.parametrize("dispatch", [DroplessSpec(), CapacitySpec(factor=0.5, group="sequence")])
def test_four_micro_batches_equal_one_batch_of_four_times_the_size(twin, dispatch):
    """Without losses that are not sums over tokens, and without a capacity over the whole batch."""
    windows, config = windows_of(2, 1, 8), CONFIGS["clipped and decayed"]
    layer = LayerSpec(attention=ATTENTION, moe=MOE.model_copy(update={"dispatch": dispatch}))
    spec, runs = DROPLESS.model_copy(update={"layers": (layer,)}), {}
    for each, micro_batches in ((beside(), 1), (twin, 4)):
        model = each.backend().build(spec, weights_of(spec))
        model.start_training(config)
        shape = (2, micro_batches, 8 // micro_batches, T + 1)
        metrics = [model.train_step(window, 0.01).fetch() for window in windows.reshape(shape)]
        runs[micro_batches] = metrics, model.export_parameters(), model.export_optimizer()
    for one, four in zip(runs[1][0], runs[4][0], strict=True):
        assert_all_close(four.losses, one.losses, FLOAT32)
        assert_close(four.gradient_norm, one.gradient_norm, FLOAT32)
        np.testing.assert_array_equal(four.load, one.load)
        assert four.dropped == one.dropped
        assert (one.dropped[0] > 0) == isinstance(dispatch, CapacitySpec)
        assert np.sum(one.load[0]) == 8 * T * K
    assert_all_close(runs[4][2], runs[1][2], FLOAT32_GRADIENT)
    assert_all_close(runs[4][1], runs[1][1], FLOAT32)


def masked_targets(window: np.ndarray) -> np.ndarray:
    """Targets of 3 micro-batches [3, B, T]: most of them masked, a few, and all."""
    targets = window[..., 1:].copy()
    targets[0, :, 2:], targets[1, 0, :3], targets[2] = IGNORED, IGNORED, IGNORED
    return targets


def test_masked_targets_of_micro_batches_match_the_reference(twin):
    """The gradient of the cross-entropy is that over all targets of the step; auxiliary losses are means of parts."""
    losses = (SwitchBalanceLossSpec(coefficient=0.5), RouterZLossSpec(coefficient=0.5))
    layer = LayerSpec(attention=ATTENTION, moe=MOE.model_copy(update={"losses": losses}))
    spec, window = DROPLESS.model_copy(update={"layers": (layer,)}), windows_of(1, 3, 2)[0]
    targets, parameters = masked_targets(window), {k: v.astype(np.float64) for k, v in weights_of(DROPLESS).items()}
    num_targets = np.sum(targets != IGNORED) / 3
    parts = [
        loss_and_gradients(spec, parameters, part[:, :-1], own, num_targets=num_targets)
        for part, own in zip(window, targets, strict=True)
    ]
    whole, _ = loss_and_gradients(spec, parameters, window.reshape(6, -1)[:, :-1], targets.reshape(6, -1))
    terms = {name: np.mean([own[name] for own, _ in parts]) for name in whole}
    assert_close(terms["cross_entropy"], whole["cross_entropy"], FLOAT64)
    gradients = {name: np.mean([own[name] for _, own in parts], axis=0) for name in parts[0][1]}
    model = twin.backend().build(spec, weights_of(spec))
    model.start_training(CONFIGS["no clip, no decay"])
    assert_all_close(model.train_step(window, 1e-3, targets=targets).fetch().losses, terms, FLOAT32)
    first = {name: value / 0.1 for name, value in model.export_optimizer().items() if name.startswith("first_moment.")}
    assert_all_close(first, {f"first_moment.{name}": value for name, value in gradients.items()}, FLOAT32_GRADIENT)


def test_accumulation_of_masked_targets_equals_one_batch(twin):
    window, after = windows_of(1, 3, 2)[0], {}
    for each, shape in ((twin, (3, 2, -1)), (beside(), (1, 6, -1))):
        model = each.backend().build(DENSE, weights_of(DENSE))
        model.start_training(CONFIGS["other betas"])
        targets = masked_targets(window)
        metrics = model.train_step(window.reshape(shape), 1e-2, targets=targets.reshape(shape)).fetch()
        after[shape] = metrics.losses, model.export_optimizer()
    (many, moments), (one, expected) = after.values()
    assert_all_close(many, one, FLOAT32)
    assert_all_close(moments, expected, FLOAT32_GRADIENT)


def test_a_step_with_all_targets_masked_is_refused(twin):
    window = windows_of(1, 2, 3)[0]
    model = twin.backend().build(DENSE, weights_of(DENSE))
    model.start_training(CONFIGS["other betas"])
    with pytest.raises(DataError, match=f"all targets are masked; got {6 * T} targets of -1 in a batch"):
        model.train_step(window, 1e-3, targets=np.full_like(window[..., 1:], IGNORED))
    with pytest.raises(DataError, match="tokens and targets differ in shape"):
        model.train_step(window, 1e-3, targets=window)


def test_each_choice_and_each_drop_is_counted_once(twin):
    window = windows_of(1, 2, 2)[0]
    model, other = (each.backend().build(SPEC, weights_of(SPEC)) for each in (twin, beside()))
    expected_load, expected_dropped = [np.zeros(E, np.int64), np.zeros(E, np.int64)], [0, 0]
    for part in window:
        scores = other.score(part[:, :-1], part[:, 1:])
        expected_load = [total + of_part for total, of_part in zip(expected_load, scores.load, strict=True)]
        expected_dropped = [total + of_part for total, of_part in zip(expected_dropped, scores.dropped, strict=True)]
    model.start_training(CONFIGS["other betas"])
    metrics = model.train_step(window, 1e-3).fetch()
    np.testing.assert_array_equal(metrics.load, expected_load)
    assert [int(np.sum(load)) for load in metrics.load] == [4 * T * K] * 2
    assert metrics.dropped == expected_dropped
    assert metrics.dropped[0] == 0
    assert metrics.dropped[1] > 0


def test_a_restored_optimizer_continues_as_if_uninterrupted(twin):
    continues(twin, CONFIGS["clipped and decayed"])


@pytest.mark.parametrize("backend", [pytest.param("jax", marks=pytest.mark.release), "mlx"])
@pytest.mark.parametrize(
    "config",
    [
        MuonConfig(kind="muon", learning_rate=1e-3),
        LionConfig(kind="lion", learning_rate=1e-3),
        AdafactorConfig(kind="adafactor", learning_rate=1e-3),
        SGDConfig(kind="sgd", learning_rate=1e-3),
        SGDConfig(kind="sgd", learning_rate=1e-3, momentum=0.0),
    ],
    ids=lambda config: f"{config.kind}-{len(config.model_fields_set)}",
)
def test_every_kind_continues_as_if_uninterrupted(backend, config):
    require_backend(backend)
    continues(Twin(backend), config)


def continues(twin, config):
    windows = windows_of(3, 1, 4)
    model = twin.backend().build(DENSE, weights_of(DENSE))
    model.start_training(config)
    for window, rate in zip(windows[:2], RATES[:2], strict=True):
        model.train_step(window, rate).fetch()
    restored = twin.backend().build(DENSE, model.export_parameters())
    restored.start_training(config, model.export_optimizer(), update=2)
    metrics = [each.train_step(windows[2], RATES[2]).fetch() for each in (model, restored)]
    assert metrics[0].losses == metrics[1].losses
    after, after_restored = model.export_parameters(), restored.export_parameters()
    for name in after:
        np.testing.assert_array_equal(after_restored[name], after[name], err_msg=name)


def test_global_norm_is_the_norm_of_all_gradients_as_one_vector():
    gradients = {"a": normal(0, 3, 5), "b": normal(1, 7)}
    together = np.concatenate([gradients["a"].reshape(-1), gradients["b"]])
    assert_close(global_norm(gradients), np.linalg.norm(together), FLOAT64)


def first_step(config, parameters, gradients):
    """The reference's, at a learning rate of 0.1."""
    rules = {name: UpdateRule(config, 1.0, config.weight_decay, MatrixAxes(0, 1)) for name in parameters}
    state = zero_state(rules, parameters)
    return optimizer_step(config, rules, parameters, gradients, state, learning_rate=0.1, update=1)


def test_first_step_of_the_reference_is_the_sign_of_the_gradient():
    """With bias correction, m / sqrt(v) of the first step is g / |g|; without, it would be sqrt(0.05) / 0.1 of that."""
    parameters, gradients = {"w": np.ones((2, 3))}, {"w": normal(0, 2, 3)}
    config = AdamWConfig(learning_rate=1.0, epsilon=1e-12, clip_norm=None, weight_decay=0.5)
    after, moments = first_step(config, parameters, gradients)
    assert_close(after["w"], 1 - 0.1 * (np.sign(gradients["w"]) + 0.5), FLOAT32)
    assert_close(moments["first_moment.w"], 0.1 * gradients["w"], FLOAT64)
    assert_close(moments["second_moment.w"], 0.05 * gradients["w"] ** 2, FLOAT64)


def test_clipped_gradients_have_the_clip_norm():
    parameters, gradients = {"w": np.ones((4, 5))}, {"w": 100 * normal(0, 4, 5)}
    config = AdamWConfig(learning_rate=1.0, clip_norm=0.25, beta1=0.0)
    _, moments = first_step(config, parameters, gradients)
    assert_close(np.linalg.norm(moments["first_moment.w"]), 0.25, FLOAT32)


def test_decay_below_zero_is_refused():
    with pytest.raises(SpecError, match=r"weight_decay is -0.1; input should be greater than or equal to 0"):
        validate(AdamWConfig, {"learning_rate": 1e-3, "weight_decay": -0.1}, "config")


def test_mlx_gradient_norm_is_accurate_on_large_arrays():
    """On the Linux CPU a single float32 sum over the whole array is off by 1.8e-3."""
    require_backend("mlx")
    import mlx.core as mx

    from moezoo.mlx_backend.optimizer import global_norm as of_mlx

    gradient = np.random.default_rng(0).standard_normal((8, 512, 1024)).astype(np.float32)
    exact = np.sqrt(np.square(gradient.astype(np.float64)).sum())
    assert abs(of_mlx({"w": mx.array(gradient)}).item() / exact - 1) < 1e-6
