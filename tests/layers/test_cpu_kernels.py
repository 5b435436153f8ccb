"""Kernels for x86 CPUs against MLX's own operations; the tests of layers compare them with the reference."""

import functools

import numpy as np
import pytest

from moezoo.core.config.optimizers import AdamWConfig
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.spec import (
    ClampedSwiGLUSpec,
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    RouterSpec,
)
from tests.support.backends_available import require_backend
from tests.support.tolerances import FLOAT32, FLOAT32_GRADIENT, FLOAT32_UPDATE, assert_all_close, assert_close
from tests.support.twins import B, D, E, F, H, K, M, N, Twin, V, normal

KERNELS = ("activation", "attention", "grouped_product", "x86", "x86.optimizer")
USERS = [f"kernels.{stem}" for stem in KERNELS]
ATTENTION = GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H, sinks=True)
LENGTH = 150  # three chunks of queries, the last one short


@pytest.fixture(scope="module")
def mlx() -> Twin:
    require_backend("mlx")
    return Twin("mlx")


@pytest.fixture(params=[0, 2**14], ids=["all of them", "large ones"])
def use(request, mlx, monkeypatch):
    """Switch between the x86 kernels and MLX's own operations, on any platform."""
    monkeypatch.setattr(mlx.module("kernels.x86"), "SMALL", request.param)

    def choose(kernels: bool) -> None:
        for stem in USERS:
            monkeypatch.setattr(mlx.module(stem), "is_x86_cpu", lambda: kernels)

    return choose


def spec_of(experts, attention=ATTENTION) -> ModelSpec:
    moe = MoESpec(num_experts=E, router=RouterSpec(top_k=K), experts=experts)
    return ModelSpec(vocab_size=V, embed_dim=D, layers=(LayerSpec(attention=attention, moe=moe),) * 2)


@pytest.mark.parametrize("experts", [GatedFeedForwardSpec(hidden_dim=F), ClampedSwiGLUSpec(hidden_dim=F, limit=1.5)])
@pytest.mark.parametrize("attention", [ATTENTION, ATTENTION.model_copy(update={"window": 40, "sinks": False})])
def test_a_model_has_the_same_loss_and_gradients_with_and_without_the_kernels(mlx, use, experts, attention):
    spec = spec_of(experts, attention)
    model = mlx.backend().build(spec, initial_weights(spec, 0))
    token_BT = np.random.default_rng(0).integers(0, V, (B, LENGTH + 1)).astype(np.int32)
    token_BT[1, 7:] = token_BT[1, 6]
    routing = model.forward(token_BT[:, :-1]).routing
    found = []
    for kernels in (True, False):
        use(kernels)
        forced = [layer.expert for layer in routing]
        found.append(model.loss_and_gradients(token_BT[:, :-1], token_BT[:, 1:], forced=forced))
    assert_all_close(found[0][0], found[1][0], FLOAT32)
    assert_all_close(found[0][1], found[1][1], FLOAT32_GRADIENT)


@pytest.mark.parametrize("scale", [0.1, 10.0, 200.0])
def test_sigmoid_and_log_losses_equal_mlx_for_inputs_of_any_scale(mlx, scale):
    import mlx.core as mx

    sigmoid, log_losses = (
        mlx.module("kernels.x86.activation").sigmoid,
        mlx.module("kernels.x86.cross_entropy").log_losses,
    )
    x, target = mlx.array(scale * normal(0, 40, V)), mlx.array(np.arange(40) % V)
    assert_close(mlx.numpy(sigmoid(x)), mlx.numpy(mx.sigmoid(x)), FLOAT32)
    expected = mx.logsumexp(x, axis=-1) - mx.take_along_axis(x, target[:, None], axis=-1)[:, 0]
    assert_close(mlx.numpy(log_losses(x, target)), mlx.numpy(expected), FLOAT32)
    of_kernel = mx.grad(lambda x: mx.sum(log_losses(x, target)))(x)
    of_mlx = mx.grad(lambda x: mx.sum(mx.logsumexp(x, axis=-1) - mx.take_along_axis(x, target[:, None], axis=-1)[:, 0]))
    assert_close(mlx.numpy(of_kernel), mlx.numpy(of_mlx(x)), FLOAT32_GRADIENT)


@pytest.mark.parametrize("attention", [ATTENTION, ATTENTION.model_copy(update={"window": 5})])
def test_decoding_gives_the_same_logits_with_and_without_the_kernels(mlx, use, attention):
    spec = spec_of(GatedFeedForwardSpec(hidden_dim=F), attention)
    model = mlx.backend().build(spec, initial_weights(spec, 0))
    token_BT = np.random.default_rng(0).integers(0, V, (B, 12)).astype(np.int32)
    expected = model.forward(token_BT, inference=True).logits
    for kernels in (True, False):
        use(kernels)
        logits, cache = model.prefill(token_BT[:, :9], 12)
        assert_close(logits, expected[:, 8], FLOAT32)
        for position in range(9, 12):
            logits, cache = model.decode(token_BT[:, position], cache)
            assert_close(logits, expected[:, position], FLOAT32)


