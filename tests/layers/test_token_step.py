"""One more token by NumPy, on MLX for x86: the logits of MLX's graph and of the reference, with the same caches."""

import numpy as np
import pytest

from moezoo.core.config.optimizers import AdamWConfig
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.quantization.formats import QuantizationFormat
from moezoo.core.random import micro_batch_keys
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import (
    AdapterSpec,
    CapacitySpec,
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LayerNormSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    NoPositionSpec,
    PrecisionSpec,
    RMSNormSpec,
    RoPESpec,
    RouterSpec,
    SharedExpertsSpec,
    TiedHeadSpec,
    TopPChoiceSpec,
    UntiedHeadSpec,
)
from tests.support.backends_available import require_backend
from tests.support.quantized import quantized_weights
from tests.support.tolerances import FLOAT32, assert_close
from tests.support.twins import B, D, E, F, H, K, M, N, Twin, V

LENGTH, PROMPT = 9, 4
TOKENS = np.random.default_rng(0).integers(0, V, (B, LENGTH)).astype(np.int32)


def model_of(attention=None, moe=None, layer=None, **model) -> ModelSpec:
    """Two layers of common parts, but for these fields."""
    heads = {"num_heads": N, "num_kv_heads": M, "head_dim": H}
    routed = {"num_experts": E, "router": RouterSpec(top_k=K), "experts": GatedFeedForwardSpec(hidden_dim=F)}
    parts = {
        "attention": GroupedQueryAttentionSpec(**heads | (attention or {})),
        "moe": MoESpec(**routed | (moe or {})),
    }
    layers = (LayerSpec(repeat=2, **parts | (layer or {})),)
    return ModelSpec(**{"vocab_size": V, "embed_dim": D, "layers": layers} | model)


COMMON = {
    "plain": model_of(),
    "query norms": model_of({"qk_norm": RMSNormSpec(scale="zero_centred"), "scale": 0.3}),
    "interleaved": model_of({"position": RoPESpec(layout="interleaved", fraction=0.67)}),
    "no position, tied": model_of({"position": NoPositionSpec()}, head=TiedHeadSpec(), norm=RMSNormSpec(scale="none")),
    "not renormalized": model_of(moe={"router": RouterSpec(top_k=1, renormalize="none")}),
    "adapter": model_of(adapter=AdapterSpec(rank=2, scale=1.5, on=("attention", "experts", "router", "head"))),
    "capacity of training": model_of(moe={"dispatch": CapacitySpec(factor=0.4)}),
}
OTHER = {
    "window": model_of({"window": 3}),
    "biases": model_of({"qkv_bias": True}),
    "post-norm": model_of(layer={"norm_placement": "post"}),
    "dense": model_of(layer={"moe": None, "feed_forward": GatedFeedForwardSpec(hidden_dim=F)}),
    "shared experts": model_of(moe={"shared": SharedExpertsSpec(hidden_dim=F)}),
    "geglu": model_of(moe={"experts": GatedFeedForwardSpec(kind="geglu", hidden_dim=F)}),
    "top p": model_of(moe={"router": RouterSpec(top_k=K, choice=TopPChoiceSpec(p=0.4))}),
    "sigmoid": model_of(moe={"router": RouterSpec(top_k=K, score="sigmoid")}),
    "layer norm": model_of(norm=LayerNormSpec()),
    "softcap": model_of(softcap=5.0),
    "bias of the head": model_of(head=TiedHeadSpec(bias=True)),
    "adapter of the embedding": model_of(adapter=AdapterSpec(rank=2, on=("embedding",))),
    "bfloat16": model_of(precision=PrecisionSpec(compute="bfloat16")),
}


@pytest.fixture
def mlx(monkeypatch) -> Twin:
    require_backend("mlx")
    twin = Twin("mlx")
    monkeypatch.setattr(twin.module("kernels.x86.token"), "_computes_tokens", lambda: True)
    return twin


def weights_of(spec):
    weights = initial_weights(spec, 0, active_adapters=True)
    return {name: value if ".lora_" in name else 5 * value for name, value in weights.items()}


def step_of(mlx, spec, dtype=None):
    parameters = {name: mlx.array(value, dtype) for name, value in weights_of(spec).items()}
    return mlx.module("kernels.x86.token").token_step(spec, parameters, {})


