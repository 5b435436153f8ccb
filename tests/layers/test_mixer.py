"""The choice of a layer's mixer: each kind of the spec has a module on both backends, and sees what it shares."""

from typing import get_args

import numpy as np

from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.mixer import mix
from moezoo.core.spec import (
    CompressedAttentionSpec,
    GatedDeltaAttentionSpec,
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LatentAttentionSpec,
    LayerSpec,
    LightningAttentionSpec,
    Mamba2Spec,
    MambaSpec,
    MixerSpec,
    ModelSpec,
    ShortConvolutionSpec,
)
from tests.support.tolerances import FLOAT32, assert_close
from tests.support.twins import B, D, F, H, M, N, T, Twin, V, normal

SHARED = GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H, keys_of_layer=0)
LATENT = LatentAttentionSpec(num_heads=N, latent_dim=H, head_dim=H, rope_head_dim=H, value_head_dim=H)
SPECS = (
    GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H),
    GatedDeltaAttentionSpec(num_key_heads=M, num_value_heads=N, key_head_dim=H, value_head_dim=H),
    LATENT,
    CompressedAttentionSpec(
        num_heads=N,
        head_dim=H,
        rope_head_dim=H,
        query_latent_dim=D,
        output_groups=M,
        output_latent_dim=F,
        window=2,
    ),
    ShortConvolutionSpec(conv_width=3),
    Mamba2Spec(num_heads=N, head_dim=H, state_dim=H),
    MambaSpec(inner_dim=F, state_dim=H, step_rank=M),
    LightningAttentionSpec(num_heads=N, head_dim=H),
)


def test_every_kind_has_its_own_module(twin: Twin):
    assert {type(spec) for spec in SPECS} == set(get_args(MixerSpec))
    layers = tuple(LayerSpec(attention=spec, feed_forward=GatedFeedForwardSpec(hidden_dim=F)) for spec in SPECS)
    weights = twin.weights(initial_weights(ModelSpec(vocab_size=V, embed_dim=D, layers=layers), seed=0))
    mixer = twin.module("mixer").mixer
    modules = {type(mixer(spec, weights.inside(f"layers.{at}.attention"), at)) for at, spec in enumerate(SPECS)}
    assert len(modules) == len(SPECS)


def test_a_layer_without_keys_attends_to_those_of_the_layer_it_names(twin: Twin):
    values = {"w_query": normal(1, D, N, H), "w_output": normal(2, N, H, D)}
    x_BTD, key_BSMH, value_BSMH = normal(3, B, T, D), normal(4, B, T, M, H), normal(5, B, T, M, H)
    expected = mix(SHARED, values, x_BTD, None, {0: (key_BSMH, value_BSMH)}, None).out_BTD
    module, source = twin.module("mixer"), twin.module("kv_cache").Source
    shared = source(twin.array(key_BSMH), twin.array(value_BSMH), twin.array(range(T)))
    block = module.mixer(SHARED, twin.weights(values), 1)
    mixed = twin.compiled_function(lambda x, shared: module.mix(SHARED, block, x, sources={0: shared, 1: None}).out_BTD)
    found = mixed(twin.array(x_BTD), shared)
    assert_close(twin.numpy(found), expected, FLOAT32)


def test_a_layer_without_an_indexer_attends_to_the_tokens_chosen_in_the_layer_it_names(twin: Twin):
    spec = LATENT.model_copy(update={"indexer_of_layer": 0})
    layer = LayerSpec(attention=LATENT, feed_forward=GatedFeedForwardSpec(hidden_dim=F))
    every = initial_weights(ModelSpec(vocab_size=V, embed_dim=D, layers=(layer,)), seed=0)
    start = "layers.0.attention."
    values = {name.removeprefix(start): 10 * value for name, value in every.items() if name.startswith(start)}
    x_BTD, chosen_BTS = normal(3, B, T, D), np.broadcast_to(np.eye(T, dtype=bool), (B, T, T))
    expected = mix(spec, values, x_BTD, None, {0: chosen_BTS}, None).out_BTD
    module = twin.module("mixer")
    block = module.mixer(spec, twin.weights(values), 1)
    mixed = twin.compiled_function(lambda x, chosen: module.mix(spec, block, x, sources={0: chosen}))
    found = mixed(twin.array(x_BTD), twin.array(chosen_BTS))
    assert_close(twin.numpy(found.out_BTD), expected, FLOAT32)
    assert found.source is None
    assert not np.allclose(expected, mix(LATENT, values, x_BTD, None, {}, None).out_BTD)
