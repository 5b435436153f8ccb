"""Descriptions of model parts in words; defaults are left out."""

import pytest

from moezoo.core.config.validate import validate
from moezoo.core.reports.model_words import attention_in_words, feed_forward_in_words, head_in_words, model_in_words
from moezoo.core.spec import ModelSpec

GROUPED = "4 heads of 6, 2 key/value, RoPE 10,000"
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
LATENT = {"kind": "latent", "num_heads": 4, "head_dim": 6, "rope_head_dim": 4, "value_head_dim": 5, "latent_dim": 7}
COMPRESSED = {
    "kind": "compressed",
    "num_heads": 4,
    "head_dim": 6,
    "rope_head_dim": 2,
    "query_latent_dim": 7,
    "output_groups": 2,
    "output_latent_dim": 5,
    "window": 3,
}
INDEXER = {"num_heads": 3, "head_dim": 4, "top_k": 2}
MAMBA2 = {"kind": "mamba2", "num_heads": 4, "head_dim": 5, "state_dim": 3}
DELTA = {"kind": "gated_delta", "num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 3, "value_head_dim": 5}
YARN = {"kind": "yarn", "factor": 4, "original_length": 16}


def spec_of(layer=None, **fields):
    layer = {"attention": HEADS, "feed_forward": {"hidden_dim": 8}} | (layer or {})
    return validate(ModelSpec, {"vocab_size": 5, "embed_dim": 10, "layers": [layer, layer]} | fields, "config")


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        ({}, GROUPED),
        ({"num_kv_heads": 4}, "4 heads of 6, RoPE 10,000"),
        ({"position": {"kind": "none"}, "window": 3}, "4 heads of 6, 2 key/value, no positions, window 3"),
        (
            {"position": {"kind": "rope", "fraction": 0.5, "fraction_of": "pairs"}},
            "4 heads of 6, 2 key/value, RoPE 10,000 on 50% of the pairs",
        ),
        ({"chunk": 3, "temperature_tuning": {}}, GROUPED + ", chunks of 3, temperature by position"),
        (
            {"position": {"kind": "rope", "base": 500, "fraction": 2 / 3, "layout": "interleaved", "scaling": YARN}},
            "4 heads of 6, 2 key/value, RoPE 500 on 67% interleaved, yarn scaling",
        ),
        (
            {"qk_norm": {}, "qk_norm_over": "projection", "qk_norm_after_rotation": True, "scale": 0.5},
            GROUPED + ", qk norm of projections after rotation, scale 0.5",
        ),
        (
            {
                "sinks": True,
                "gate": "headwise",
                "softcap": 2,
                "value_residual": True,
                "qkv_bias": True,
                "output_bias": True,
                "clip": 3,
            },
            GROUPED + ", qkv bias, output bias, clipped to 3.0, sinks, headwise gate, softcap 2.0, value residual",
        ),
        (
            {"value_head_dim": 5, "value_norm": {}, "value_multiplier": 0.7},
            "4 heads of 6, 2 key/value, values of 5, RoPE 10,000, value norm, values times 0.7",
        ),
        ({"values_from_keys": True}, GROUPED + ", values are keys"),
        ({"keys_of_layer": 0}, GROUPED + ", keys and values of layer 0"),
        (LATENT, "4 heads of 6 + 4, values of 5, latent 7, RoPE 10,000 interleaved"),
        (
            LATENT | {"query_latent_dim": 9, "indexer": {"num_heads": 3, "head_dim": 4, "top_k": 2}, "scale": 0.5},
            "4 heads of 6 + 4, values of 5, latent 7, query latent 9, RoPE 10,000 interleaved, indexer top 2, "
            "scale 0.5",
        ),
        (
            LATENT | {"query_latent_dim": 9, "raw_query_latent": True, "query_gate": True},
            "4 heads of 6 + 4, values of 5, latent 7, query latent 9, RoPE 10,000 interleaved, queries of the raw "
            "latent too, gate of the query latent",
        ),
        (
            LATENT | {"indexer_of_layer": 0},
            "4 heads of 6 + 4, values of 5, latent 7, RoPE 10,000 interleaved, tokens chosen in layer 0",
        ),
        (
            LATENT | {"bias": True, "latent_multiplier": 1.5, "temperature_tuning": {}},
            "4 heads of 6 + 4, values of 5, latent 7, RoPE 10,000 interleaved, latent times 1.5, biases, "
            "temperature by position",
        ),
        (
            COMPRESSED,
            "4 heads of 6, 1 key as value, query latent 7, RoPE 10,000 interleaved, window 3, output in 2 groups of 5",
        ),
        (
            COMPRESSED | {"compression": {"ratio": 4}},
            "4 heads of 6, 1 key as value, query latent 7, RoPE 10,000 interleaved, window 3, entries of 4 tokens, "
            "output in 2 groups of 5",
        ),
        (
            COMPRESSED | {"compression": {"ratio": 4, "overlap": True, "indexer": INDEXER}},
            "4 heads of 6, 1 key as value, query latent 7, RoPE 10,000 interleaved, window 3, entries of 4 tokens and "
            "those before, top 2 by an indexer, output in 2 groups of 5",
        ),
        (DELTA, "gated delta, 4 value heads of 5, 2 key heads of 3, convolution of 4"),
        (
            DELTA | {"decay": "channel", "decay_rank": 7, "log_decay_floor": -5, "gate": "sigmoid", "gate_rank": 6},
            "gated delta, 4 value heads of 5, 2 key heads of 3, convolution of 4, decays per channel, "
            "decays of rank 7, log decays above -5.0, gate of rank 6, sigmoid gate",
        ),
        (
            {"kind": "mamba", "inner_dim": 9, "state_dim": 4, "step_rank": 2, "norm": {}, "bias": True},
            "Mamba, 9 channels, state of 4, steps of rank 2, convolution of 4, norms, biases",
        ),
        (
            {"kind": "lightning", "num_heads": 4, "head_dim": 5, "decay_scale": 0.5},
            "lightning, 4 heads of 5, decays times 0.5",
        ),
        (
            {"indexer": {"num_heads": 2, "head_dim": 6, "top_k": 5, "block_size": 3}},
            "4 heads of 6, 2 key/value, RoPE 10,000, indexer top 5 blocks of 3",
        ),
        (
            {"indexer": {"num_heads": 2, "head_dim": 6, "top_k": 5, "block_size": 3, "pooled": "scores"}},
            "4 heads of 6, 2 key/value, RoPE 10,000, indexer top 5 blocks of 3 for each key/value head",
        ),
        ({"kind": "none"}, "no attention"),
        (MAMBA2, "Mamba-2, 4 heads of 5, state of 3, convolution of 4"),
        (
            MAMBA2 | {"num_groups": 2, "bias": True},
            "Mamba-2, 4 heads of 5, state of 3, 2 groups, convolution of 4, biases",
        ),
        (
            {"convolution": {"mix_width": 3}, "qk_norm": {}, "key_temperature": True},
            "4 heads of 6, 2 key/value, RoPE 10,000, qk norm, convolutions of 2 and 3, temperature of keys",
        ),
        ({"kind": "short_convolution"}, "short convolution of 3"),
        ({"kind": "short_convolution", "conv_width": 4, "bias": True}, "short convolution of 4, biases"),
    ],
)
def test_attention(attention, words):
    attention = attention if "kind" in attention else HEADS | attention
    indexed = LATENT | {"indexer": {"num_heads": 1, "head_dim": 4, "top_k": 2}}
    other = {"keys_of_layer": HEADS, "indexer_of_layer": indexed}
    alone = next((other[name] for name in other if name in attention), attention)
    first = {"attention": alone, "feed_forward": {"hidden_dim": 8}}
    spec = spec_of(layers=[first, first | {"attention": attention}])
    assert attention_in_words(spec.layers[1].attention) == words