@pytest.mark.parametrize("large", [1, 2**21], ids=["all cores", "one core"])
@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("kind", COMMON)
def test_tokens_equal_the_uncached_reference(mlx, monkeypatch, kind, batch, large):
    monkeypatch.setattr(mlx.module("kernels.x86.token"), "LARGE", large)
    spec, tokens = COMMON[kind], TOKENS[:batch]
    assert step_of(mlx, spec) is not None
    values = {name: value.astype(np.float64) for name, value in weights_of(spec).items()}
    expected = forward(spec, values, tokens, inference=True)[0]
    model = mlx.backend().build(spec, weights_of(spec))
    _, caches = model.prefill(tokens[:, :PROMPT], LENGTH)
    for place in range(PROMPT, LENGTH):
        logits, caches = model.decode(tokens[:, place], caches)
        assert_close(logits, expected[:, place], FLOAT32, f"after {place + 1} tokens")


@pytest.mark.parametrize("kind", OTHER)
def test_other_models_keep_the_graph(mlx, kind):
    assert step_of(mlx, OTHER[kind]) is None


def test_stored_bfloat16_keeps_the_graph(mlx):
    assert step_of(mlx, COMMON["plain"], "bfloat16") is None


def test_only_spent_caches_are_written(mlx):
    spec = COMMON["plain"]
    model, step = mlx.backend().build(spec, weights_of(spec)), step_of(mlx, spec)
    _, caches = model.prefill(TOKENS[:, :PROMPT], LENGTH)
    before = [np.array(array) for cache in caches.layers for array in cache[:2]]
    step(TOKENS[:, PROMPT], caches)
    kept = [array for cache in caches.layers for array in cache[:2]]
    assert all(np.array_equal(*pair) for pair in zip(before, kept, strict=True))
    _, extended = step(TOKENS[:, PROMPT], caches._replace(spent=True))
    assert [array for cache in extended.layers for array in cache[:2]] == kept
    assert not any(np.array_equal(*pair) for pair in zip(before, kept, strict=True))


def test_a_token_after_a_training_step_is_of_the_new_parameters(mlx):
    spec = COMMON["plain"]
    model = mlx.backend().build(spec, weights_of(spec))
    model.decode(TOKENS[:, PROMPT], model.prefill(TOKENS[:, :PROMPT], LENGTH)[1])
    model.start_training(AdamWConfig(learning_rate=0.1))
    model.train_step(TOKENS[None], 0.1, micro_batch_keys(0, 0, 1)).fetch()
    found, _ = model.decode(TOKENS[:, PROMPT], model.prefill(TOKENS[:, :PROMPT], LENGTH)[1])
    assert_close(found, model.forward(TOKENS[:, : PROMPT + 1], inference=True).logits[:, -1], FLOAT32)


@pytest.mark.parametrize("adapter", [None, AdapterSpec(rank=2)], ids=["plain", "adapter"])
@pytest.mark.parametrize("head", [TiedHeadSpec(), UntiedHeadSpec()], ids=["tied", "untied"])
@pytest.mark.parametrize("large", [1, 2**21], ids=["all cores", "one core"])
def test_codes_give_the_logits_of_the_graph(mlx, monkeypatch, head, large, adapter):
    token = mlx.module("kernels.x86.token")
    monkeypatch.setattr(token, "LARGE", large)
    sizes = {"embed_dim": 32, "head": head, "adapter": adapter}
    spec = model_of({"num_heads": 4, "head_dim": 8}, {"experts": GatedFeedForwardSpec(hidden_dim=32)}, **sizes)
    model = mlx.backend().build(spec, quantized_weights(weights_of(spec), QuantizationFormat("affine", 4, 32)))
    step = token.token_step(spec, model._named(), model._codes())
    _, caches = model.prefill(TOKENS[:, :PROMPT], LENGTH)
    found, _ = step(TOKENS[:, PROMPT], caches)
    expected, _ = model._extended(mlx.array(TOKENS[:, PROMPT : PROMPT + 1]), caches)
    assert_close(mlx.numpy(found), mlx.numpy(expected), FLOAT32)
