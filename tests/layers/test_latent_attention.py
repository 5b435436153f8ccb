import math

import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.latent_attention import latent_attention
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import (
    GatedFeedForwardSpec,
    IndexerSpec,
    LatentAttentionSpec,
    LayerNormSpec,
    LayerSpec,
    ModelSpec,
    NoPositionSpec,
    PrecisionSpec,
    RMSNormSpec,
    RoPESpec,
    TemperatureTuningSpec,
)
from tests.layers.pieces import assert_pieces_match
from tests.support.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, FLOAT64, assert_close
from tests.support.twins import B, D, H, N, T, Twin, V, assert_layer_matches, assert_reference_gradient, normal

ROPE, VALUE, Z, QUERY = 4, 5, 10, 9
INDEXER = IndexerSpec(num_heads=3, head_dim=7, top_k=3)


def spec_of(rope_head_dim: int = ROPE, **fields) -> LatentAttentionSpec:
    return LatentAttentionSpec(
        num_heads=N, head_dim=H, rope_head_dim=rope_head_dim, value_head_dim=VALUE, latent_dim=Z, **fields
    )


SPECS = {
    "latent": spec_of(),
    "low-rank queries": spec_of(query_latent_dim=QUERY, norm=RMSNormSpec(epsilon=1e-3), scale=0.5),
    "no position": spec_of(position=NoPositionSpec(), norm=LayerNormSpec()),
    "no rotated features": spec_of(0, position=NoPositionSpec(), query_latent_dim=QUERY, bias=True),
    "no rotated features in a window": spec_of(0, position=NoPositionSpec(), window=3),
    "half split": spec_of(position=RoPESpec(base=100)),
    "biases": spec_of(query_latent_dim=QUERY, bias=True, latent_multiplier=1.5),
    "biases of the input": spec_of(
        bias=True, temperature_tuning=TemperatureTuningSpec(floor_length=2, scale=0.7, first=0)
    ),
    "window": spec_of(query_latent_dim=QUERY, window=3, latent_multiplier=1.5),
    "gate and norm of the rotated key": spec_of(gate="headwise", rope_key_norm=True, norm=RMSNormSpec(epsilon=1e-3)),
    "gate": spec_of(query_gate=True),
    "gate of each feature, and sinks": spec_of(gate="elementwise", sinks=True),
    "sinks beside chosen positions": spec_of(sinks=True, indexer=INDEXER.model_copy(update={"rotated": "last"})),
    "raw latent of queries": spec_of(
        query_latent_dim=QUERY, bias=True, raw_query_latent=True, query_gate=True, indexer=INDEXER
    ),
    "indexer": spec_of(query_latent_dim=QUERY, indexer=INDEXER),
    "indexer of pools": spec_of(
        0,
        position=NoPositionSpec(),
        query_latent_dim=QUERY,
        indexer=INDEXER.model_copy(update={"top_k": 4, "pool_size": 2}),
    ),
    "indexer of rotated pools": spec_of(indexer=INDEXER.model_copy(update={"pool_size": 3})),
    "indexer of the input": spec_of(
        position=NoPositionSpec(), indexer=INDEXER.model_copy(update={"key_norm": RMSNormSpec(scale="none")})
    ),
}
X_BTD = normal(0, B, T, D)
LENGTH = 11
LONG_BTD = normal(0, B, LENGTH, D)


def values_of(spec: LatentAttentionSpec) -> dict[str, np.ndarray]:
    source = D if spec.query_latent_dim is None else QUERY
    seen = spec.query_source_dim or D
    shapes = {
        "w_query": (seen, N, H + spec.rope_head_dim),
        "w_latent": (D, Z),
        "w_rope_key": (D, spec.rope_head_dim),
        "w_key": (Z, N, H),
        "w_value": (Z, N, VALUE),
        "w_output": (N, VALUE, D),
        "latent_norm.scale": (Z,),
    }
    if spec.query_latent_dim is not None:
        shapes |= {"w_query_down": (D, QUERY), "query_norm.scale": (QUERY,)}
    if spec.rope_key_norm:
        shapes["rope_key_norm.scale"] = (ROPE,)
    if spec.gate is not None:
        shapes["w_gate"] = (D, N) if spec.gate == "headwise" else (D, N, VALUE)
    if spec.sinks:
        shapes["sink"] = (N,)
    if spec.query_gate:
        shapes["w_query_gate"] = (seen, N, VALUE)
    if isinstance(spec.norm, LayerNormSpec):
        shapes["latent_norm.bias"] = (Z,)
    if spec.bias:
        shapes |= {"b_latent": (Z,), "b_rope_key": (spec.rope_head_dim,), "b_output": (D,)}
        shapes |= {} if spec.query_latent_dim is None else {"b_query_down": (QUERY,)}
    if spec.indexer is not None:
        heads, head_dim = spec.indexer.num_heads, spec.indexer.head_dim
        shapes |= {
            "indexer.w_query": (source, heads, head_dim),
            "indexer.w_key": (D, head_dim),
            "indexer.w_weight": (D, heads),
        }
        if spec.indexer.pool_size is not None:
            shapes |= {"indexer.w_gate": (D, head_dim), "indexer.position_bias": (spec.indexer.pool_size, head_dim)}
        if isinstance(spec.indexer.key_norm, LayerNormSpec):
            shapes |= {"indexer.key_norm.scale": (head_dim,), "indexer.key_norm.bias": (head_dim,)}
    return {name: 0.3 * normal(seed, *shape) for seed, (name, shape) in enumerate(shapes.items(), 1) if 0 not in shape}