def test_masked_keys_have_zero_weight_even_with_large_scores(mlx):
    kernels = mlx.module("kernels.x86.attention")
    query, key, value = (mlx.array(normal(seed, 1, 3, 1, *more)) for seed, more in ((0, (1, H)), (1, (H,)), (2, (H,))))
    mask = mlx.array(np.tril(np.ones((3, 3), bool)))
    out = [
        kernels.attend_in_chunks(query, keys, value, [kernels.Chunk(0, 3, 0, 3, mask)], 1.0)
        for keys in (key, key * mlx.array([1, 1, 1e6]).reshape(1, 3, 1, 1))
    ]
    np.testing.assert_array_equal(mlx.numpy(out[0])[:, :2], mlx.numpy(out[1])[:, :2])


@pytest.mark.parametrize("clip_norm", [0.1, None])
def test_updates_are_the_same_with_and_without_the_kernels(mlx, use, clip_norm):
    spec = spec_of(GatedFeedForwardSpec(hidden_dim=F))
    window = np.random.default_rng(0).integers(0, V, (1, B, 9)).astype(np.int32)
    found: list[dict[str, np.ndarray]] = []
    for kernels in (True, False):
        use(kernels)
        model = mlx.backend().build(spec, initial_weights(spec, 0))
        held = model.export_parameters()
        before = {name: np.array(value) for name, value in held.items()}
        config = AdamWConfig(learning_rate=1e-2, epsilon=1e-2, weight_decay=0.3, clip_norm=clip_norm)
        model.start_training(config)
        norms = {
            f"norm of step {step}": np.array(model.train_step(window, 1e-2).fetch().gradient_norm) for step in range(3)
        }
        found.append(norms | {name: np.array(value) for name, value in model.export_parameters().items()})
        for name, value in held.items():
            np.testing.assert_array_equal(value, before[name])
    assert_all_close(*found, FLOAT32_UPDATE)


def test_pieces_run_on_all_cores_and_an_error_in_one_is_raised(mlx):
    cores = mlx.module("runtime.cores")
    done: list[int] = []
    cores.on_all_cores(functools.partial(done.append, piece) for piece in range(50))
    assert sorted(done) == list(range(50))
    with pytest.raises(ZeroDivisionError):
        cores.on_all_cores([lambda: 1 / 0] * 2)


def test_the_header_says_what_computes_when_numpys_threads_cannot_be_limited(mlx, monkeypatch):
    cores, kernels = mlx.module("runtime.cores"), mlx.module("kernels.x86")
    monkeypatch.setattr(kernels, "is_x86_cpu", lambda: True)
    monkeypatch.setattr(cores, "_numpy_blas", lambda: None)
    done: list[int] = []
    cores.on_all_cores(functools.partial(done.append, piece) for piece in range(3))
    assert done == [0, 1, 2]
    assert "one core" in mlx.backend().facts()["kernels"]


@pytest.mark.parametrize("ends", [[2, 4, 6], [0, 6, 6], [5, 5, 6]], ids=["even", "all of one", "idle experts"])
def test_experts_of_any_size_return_the_products_of_their_rows(mlx, ends):
    import mlx.core as mx

    kernels = mlx.module("kernels.x86.experts")
    x, (w, up), down = normal(0, 7, D), (normal(seed, 3, D, F) for seed in (1, 2)), normal(3, 3, F, D)
    groups = list(zip([0, *ends[:-1]], ends, strict=True))
    expected = np.concatenate(
        [*(x[start:end] @ w[expert] for expert, (start, end) in enumerate(groups)), np.zeros((1, F))]
    )
    assert_close(mlx.numpy(kernels.sliced_product(mlx.array(x), mlx.array(w), ends)), expected, FLOAT32)
    arrays = [mlx.array(array) for array in (x, w, up, down)]

    def in_steps(x, gate, up, down):
        gate, up = (kernels.sliced_product(x, matrices, ends) for matrices in (gate, up))
        return mx.sum(mx.square(kernels.sliced_product(gate * mx.sigmoid(gate) * up, down, ends)))

    def fused(*arrays):
        return mx.sum(mx.square(kernels.swiglu_experts(*arrays, ends)))

    for found, wanted in zip(*(mx.grad(loss, range(4))(*arrays) for loss in (fused, in_steps)), strict=True):
        assert_close(mlx.numpy(found), mlx.numpy(wanted), FLOAT32_GRADIENT)


def test_the_highest_values_are_those_of_a_stable_sort_even_where_values_are_infinite_or_missing(mlx):
    import mlx.core as mx

    value_PE = np.random.default_rng(0).integers(0, 4, (50, 9)).astype(np.float32)
    for hidden in ([], [0, 2, 3, 4, 5, 6, 7, 8]):
        value_PE[7, hidden] = -np.inf
        expected = mx.argsort(-mlx.array(value_PE), axis=-1)[:, :3]
        found = mlx.module("kernels.x86.routing").highest(mlx.array(value_PE), 3)
        np.testing.assert_array_equal(mlx.numpy(found), mlx.numpy(expected))