@pytest.mark.parametrize(
    ("head", "words"),
    [({"kind": "tied"}, "tied"), ({"kind": "untied"}, "untied"), ({"kind": "untied", "bias": True}, "untied, biased")],
)
def test_head(head, words):
    assert head_in_words(spec_of(head=head).head) == words


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_dim": 8}, "SwiGLU 8"),
        ({"kind": "gelu", "hidden_dim": 8, "bias": True}, "GELU 8 with biases"),
        ({"hidden_dim": 8, "limit": 7.0}, "SwiGLU 8 at most 7"),
        ({"kind": "relu", "hidden_dim": 8}, "ReLU 8"),
        ({"kind": "silu", "hidden_dim": 1}, "SiLU 1"),
        ({"kind": "relu_squared", "hidden_dim": 8}, "ReLU-squared 8"),
        ({"kind": "relu_squared_glu", "hidden_dim": 8}, "ReLU-squared GLU 8"),
        ({"kind": "exact_geglu", "hidden_dim": 8}, "exact GeGLU 8"),
        ({"kind": "reglu", "hidden_dim": 8}, "ReGLU 8"),
        ({"kind": "clamped_swiglu", "hidden_dim": 8}, "clamped SwiGLU 8"),
        ({"kind": "clamped_swiglu", "hidden_dim": 8, "bias": False}, "clamped SwiGLU 8 without biases"),
    ],
)
def test_dense_feed_forward_and_norm_placement(fields, words):
    assert feed_forward_in_words(spec_of({"feed_forward": fields}).layers[0]) == words
    sandwich = spec_of({"feed_forward": fields, "norm_placement": "sandwich"}).layers[0]
    assert feed_forward_in_words(sandwich) == f"{words}; sandwich norms"
    scaled = spec_of({"feed_forward": fields, "output_scale": True}).layers[0]
    assert feed_forward_in_words(scaled) == f"{words}; output scaled"
    factors = {"attention_factors": {"stream": 3.5}, "norm_placement": "stream"}
    weighted = spec_of({"feed_forward": fields} | factors).layers[0]
    assert feed_forward_in_words(weighted) == f"{words}; stream norms; stream times 3.5, attention times 1"