def layer_of(twin: Twin, spec: LatentAttentionSpec):
    return twin.module("latent_attention").LatentAttention(spec, twin.weights(values_of(spec)), 0)


def everything(attended):
    """Return output and index loss in one array, so that values and gradients of both are compared."""
    return attended.out_BTD if attended.index_loss is None else attended.out_BTD + attended.index_loss


def output(twin: Twin, spec: LatentAttentionSpec, x_BTD) -> np.ndarray:
    return twin.numpy(twin.compiled(layer_of(twin, spec))(twin.array(x_BTD)).out_BTD)


def cache_of(twin: Twin, spec: LatentAttentionSpec, precision: str = "float32"):
    layer = LayerSpec(attention=spec, feed_forward=GatedFeedForwardSpec(hidden_dim=4))
    model = ModelSpec(vocab_size=V, embed_dim=D, layers=(layer,), precision=PrecisionSpec(compute=precision))
    return twin.module("kv_cache").empty_cache(model, B, LENGTH + 2)[0]


@pytest.mark.parametrize("kind", SPECS)
def test_value_and_gradients_match_the_reference(twin, kind):
    spec = SPECS[kind]
    assert_layer_matches(
        twin,
        layer_of(twin, spec),
        lambda layer, x: everything(layer(x)),
        lambda values, x: everything(latent_attention(spec, values, x)),
        values_of(spec),
        X_BTD,
    )


@pytest.mark.parametrize("kind", SPECS)
def test_absorbed_form_equals_the_expanded_one(kind):
    spec = SPECS[kind]
    expanded, absorbed = (latent_attention(spec, values_of(spec), X_BTD, absorbed=each) for each in (False, True))
    assert_close(absorbed.out_BTD, expanded.out_BTD, FLOAT64)
    if spec.indexer is not None:
        assert_close(absorbed.index_loss, expanded.index_loss, FLOAT64)


@pytest.mark.parametrize("first", [None, (3, 0, 5)], ids=["equal", "ragged"])
@pytest.mark.parametrize(
    "kind",
    [
        *("latent", "no position", "no rotated features in a window", "window", "gate and norm of the rotated key"),
        *("indexer", "indexer of pools", "indexer of rotated pools", "raw latent of queries"),
    ],
)
def test_cached_chunks_equal_the_uncached_pass(twin, kind, first):
    """Prompts of several tokens, then single tokens, from cached latents alone."""
    spec = SPECS[kind]

    def alone(x_BTD):
        return latent_attention(spec, values_of(spec), x_BTD).out_BTD

    layer, cache = layer_of(twin, spec), cache_of(twin, spec)
    assert_pieces_match(twin, layer, cache, alone, (4, 1, 1, 4, 1), first, LONG_BTD)
    attended = twin.compiled(layer)(twin.array(LONG_BTD[:, :4]), cache_of(twin, spec))
    assert attended.value_BTMH is None
    assert attended.index_loss is None


@pytest.mark.parametrize("kind", ["latent", "indexer", "no rotated features", "indexer of pools"])
def test_cache_stores_one_latent_and_one_key_per_token_for_any_number_of_heads(twin, kind):
    spec = SPECS[kind]
    cache = cache_of(twin, spec)
    sizes = [math.prod(part.shape) / (B * (LENGTH + 2)) for part in cache if getattr(part, "ndim", 0) == 3]
    assert sum(sizes) == Z + spec.rope_head_dim + (0 if spec.indexer is None else spec.indexer.cached_dim)


def test_cache_of_a_window_keeps_no_more_tokens_than_it_reaches(twin):
    cache = cache_of(twin, SPECS["window"])
    assert [tuple(part.shape) for part in cache[:2]] == [(B, 3, 1, ROPE), (B, 3, 1, Z)]


def test_decoding_with_latent_and_sparse_layers_equals_the_uncached_pass(twin):
    """A prompt of 17 tokens, which JAX pads, then single ones; the third layer shares the choice of the second."""
    kinds = (SPECS["window"], SPECS["indexer"], spec_of(indexer_of_layer=1), SPECS["latent"])
    layers = tuple(LayerSpec(attention=kind, feed_forward=GatedFeedForwardSpec(hidden_dim=4)) for kind in kinds)
    model = ModelSpec(vocab_size=V, embed_dim=D, layers=layers)
    weights = {name: 5 * value for name, value in initial_weights(model, seed=0).items()}
    tokens = np.random.default_rng(0).integers(0, V, (B, 19)).astype(np.int32)
    expected = forward(model, {name: value.astype(np.float64) for name, value in weights.items()}, tokens).logits_BTV
    built = twin.backend().build(model, weights)
    logits, cache = built.prefill(tokens[:, :17], 19)
    assert_close(logits, expected[:, 16], FLOAT32)
    for t in (17, 18):
        logits, cache = built.decode(tokens[:, t], cache)
        assert_close(logits, expected[:, t], FLOAT32)


def test_bfloat16_is_near_float32(twin):
    spec = SPECS["low-rank queries"]
    assert_layer_matches(
        twin,
        layer_of(twin, spec),
        lambda layer, x: everything(layer(x)),
        lambda values, x: everything(latent_attention(spec, values, x)),
        values_of(spec),
        X_BTD,
        dtype="bfloat16",
        tolerance=BFLOAT16,
        gradient_tolerance=BFLOAT16_GRADIENT,
    )


def test_bfloat16_cache_is_near_float32(twin):
    spec = SPECS["latent"]
    expected = latent_attention(spec, values_of(spec), LONG_BTD).out_BTD
    layer, cache = twin.compiled(layer_of(twin, spec)), cache_of(twin, spec, "bfloat16")
    out, cache = layer(twin.array(LONG_BTD[:, :6], "bfloat16"), cache)[:2]
    assert "bfloat16" in str(cache.latent_BSZ.dtype)
    assert "bfloat16" in str(out.dtype)
    assert_close(twin.numpy(out), expected[:, :6], BFLOAT16)
    out = layer(twin.array(LONG_BTD[:, 6:7], "bfloat16"), cache).out_BTD
    assert_close(twin.numpy(out), expected[:, 6:7], BFLOAT16)


def test_one_head_written_out(twin):
    """Keys and values are expanded from the latent for each head, as in plain attention."""
    spec = SPECS["no position"].model_copy(update={"norm": RMSNormSpec(scale="none", epsilon=1e-9)})
    values = values_of(spec)
    latent = X_BTD @ values["w_latent"]
    latent = latent / np.sqrt(np.mean(latent**2, axis=-1, keepdims=True))
    expected = np.zeros((B, T, D))
    for b in range(B):
        for n in range(N):
            key = np.concatenate([latent[b] @ values["w_key"][:, n], X_BTD[b] @ values["w_rope_key"]], axis=-1)
            query, value = X_BTD[b] @ values["w_query"][:, n], latent[b] @ values["w_value"][:, n]
            for t in range(T):
                weight = np.exp(key[: t + 1] @ query[t] / math.sqrt(H + ROPE))
                expected[b, t] += weight @ value[: t + 1] / weight.sum() @ values["w_output"][n]
    assert_close(output(twin, spec, X_BTD), expected, FLOAT32)


def test_a_multiplier_of_the_latent_equals_one_of_its_norm_scale(twin):
    """So it is in the cache too, which stores the latent from which keys and values are computed."""
    spec, values = SPECS["biases"], values_of(SPECS["biases"])
    values["latent_norm.scale"] = spec.latent_multiplier * values["latent_norm.scale"]
    plain = spec.model_copy(update={"latent_multiplier": 1.0})
    assert_close(output(twin, spec, X_BTD), latent_attention(plain, values, X_BTD).out_BTD, FLOAT32)