def test_a_router_over_heads_is_described_where_the_feed_forward_would_be():
    router = {"router": {"top_k": 2}, "losses": [{"kind": "pooled_balance", "coefficient": 0.01}]}
    heads = {"num_heads": 10, "num_kv_heads": 2, "head_dim": 4}
    spec = spec_of(layers=[{"attention": heads, "mixer_only": True, "head_router": router}])
    words = "no feed-forward; 2 of 5 query heads per key; softmax, renormalized; pooled_balance 0.01"
    assert feed_forward_in_words(spec.layers[0]) == words


def test_shortcut_layer_names_both_feed_forwards():
    moe = {"num_experts": 3, "router": {"top_k": 2}, "experts": {"hidden_dim": 4}}
    both = {"attention": HEADS, "feed_forward": {"hidden_dim": 8}, "moe": moe, "shortcut": True}
    spec = spec_of(layers=[both, {"attention": HEADS, "feed_forward": {"hidden_dim": 8}}])
    words = "SwiGLU 8; into the next layer: 2 of 3 experts, SwiGLU 4; softmax, renormalized; dropless"
    assert feed_forward_in_words(spec.layers[0]) == words


@pytest.mark.parametrize(
    ("router", "moe", "words"),
    [
        ({}, {}, "2 of 6 experts, SwiGLU 8; softmax, renormalized; dropless"),
        (
            {"product_keys": True},
            {"num_experts": 9},
            "2 of 9 experts, SwiGLU 8; softmax, by product keys, renormalized; dropless",
        ),
        (
            {"renormalize": "none", "choice": {"kind": "expert_choice"}},
            {"losses": [{"kind": "router_z", "coefficient": 0.001}]},
            "on average 2 (experts choose tokens) of 6 experts, SwiGLU 8; softmax; dropless; router_z 0.001",
        ),
        (
            {"choice": {"kind": "grouped_top_k", "num_groups": 3, "keep": 2}, "score": "sigmoid", "selection_bias": {}},
            {"dispatch": {"kind": "capacity", "factor": 1.25, "priority": "score"}},
            "2 (in 2 of 3 groups) of 6 experts, SwiGLU 8; sigmoid, with a selection bias, renormalized; capacity 1.25 "
            "by score",
        ),
        (
            {},
            {"dispatch": {"kind": "capacity", "factor": 2, "group": "sequence"}},
            "2 of 6 experts, SwiGLU 8; softmax, renormalized; capacity 2 of a sequence",
        ),
        (
            {
                "choice": {"kind": "top_p", "p": 0.5},
                "temperature": 0.5,
                "softcap": 2,
                "jitter": {"of": "logits", "amount": 0.1},
            },
            {},
            "up to 2 (for 0.5 of the score) of 6 experts, SwiGLU 8; softmax, temperature 0.5, softcap 2.0, "
            "renormalized, logits jitter 0.1; dropless",
        ),
        (
            {
                "choice": {"kind": "noisy_top_k"},
                "weight": "sigmoid_of_chosen",
                "renormalize": "none",
                "apply_to": "input",
            },
            {"latent_dim": 4},
            "2 (noisy top k) of 6 experts, SwiGLU 8; in a latent space of 4; sigmoid of chosen, on the input; dropless",
        ),
        (
            {
                "gating_residual": True,
                "input": "normalized",
                "per_expert_scale": True,
                "scale": 2.5,
                "renormalize": "p_norm",
            },
            {"zero_computation": {"num_zero": 1, "num_constant": 2}, "shared": {"hidden_dim": 4}},
            "2 of 6 experts, SwiGLU 8; 1 zero, 0 copy, 2 constant; 1 shared, SwiGLU 4; softmax, of a normalized input, "
            "with a gating residual, renormalized by p-norm, times 2.5, times a scale per expert; dropless",
        ),
        (
            {"mlp": {"hidden_dim": 3, "depth_average": True}},
            {},
            "2 of 6 experts, SwiGLU 8; softmax, of an MLP 3, averaged over depth, renormalized; dropless",
        ),
        (
            {"bias": True, "dtype": "compute"},
            {"shared": {"kind": "parallel", "feed_forward": {"kind": "geglu", "hidden_dim": 4}}},
            "2 of 6 experts, SwiGLU 8; GeGLU 4 in parallel; softmax, with a bias, renormalized, in the compute dtype; "
            "dropless",
        ),
        (
            {},
            {"shared": {"kind": "sigmoid_gated", "num_experts": 2, "hidden_dim": 4}},
            "2 of 6 experts, SwiGLU 8; 2 shared, SwiGLU 4, sigmoid gated; softmax, renormalized; dropless",
        ),
    ],
)
def test_moe_layer(router, moe, words):
    moe = {"num_experts": 6, "router": {"top_k": 2} | router, "experts": {"hidden_dim": 8}} | moe
    assert feed_forward_in_words(spec_of({"feed_forward": None, "moe": moe}).layers[0]) == words


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ""),
        ({"norm": {"epsilon": 1e-3}}, ""),
        ({"layer_inputs": {"dim": 3}}, "inputs of 3 for each layer"),
        ({"position": {"kind": "learned", "max_length": 64}}, "learned positions for 64 tokens"),
        ({"position": {"kind": "sinusoidal"}, "norm": {"kind": "layer"}}, "sinusoidal positions, layer norm"),
        ({"norm": {"scale": "zero_centred"}, "dropout": 0.1}, "zero-centred RMS norm, dropout 10%"),
        ({"residual": {"kind": "depth_scaled"}}, "depth-scaled residual"),
        ({"residual": {"kind": "hyper_connections"}}, "4 residual streams, mixed"),
        (
            {"residual": {"kind": "hyper_connections", "final_read": "mean"}},
            "4 residual streams, mixed, averaged at the end",
        ),
        ({"residual": {"kind": "gated_streams", "rank": 5}}, "4 residual streams, gated at rank 5"),
        ({"norm": {"kind": "layer", "bias": False}, "softcap": 30}, "layer norm without bias, softcap 30.0"),
        (
            {"norm": {"scale": "none"}, "multipliers": {"embedding": 12, "logits": 0.25}},
            "RMS norm without scale, embedding times 12, logits times 0.25",
        ),
    ],
)
def test_model_wide_parts(fields, words):
    assert model_in_words(spec_of(**fields)) == words