def test_a_window_is_that_of_grouped_query_attention_and_a_large_gate_is_open(twin):
    """With one token in the window every head returns its own value; sigmoid(0) halves it."""
    values = values_of(spec_of(window=1, gate="headwise"))
    latent = X_BTD @ values["w_latent"]
    latent = values["latent_norm.scale"] * latent / np.sqrt(np.mean(latent**2, axis=-1, keepdims=True) + 1e-6)
    own = np.einsum("BTZ,ZNH,NHD->BTD", latent, values["w_value"], values["w_output"])
    halved = values | {"w_gate": 0 * values["w_gate"]}
    assert_close(latent_attention(spec_of(window=1), values, X_BTD).out_BTD, own, FLOAT64)
    spec = spec_of(window=1, gate="headwise")
    layer = twin.module("latent_attention").LatentAttention(spec, twin.weights(halved), 0)
    assert_close(twin.numpy(twin.compiled(layer)(twin.array(X_BTD)).out_BTD), own / 2, FLOAT32)


@pytest.mark.parametrize("first", [0, 1])
def test_temperature_acts_on_both_parts_of_a_query_and_counts_from_first(twin, first):
    """Queries are doubled from the first step on, where floor((t + first) / 3) = 1."""
    tuning = TemperatureTuningSpec(floor_length=3, scale=1 / math.log(2), first=first)
    spec = spec_of(temperature_tuning=tuning)
    values = values_of(spec)
    factor_T, found_BTD = np.where(np.arange(T) + first < 3, 1.0, 2.0), output(twin, spec, X_BTD)
    for t in range(T):
        sharper = values | {"w_query": factor_T[t] * values["w_query"]}
        plain = latent_attention(SPECS["latent"], sharper, X_BTD).out_BTD[:, t]
        assert_close(found_BTD[:, t], plain, FLOAT32)


@pytest.mark.parametrize("kind", ["latent", "indexer"])
def test_later_tokens_are_invisible_to_earlier_ones(twin, kind):
    changed = LONG_BTD.copy()
    changed[:, 6:] = 3 * normal(21, B, LENGTH - 6, D)
    before, after = output(twin, SPECS[kind], LONG_BTD), output(twin, SPECS[kind], changed)
    assert_close(after[:, :6], before[:, :6], FLOAT32)
    assert np.max(np.abs(after[:, 6:] - before[:, 6:])) > 1e-2


def test_an_indexer_that_chooses_every_position_changes_nothing(twin):
    dense = spec_of(query_latent_dim=QUERY)
    sparse = SPECS["indexer"].model_copy(update={"indexer": INDEXER.model_copy(update={"top_k": LENGTH})})
    layer = twin.module("latent_attention").LatentAttention(dense, twin.weights(values_of(SPECS["indexer"])), 0)
    expected = twin.numpy(twin.compiled(layer)(twin.array(LONG_BTD)).out_BTD)
    assert_close(output(twin, sparse, LONG_BTD), expected, FLOAT32)
    assert np.max(np.abs(output(twin, SPECS["indexer"], LONG_BTD) - expected)) > 1e-2


@pytest.mark.parametrize(
    "kind",
    ["low-rank queries", "no position", "no rotated features", "window", "gate and norm of the rotated key"],
)
def test_reference_gradient_agrees_with_finite_differences(kind):
    spec = SPECS[kind]
    values = values_of(spec)
    names = ("w_latent", "w_rope_key", "w_key", "w_value", "w_gate", "rope_key_norm.scale")
    names = tuple(name for name in names if name in values)
    assert_reference_gradient(
        lambda x, *some: latent_attention(spec, values | dict(zip(names, some, strict=True)), x).out_BTD,
        X_BTD[:1, :3],
        *(values[name] for name in names),
    )


def test_indexer_learns_from_its_loss_alone_and_the_rest_of_the_layer_from_the_output_alone(twin):
    spec = SPECS["indexer"]
    for call, learns in (
        (lambda layer, x: layer(x).out_BTD, lambda name: not name.startswith("indexer")),
        (lambda layer, x: layer(x).index_loss + 0 * x, lambda name: name.startswith("indexer")),
    ):
        layer, x = layer_of(twin, spec), twin.array(X_BTD)
        _, named, (of_x,) = twin.value_and_gradients(call, normal(99, B, T, D), layer, x)
        assert {name for name, value in named.items() if np.any(value)} == set(filter(learns, named))
        assert np.any(of_x) == learns("w_query")


def test_odd_width_of_a_rotated_head_is_refused():
    fields = {"num_heads": 2, "head_dim": 6, "rope_head_dim": 3, "value_head_dim": 5, "latent_dim": 8}
    with pytest.raises(SpecError, match=r"rope_head_dim is 3, but RoPE rotates pairs.*Use an even number"):
        validate(LatentAttentionSpec, fields, "config")
