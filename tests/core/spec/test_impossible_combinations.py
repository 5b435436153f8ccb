"""Impossible combinations of values: each is rejected with a one-line error that says where, what, why, and the fix.

A test checks that every `impossible(...)` in the spec and the config has a case here.
"""

import ast
import importlib
import sys

import pytest
import yaml

from moezoo.core.config.run_config import parse_config
from moezoo.core.errors import SpecError
from tests.support.source_tree import PACKAGE, tree_of

MODULES = (
    "config.data",
    "config.optimizers",
    "config.run_config",
    "config.training",
    "distributed.mesh",
    "spec.adapter",
    "spec.attention",
    "spec.compressed_attention",
    "spec.indexer",
    "spec.layer",
    "spec.model",
    "spec.moe",
    "spec.ngram_embeddings",
    "spec.positions",
    "spec.residual",
    "spec.routing",
    "spec.shared_experts",
    "spec.state_space",
)

# --- a config with 4 heads, 6 experts and 2 layers, and changes to it ------------------------------------------------

HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
LATENT = {
    "kind": "latent",
    "num_heads": 4,
    "head_dim": 6,
    "rope_head_dim": 4,
    "value_head_dim": 5,
    "latent_dim": 7,
}
INDEXED = LATENT | {"indexer": {"num_heads": 1, "head_dim": 4, "top_k": 3}}
COMPRESSED = {
    "kind": "compressed",
    "num_heads": 4,
    "head_dim": 6,
    "rope_head_dim": 4,
    "query_latent_dim": 7,
    "output_groups": 2,
    "output_latent_dim": 5,
    "window": 3,
}
NARROW = {"num_heads": 1, "head_dim": 2, "top_k": 3}
DELTA = {"kind": "gated_delta", "num_key_heads": 3, "num_value_heads": 4, "key_head_dim": 5, "value_head_dim": 6}
MAMBA2 = {"kind": "mamba2", "num_heads": 4, "head_dim": 5, "state_dim": 6}
ATTENTION, ROUTER = "model.layers[0].attention", "model.layers[0].moe.router"


def moe_of(router=None, **fields):
    return {"num_experts": 6, "router": {"top_k": 2} | (router or {}), "experts": {"hidden_dim": 8}} | fields


def layer(attention=HEADS, moe=None, **fields):
    return {"attention": attention, "moe": moe_of() if moe is None else moe} | fields


def model(*layers, **fields):
    return {"model": {"embed_dim": 10, "layers": list(layers) or [layer(repeat=2)]} | fields}


def attention(**fields):
    return model(layer(HEADS | fields))


def position(**fields):
    return attention(position={"kind": "rope"} | fields)


def choice(kind, router=None, top_k=2, moe=None, **fields):
    options = {"top_k": top_k, "choice": {"kind": kind} | fields} | (router or {})
    return model(layer(moe=moe_of(options, **(moe or {}))))


def expert_choice(router=None, **fields):
    return choice("expert_choice", {"renormalize": "none"} | (router or {}), moe=fields)


def grouped(top_k=2, **fields):
    return choice("grouped_top_k", top_k=top_k, **({"num_groups": 3, "keep": 2} | fields))


def router(**fields):
    return model(layer(moe=moe_of(fields)))


def losses(*named, router=None, **fields):
    return model(layer(moe=moe_of(router, losses=[{"coefficient": 0.1} | each for each in named], **fields)))


def pooled(second, coefficient=0.1):
    loss = {"kind": "pooled_balance", "coefficient": 0.1}
    second = moe_of() | second | {"losses": [loss | {"coefficient": coefficient}]}
    return model(layer(moe=moe_of(losses=[loss])), layer(moe=second))


PARALLEL = {"kind": "parallel", "feed_forward": {"hidden_dim": 4}}
NOISY = {"choice": {"kind": "noisy_top_k"}}
POOLED = "has pooled_balance, which pools all layers that list it, but"
BLOCKS = {"num_heads": 2, "head_dim": 4, "top_k": 2, "block_size": 3}
NGRAMS = {"dim": 8, "heads": 2, "table_size": 11}
EXPERT_CHOICE_LOSS = "but with choice expert_choice every expert takes equally many tokens (x.yaml). Remove it."
HASH_LOSS = "but with choice hash the token ids alone determine the load (x.yaml). Remove it, or use"

CASES = {
    # attention
    "num_heads not divisible by num_kv_heads": (
        attention(num_kv_heads=3),
        f"{ATTENTION}.num_heads is 4, which is not divisible by num_kv_heads = 3 (x.yaml). Use a multiple of "
        "num_kv_heads.",
    ),
    "window and indexer of latent attention": (
        model(layer(LATENT | {"window": 3, "indexer": {"num_heads": 2, "head_dim": 4, "top_k": 2}})),
        f"{ATTENTION}.window is 3, but an indexer selects the positions (x.yaml). Set only one of them.",
    ),
    "heads that do not divide into output groups": (
        model(layer(COMPRESSED | {"output_groups": 3})),
        f"{ATTENTION}.num_heads is 4, which is not divisible by output_groups = 3 (x.yaml). Use a multiple of "
        "output_groups.",
    ),
    "more rotated features than a head has": (
        model(layer(COMPRESSED | {"rope_head_dim": 8})),
        f"{ATTENTION}.rope_head_dim is 8, but a head has head_dim = 6 features (x.yaml). Use at most 6.",
    ),
    "compressed indexer heads narrower than what they rotate": (
        model(layer(COMPRESSED | {"compression": {"ratio": 2, "indexer": NARROW}})),
        f"{ATTENTION}.compression.indexer.head_dim is 2, but it rotates rope_head_dim = 4 features (x.yaml). Use at "
        "least 4.",
    ),
    "separate inputs behind the block": (
        model(layer(separate_inputs=True, norm_placement="post")),
        "model.layers[0].separate_inputs is true, but there are no queries, keys and values with a projection and a "
        "norm before it each (x.yaml). Use grouped_query attention with norm_placement: pre.",
    ),
    "separate inputs of streams": (
        model(layer(separate_inputs=True), residual={"kind": "scaled"}),
        "model.layers[0].separate_inputs is true, but residual is scaled, of which a block has one input (x.yaml). Use "
        "residual: {kind: block_attention}, or remove it.",
    ),
    "attention over depth beside a shortcut": (
        model(layer(norm_placement="parallel"), residual={"kind": "block_attention"}),
        "model.residual is block_attention, but there are layer_inputs, a shortcut, an output_scale, ngram_embeddings, "
        "or layers without two blocks in a row (x.yaml). Remove one of the two.",
    ),
    "sinks twice": (
        attention(sinks=True, projected_sinks=True),
        f"{ATTENTION}.projected_sinks is true, but sinks is also set (x.yaml). Set only one of them.",
    ),
    "kv_convolution with values_from_keys": (
        attention(kv_convolution={}, values_from_keys=True),
        f"{ATTENTION}.kv_convolution is set, but the layer does not project both keys and values (x.yaml). Remove one "
        "of the two.",
    ),
    "dynamic output_convolution": (
        model(layer(output_convolution={"dynamic": True})),
        "model.layers[0].output_convolution is set, but it is dynamic, and has no heads (x.yaml). Remove one of the "
        "two.",
    ),
    "feed_forward_scale of a MoE layer": (
        model(layer(feed_forward_scale=True)),
        "model.layers[0].feed_forward_scale is true, but there is no dense feed_forward (x.yaml). Remove it.",
    ),
    "sink of a softmax": (
        model(layer(moe=moe_of(shared={"kind": "sink", "hidden_dim": 4}))),
        "model.layers[0].moe.shared is sink, whose scores take part in the renormalization of the experts' own "
        "(x.yaml). Use score: sigmoid or sqrt_softplus, weight: score and renormalize: sum in router.",
    ),
    "a bound of shared experts of the routed ones' kind": (
        model(layer(moe=moe_of(shared={"hidden_dim": 4, "limit": 7.0}))),
        "model.layers[0].moe.shared.limit is 7, but the activation is that of the routed experts (x.yaml). Set "
        "activation: swiglu, or the limit of experts.",
    ),
    "sink with biases": (
        model(layer(moe=moe_of({"score": "sigmoid"}, shared={"kind": "sink", "hidden_dim": 4, "bias": True}))),
        "model.layers[0].moe.shared.bias is true, but with kind sink each shared expert has a weight, and biases are "
        "shared (x.yaml). Use bias: false.",
    ),
    "latent_bias without a latent space": (
        model(layer(moe=moe_of({}, latent_bias=True))),
        "model.layers[0].moe.latent_bias is true, but latent_dim is null (x.yaml). Set latent_dim, or remove it.",
    ),
    "gate_bias without gate": (
        attention(gate_bias="headwise"),
        f"{ATTENTION}.gate is null, but gate_function or gate_bias is set (x.yaml). Use gate: headwise or elementwise, "
        "or remove these options.",
    ),
    "elementwise gate_bias of a headwise gate": (
        attention(gate="headwise", gate_bias="elementwise"),
        f"{ATTENTION}.gate_bias is elementwise, but gate is headwise (x.yaml). Use the same for both.",
    ),
    "n-gram embeddings whose features are not divisible": (
        model(layer(ngram_embeddings=NGRAMS | {"dim": 6})),
        "model.layers[0].ngram_embeddings.dim is 6, which is not divisible by the 4 heads of n = 2 to 3 (x.yaml). Use "
        "a multiple of 4.",
    ),
    "n-gram embeddings with too many heads": (
        model(layer(ngram_embeddings=NGRAMS | {"heads": 3000})),
        "model.layers[0].ngram_embeddings.heads is 3000, 6000 of n = 2 to 3, at index 0 (x.yaml). Use at most 4096 in "
        "all.",
    ),
    "n-gram embeddings with too many rows": (
        model(layer(ngram_embeddings=NGRAMS | {"table_size": 2**30})),
        "model.layers[0].ngram_embeddings.table_size is 1073741824, which makes 4294967330 rows (x.yaml). Use at most "
        "2147483647.",
    ),
    "n-gram embeddings in parts that do not divide the rows": (
        model(layer(ngram_embeddings=NGRAMS | {"parts": 7})),
        "model.layers[0].ngram_embeddings.parts is 7, which does not divide the 60 rows (x.yaml). Use multiple: 7, or "
        "other parts.",
    ),
    "two n-gram embeddings of one index": (
        model(layer(ngram_embeddings=NGRAMS), layer(ngram_embeddings=NGRAMS)),
        "model.layers[1].ngram_embeddings.index is 0, as in layers[0] (x.yaml). Number them from 0 on, in order.",
    ),
    "n-gram embeddings of repeated layers": (
        model(layer(repeat=2, ngram_embeddings=NGRAMS)),
        "model.layers[0].ngram_embeddings.index is 0, as in 2 layers, by repeat (x.yaml). Number them from 0 on, in "
        "order.",
    ),
    "a reset_token beyond the vocabulary": (
        model(layer(ngram_embeddings=NGRAMS | {"reset_token": 9}), vocab_size=9),
        "model.layers[0].ngram_embeddings.reset_token is 9, but vocab_size is 9 (x.yaml). Use a smaller one.",
    ),
    "depth_scaled residual with layer_inputs": (
        model(residual={"kind": "depth_scaled"}, layer_inputs={"dim": 4}),
        "model.residual is depth_scaled, which counts two blocks per layer, but there are layer_inputs, a "
        "shortcut or single blocks (x.yaml). Remove one of the two.",
    ),
    "hyper_connections with parallel blocks": (
        model(layer(norm_placement="parallel"), residual={"kind": "hyper_connections"}),
        "model.residual is hyper_connections, but there are layer_inputs, a shortcut, an output_scale or parallel "
        "blocks, which add to one stream (x.yaml). Remove one of the two.",
    ),
    "gated_streams with a final norm": (
        model(layer(), residual={"kind": "gated_streams", "rank": 3}, final_norm={}),
        "model.final_norm is set, but residual is gated_streams, which normalizes what it reads (x.yaml). Remove one "
        "of the two.",
    ),
    "gated_streams with another norm": (
        model(layer(norm_placement="sandwich"), residual={"kind": "gated_streams", "rank": 3}),
        "model.layers[0].norm_placement is sandwich, but residual is gated_streams, whose streams are normalized as "
        "they are read (x.yaml). Use norm_placement: pre.",
    ),
    "qk_norm_after_rotation without qk_norm": (
        attention(qk_norm_after_rotation=True),
        f"{ATTENTION}.qk_norm is null, but qk_norm_over or qk_norm_after_rotation is set (x.yaml). Add qk_norm: {{}}, "
        "or remove these options.",
    ),
    "qk_norm_over without qk_norm": (
        attention(qk_norm_over="projection"),
        f"{ATTENTION}.qk_norm is null, but qk_norm_over or qk_norm_after_rotation is set (x.yaml). Add qk_norm: {{}}, "
        "or remove these options.",
    ),
    "window with an indexer of blocks": (
        attention(indexer=BLOCKS, window=3),
        f"{ATTENTION}.window is set, but an indexer selects the positions (x.yaml). Set only one of them.",
    ),
    "an indexer of blocks with too few features to rotate": (
        attention(indexer=BLOCKS),
        f"{ATTENTION}.indexer.head_dim is 4, but 6 features are rotated (x.yaml). Use at least 6.",
    ),
    "another number of index heads than of key/value heads": (
        attention(indexer=BLOCKS | {"num_heads": 3, "head_dim": 6, "pooled": "scores"}),
        f"{ATTENTION}.indexer.num_heads is 3, but with pooled: scores each chooses for one of num_kv_heads = 2 "
        "(x.yaml). Use 2.",
    ),
    "local blocks of mean keys": (
        attention(indexer=BLOCKS | {"local_blocks": 1}),
        f"{ATTENTION}.indexer.local_blocks is set, but with pooled: keys the tokens behind the last complete block are "
        "always attended to (x.yaml). Use pooled: scores, or remove local_blocks.",
    ),
    "more local blocks than are chosen": (
        attention(indexer=BLOCKS | {"local_blocks": 3, "pooled": "scores"}),
        f"{ATTENTION}.indexer.local_blocks is 3, but only top_k = 2 blocks are chosen (x.yaml). Use fewer.",
    ),
    "window and chunk": (
        attention(window=3, chunk=4),
        f"{ATTENTION}.chunk is 4, but window is also set to 3 (x.yaml). Set only one of them.",
    ),
    "values_from_keys with another value_head_dim": (
        attention(values_from_keys=True, value_head_dim=5),
        f"{ATTENTION}.value_head_dim is 5, but values_from_keys uses keys of head_dim = 6 as values (x.yaml). Remove "
        "one of the two.",
    ),
    "a norm on values shared from another layer": (
        model(layer(), layer(HEADS | {"keys_of_layer": 0, "value_norm": {}})),
        "model.layers[1].attention.value_norm is set, but with keys_of_layer = 0 the values are those of that layer "
        "(x.yaml). Remove one of the two.",
    ),
    "keys of a later layer": (
        model(layer(HEADS | {"keys_of_layer": 1}, repeat=2)),
        f"{ATTENTION}.keys_of_layer is 1, but this is layer 0 (x.yaml). Use the index of an earlier layer.",
    ),
    "keys of a layer without grouped_query keys": (
        model(layer(LATENT), layer(HEADS | {"keys_of_layer": 0})),
        "model.layers[1].attention.keys_of_layer is 0, but that layer does not compute its own grouped_query keys "
        "(x.yaml). Use a layer with grouped_query attention and without keys_of_layer.",
    ),
    "values_from_keys with a convolution": (
        model(layer(HEADS | {"convolution": {}, "values_from_keys": True})),
        f"{ATTENTION}.values_from_keys is true, but with a convolution half of the values are those of the token "
        "before (x.yaml). Remove one of the two.",
    ),
    "a convolution with values that have no halves": (
        model(layer(HEADS | {"num_heads": 3, "num_kv_heads": 1, "value_head_dim": 5, "convolution": {}})),
        f"{ATTENTION}.convolution is set, but values of 1 heads of width 5 have no halves (x.yaml). Use an even width.",
    ),
    "keys of a layer that itself uses keys_of_layer": (
        model(layer(), layer(HEADS | {"keys_of_layer": 0}), layer(HEADS | {"keys_of_layer": 1})),
        "model.layers[2].attention.keys_of_layer is 1, but that layer does not compute its own grouped_query keys "
        "(x.yaml). Use a layer with grouped_query attention and without keys_of_layer.",
    ),
    "keys of another shape": (
        model(layer(HEADS | {"value_head_dim": 5}), layer(HEADS | {"keys_of_layer": 0})),
        "model.layers[1].attention.keys_of_layer is 0, which has 2 key/value heads of widths 6 and 5, not 2 of "
        "widths 6 and 6 (x.yaml). Make them equal, or use another layer.",
    ),
    "RoPE of no features": (
        model(layer(LATENT | {"rope_head_dim": 0})),
        f"{ATTENTION}.position is rope, but rope_head_dim is 0, so that no feature has a position (x.yaml). Use "
        "position: {kind: none}, or a larger rope_head_dim.",
    ),
    "norm of a rotated key without features": (
        model(layer(LATENT | {"rope_head_dim": 0, "position": {"kind": "none"}, "rope_key_norm": True})),
        f"{ATTENTION}.rope_key_norm is true, but rope_head_dim is 0, so that there is no such key (x.yaml). Remove one "
        "of the two.",
    ),
    "a part of a pool": (
        model(layer(LATENT | {"indexer": {"num_heads": 2, "head_dim": 8, "top_k": 5, "pool_size": 2}})),
        f"{ATTENTION}.indexer.top_k is 5, which is not divisible by pool_size = 2 (x.yaml). Use a multiple of "
        "pool_size.",
    ),
    "pools of compressed entries": (
        model(
            layer(
                COMPRESSED
                | {"compression": {"ratio": 3, "indexer": {"num_heads": 2, "head_dim": 8, "top_k": 2, "pool_size": 2}}}
            )
        ),
        f"{ATTENTION}.compression.indexer.pool_size is 2, but the indexer chooses among entries of 3 tokens (x.yaml). "
        "Remove it.",
    ),
    "queries of the raw latent without a latent": (
        model(layer(LATENT | {"raw_query_latent": True})),
        f"{ATTENTION}.raw_query_latent is true, but query_latent_dim is null (x.yaml). Set query_latent_dim, or remove "
        "it.",
    ),
    "a gate of a norm that comes after its block": (
        model(layer(norm_placement="post", attention_norm_gate=3)),
        "model.layers[0].attention_norm_gate is 3, but norm_placement post has no norm before it (x.yaml). Remove it, "
        "or use norm_placement: pre.",
    ),
    "factors of no block": (
        model(layer({"kind": "none"}, attention_factors={"stream": 2.0})),
        "model.layers[0].attention_factors is set, but there is no block (x.yaml). Remove it.",
    ),
    "a norm of the stream itself where it is scaled by depth": (
        model(layer(norm_placement="stream"), residual={"kind": "depth_scaled"}),
        "model.layers[0].norm_placement is stream, which normalizes the stream itself, but residual is depth_scaled "
        "(x.yaml). Use norm_placement: pre, or residual: {kind: sum}.",
    ),
    "two routers in a layer": (
        model(layer(HEADS, head_router={"router": {"top_k": 1}})),
        "model.layers[0].head_router is set, but a layer has one router (x.yaml). Use mixer_only: true, and a layer "
        "with attention: {kind: none} for the feed-forward.",
    ),
    "a router over the heads of a state": (
        model({"attention": MAMBA2, "mixer_only": True, "head_router": {"router": {"top_k": 1}}}),
        "model.layers[0].head_router is set, which needs grouped_query attention without sinks (x.yaml). Remove one of "
        "the two.",
    ),
    "more heads chosen than there are": (
        model({"attention": HEADS, "mixer_only": True, "head_router": {"router": {"top_k": 9}}}),
        "model.layers[0].head_router.router.top_k is 9, but num_experts is 2 (x.yaml). Use top_k <= 2.",
    ),
    "a weight on the input of heads": (
        model({"attention": HEADS, "mixer_only": True, "head_router": {"router": {"top_k": 1, "apply_to": "input"}}}),
        "model.layers[0].head_router.router has apply_to: input or jitter {of: mixture}, which need experts with an "
        "input of their own (x.yaml). Use apply_to: output, and jitter {of: input} or {of: logits}.",
    ),
    "a gate of a norm of no block": (
        model(layer({"kind": "none"}, attention_norm_gate=3)),
        "model.layers[0].attention_norm_gate is 3, but there is no block (x.yaml). Remove it, or use norm_placement: "
        "pre.",
    ),
    "an indexer beside that of another layer": (
        model(layer(INDEXED), layer(INDEXED | {"indexer_of_layer": 0})),
        "model.layers[1].attention.indexer_of_layer is 0, but this layer has its own indexer (x.yaml). Remove one of "
        "the two.",
    ),
    "the indexer of a later layer": (
        model(layer(LATENT | {"indexer_of_layer": 1}), layer(INDEXED)),
        f"{ATTENTION}.indexer_of_layer is 1, but this is layer 0 (x.yaml). Use the index of an earlier layer.",
    ),
    "the indexer of a layer without one": (
        model(layer(LATENT), layer(LATENT | {"indexer_of_layer": 0})),
        "model.layers[1].attention.indexer_of_layer is 0, but that layer has no indexer (x.yaml). Use a layer that has "
        "one.",
    ),
    "an indexer with fewer features than it rotates": (
        model(layer(LATENT | {"indexer": NARROW})),
        f"{ATTENTION}.indexer.head_dim is 2, but it rotates rope_head_dim = 4 features (x.yaml). Use at least 4.",
    ),
    "num_value_heads not divisible by num_key_heads": (
        model(layer(DELTA)),
        f"{ATTENTION}.num_value_heads is 4, which is not divisible by num_key_heads = 3 (x.yaml). Use a multiple "
        "of num_key_heads.",
    ),
    "a layer without any block": (
        model({"attention": {"kind": "none"}, "mixer_only": True}),
        "model.layers[0].mixer_only is true, but attention is none (x.yaml). Remove one of the two.",
    ),
    "a feed-forward in a layer that is its mixer alone": (
        model(layer(mixer_only=True)),
        "model.layers[0].mixer_only is true, but the layer has a feed-forward (x.yaml). Remove one of the two.",
    ),
    "a layer of a feed-forward alone that has none": (
        model({"attention": {"kind": "none"}}),
        "model.layers[0].attention is none, which leaves one block (x.yaml). Set exactly one of feed_forward and moe.",
    ),
    "one block in parallel": (
        model(layer({"kind": "none"}, norm_placement="parallel")),
        "model.layers[0].norm_placement is parallel, but attention is none, and the layer has one block (x.yaml). Use "
        "both blocks.",
    ),
    "num_heads not divisible by num_groups": (
        model(layer(MAMBA2 | {"num_groups": 3})),
        f"{ATTENTION}.num_heads is 4, which is not divisible by num_groups = 3 (x.yaml). Use a multiple of num_groups.",
    ),
    "a longest step that is no longer than the shortest": (
        model(layer(MAMBA2 | {"min_step": 0.5, "max_step": 0.5})),
        f"{ATTENTION}.max_step is 0.5, but min_step is 0.5 (x.yaml). Use max_step > min_step.",
    ),
    # positions
    "an odd head_dim": (
        attention(head_dim=5),
        f"{ATTENTION}.head_dim is 5, but RoPE rotates pairs of features (x.yaml). Use an even number, or position: "
        "{kind: none}.",
    ),
    "an odd number of rotated features": (
        position(fraction=0.5),
        f"{ATTENTION}.head_dim is 6 and 3 of its features are rotated (fraction 0.5), but RoPE rotates pairs of "
        "features (x.yaml). Use an even number, or position: {kind: none}.",
    ),
    "no rotated features": (
        position(fraction=0.1),
        f"{ATTENTION}.head_dim is 6 and 0 of its features are rotated (fraction 0.1), but RoPE rotates pairs of "
        "features (x.yaml). Use an even number, or position: {kind: none}.",
    ),
    "a fraction of pairs that is all of them": (
        position(fraction_of="pairs"),
        f"{ATTENTION}.position.fraction_of is pairs, but fraction is 1, which rotates all pairs (x.yaml). Remove it, "
        "or set fraction below 1.",
    ),
    "dynamic scaling of a single pair": (
        attention(
            head_dim=2,
            position={"kind": "rope", "scaling": {"kind": "dynamic", "factor": 2, "original_length": 4, "length": 9}},
        ),
        f"{ATTENTION}.position.scaling is dynamic, which scales all pairs except the first, but only one pair is "
        "rotated (x.yaml). Use another scaling, or rotate more features.",
    ),
    "an odd rotated key": (
        model(layer(LATENT | {"rope_head_dim": 3})),
        f"{ATTENTION}.rope_head_dim is 3, but RoPE rotates pairs of features (x.yaml). Use an even number, or "
        "position: {kind: none}.",
    ),
    "too few LongRoPE factors": (
        position(
            scaling={
                "kind": "longrope",
                "short_factors": [1, 1, 1],
                "long_factors": [1, 2],
                "original_length": 8,
                "length": 64,
            }
        ),
        f"{ATTENTION}.position.scaling has 3 short and 2 long factors, but 3 pairs are rotated (x.yaml). Set 3 of "
        "each.",
    ),
    "llama3 scaling with a reversed ramp": (
        position(scaling={"kind": "llama3", "factor": 8, "original_length": 64, "low_frequency_factor": 5}),
        f"{ATTENTION}.position.scaling.high_frequency_factor is 4.0, below low_frequency_factor = 5.0 (x.yaml). "
        "Use at least 5.0.",
    ),
    "YaRN scaling with a reversed ramp": (
        position(scaling={"kind": "yarn", "factor": 8, "original_length": 64, "beta_fast": 0.5}),
        f"{ATTENTION}.position.scaling.beta_fast is 0.5, below beta_slow = 1.0 (x.yaml). Use at least 1.0.",
    ),
    # the router alone
    "top_p of logits": (
        router(score="none", weight="softmax_of_chosen", choice={"kind": "top_p", "p": 0.5}),
        f"{ROUTER}.choice is top_p, which sums scores, but score is none (x.yaml). Use score: softmax.",
    ),
    "logits as weights": (
        router(score="none"),
        f"{ROUTER}.weight is score, but score is none, and logits may be negative, so they cannot be weights (x.yaml). "
        "Use weight: softmax_of_chosen or sigmoid_of_chosen, or another score.",
    ),
    "an epsilon without renormalization": (
        router(renormalize="none", renormalize_epsilon=0.5),
        f"{ROUTER}.renormalize_epsilon is 0.5, but renormalize is none (x.yaml). Remove it, or use renormalize: sum.",
    ),
    "a floor of zero": (
        router(renormalize_floor=True),
        f"{ROUTER}.renormalize_floor is true, but renormalize_epsilon, the lower bound, is 0 (x.yaml). Remove it, or "
        "set renormalize_epsilon above 0.",
    ),
    "an order with renormalize: sum": (
        router(renormalize_order=2),
        f"{ROUTER}.renormalize_order is 2.0, but renormalize is sum (x.yaml). Remove it, or use renormalize: p_norm.",
    ),
    # choices
    "top_k above num_experts": (
        router(top_k=9),
        f"{ROUTER}.top_k is 9, but num_experts is 6 (x.yaml). Use top_k <= 6.",
    ),
    "a dynamic mask beside an indexer": (
        model(layer(HEADS | {"indexer": BLOCKS, "dynamic_mask": {}})),
        f"{ATTENTION}.dynamic_mask is set, but an indexer selects the positions (x.yaml). Set only one of them.",
    ),
    "product keys of no square": (
        router(product_keys=True),
        f"{ROUTER}.product_keys is true, but 6 experts are not all pairs of two equally large sets of keys (x.yaml). "
        "Use 4 or 9 experts.",
    ),
    "top_k above num_experts with zero_computation": (
        model(layer(moe=moe_of({"top_k": 9}, zero_computation={"num_zero": 2}))),
        f"{ROUTER}.top_k is 9, but num_experts with zero_computation is 8 (x.yaml). Use top_k <= 8.",
    ),
    "num_groups that does not divide num_experts": (
        grouped(num_groups=4),
        f"{ROUTER}.choice.num_groups is 4, which does not divide the number of experts 6 (x.yaml). Use a divisor of 6.",
    ),
    "keep above num_groups": (
        grouped(keep=4),
        f"{ROUTER}.choice.keep is 4, but num_groups is 3 (x.yaml). Use keep <= 3.",
    ),
    "top_k above the experts of the kept groups": (
        grouped(top_k=3, keep=1),
        f"{ROUTER}.top_k is 3, but the 1 kept groups have 2 experts (x.yaml). Use top_k <= 2, or a larger keep.",
    ),
    "top2 of groups with one expert": (
        grouped(num_groups=6, group_value="top2"),
        f"{ROUTER}.choice.group_value is top2, but each group has only one expert (x.yaml). Use fewer groups, or "
        "group_value: max.",
    ),
    "sparsemixer with top_k 3": (
        choice("sparsemixer", {"renormalize": "none"}, top_k=3),
        f"{ROUTER}.choice is sparsemixer, which computes its own weights for one or two experts (x.yaml). Use top_k: 1 "
        "or 2, renormalize: none and weight: score.",
    ),
    "renormalized sparsemixer": (
        choice("sparsemixer"),
        f"{ROUTER}.choice is sparsemixer, which computes its own weights for one or two experts (x.yaml). Use top_k: 1 "
        "or 2, renormalize: none and weight: score.",
    ),
    "sparsemixer with other weights": (
        choice("sparsemixer", {"renormalize": "none", "weight": "sigmoid_of_chosen"}),
        f"{ROUTER}.choice is sparsemixer, which computes its own weights for one or two experts (x.yaml). Use top_k: 1 "
        "or 2, renormalize: none and weight: score.",
    ),
    "sparsemixer with a selection bias": (
        choice("sparsemixer", {"renormalize": "none", "selection_bias": {}}),
        f"{ROUTER}.selection_bias is set, but choice sparsemixer does not use a selection value (x.yaml). "
        "Remove it, or use choice: {kind: top_k}.",
    ),
    "hash with a selection bias": (
        choice("hash", {"selection_bias": {}}),
        f"{ROUTER}.selection_bias is set, but choice hash does not use a selection value (x.yaml). Remove it, "
        "or use choice: {kind: top_k}.",
    ),
    "hash with a balance loss": (
        losses({"kind": "switch_balance"}, router={"choice": {"kind": "hash"}}),
        f"model.layers[0].moe.losses has switch_balance, {HASH_LOSS} choice: {{kind: top_k}}.",
    ),
    "top_p with top_k 1": (
        choice("top_p", top_k=1, p=0.5),
        f"{ROUTER}.top_k is 1, but choice top_p takes at most top_k experts, so p would have no effect (x.yaml). Use "
        "top_k >= 2, or choice: {kind: top_k}.",
    ),
    # expert choice
    "expert choice with a selection bias": (
        expert_choice({"selection_bias": {}}),
        f"{ROUTER}.selection_bias is set, but with choice expert_choice the load is always balanced (x.yaml). "
        "Remove it, or use choice: {kind: top_k}.",
    ),
    "renormalized expert choice": (
        expert_choice({"renormalize": "sum"}),
        f"{ROUTER}.renormalize requires a fixed number of experts per token, but with choice expert_choice a token may "
        "have none (x.yaml). Use renormalize: none and weight: score.",
    ),
    "expert choice with weights of the chosen": (
        expert_choice({"weight": "softmax_of_chosen"}),
        f"{ROUTER}.renormalize requires a fixed number of experts per token, but with choice expert_choice a token may "
        "have none (x.yaml). Use renormalize: none and weight: score.",
    ),
    "expert choice with a capacity": (
        expert_choice(dispatch={"kind": "capacity", "factor": 1.0}),
        "model.layers[0].moe.dispatch is capacity, but with choice expert_choice each expert already takes "
        "exactly P * top_k / E tokens (x.yaml). Use dispatch: {kind: dropless}.",
    ),
    "expert choice with zero_computation": (
        expert_choice(zero_computation={"num_zero": 1}),
        "model.layers[0].moe.zero_computation is set, but with choice expert_choice each such expert would have to "
        "take its share of tokens (x.yaml). Remove it, or use choice: {kind: top_k}.",
    ),
    "expert choice with a balance loss": (
        expert_choice(losses=[{"kind": "router_z", "coefficient": 0.1}, {"kind": "importance", "coefficient": 0.1}]),
        f"model.layers[0].moe.losses has importance, {EXPERT_CHOICE_LOSS}",
    ),
    # the MoE layer
    "zero_computation without experts": (
        model(layer(moe=moe_of(zero_computation={}))),
        "model.layers[0].moe.zero_computation has no experts (x.yaml). Set num_zero, num_copy or num_constant, or "
        "remove it.",
    ),
    "weighted inputs with zero_computation": (
        model(layer(moe=moe_of({"apply_to": "input"}, zero_computation={"num_copy": 1}))),
        f"{ROUTER}.apply_to is input, but zero-computation experts have no input to multiply by the weight (x.yaml). "
        "Use apply_to: output.",
    ),
    "a parallel feed-forward without a norm before it": (
        model(layer(moe=moe_of(shared=PARALLEL), norm_placement="parallel")),
        "model.layers[0].moe.shared is parallel, which needs a norm before the MoE, but norm_placement parallel has "
        "none (x.yaml). Use norm_placement: pre or sandwich, or shared: {kind: sum, hidden_dim: ...}.",
    ),
    "a parallel feed-forward of a post-norm layer": (
        model(layer(moe=moe_of(shared=PARALLEL), norm_placement="post")),
        "model.layers[0].moe.shared is parallel, which needs a norm before the MoE, but norm_placement post has "
        "none (x.yaml). Use norm_placement: pre or sandwich, or shared: {kind: sum, hidden_dim: ...}.",
    ),
    # losses
    "a duplicate loss": (
        losses({"kind": "router_z"}, {"kind": "router_z"}),
        "model.layers[0].moe.losses has a duplicate: router_z, router_z (x.yaml). Use each loss once, with one "
        "coefficient.",
    ),
    "num_devices that does not divide num_experts": (
        losses({"kind": "router_z"}, {"kind": "device_balance", "num_devices": 4}),
        "model.layers[0].moe.losses[1].num_devices is 4, which does not divide the number of experts 6 (x.yaml). "
        "Use a divisor of 6.",
    ),
    "num_devices that does not divide all experts with zero_computation": (
        losses({"kind": "device_balance", "num_devices": 3}, zero_computation={"num_zero": 1}),
        "model.layers[0].moe.losses[0].num_devices is 3, which does not divide the number of experts 7 (x.yaml). "
        "Use a divisor of 7.",
    ),
    "one device": (
        losses({"kind": "device_balance", "num_devices": 1}),
        "model.layers[0].moe.losses[0].num_devices is 1; input should be greater than or equal to 2 (x.yaml).",
    ),
    "max_devices above num_devices": (
        losses({"kind": "communication_balance", "num_devices": 3, "max_devices": 4}),
        "model.layers[0].moe.losses[0].max_devices is 4, but num_devices is 3 (x.yaml). Use max_devices <= 3.",
    ),
    "load loss without noise": (
        losses({"kind": "load"}),
        "model.layers[0].moe.losses[0] is load, which requires routing noise, but choice is top_k (x.yaml). Use "
        "choice: {kind: noisy_top_k}, or another loss.",
    ),
    "load loss with a selection bias": (
        losses({"kind": "load"}, router=NOISY | {"selection_bias": {}}),
        "model.layers[0].moe.losses[0] is load, which assumes a choice by noisy logits alone, but "
        "router.selection_bias is set (x.yaml). Remove one of the two.",
    ),
    "load loss with all experts chosen": (
        losses({"kind": "load"}, router=NOISY | {"top_k": 6}),
        "model.layers[0].moe.losses[0] is load, but with top_k 6 every expert gets every token (x.yaml). Remove it, "
        "or use a smaller top_k.",
    ),
    "heterogeneous balance without zero_computation": (
        losses({"kind": "heterogeneous_balance"}),
        "model.layers[0].moe.losses[0] is heterogeneous_balance, but there are no zero-computation experts (x.yaml). "
        "Add zero_computation, or use switch_balance.",
    ),
    "pooled_balance with different num_experts": (
        pooled({"num_experts": 5}),
        f"model.layers[1].moe.losses {POOLED} experts is 5 here and 6 in layers[0] (x.yaml). Make them equal, or use "
        "switch_balance.",
    ),
    "pooled_balance with different top_k": (
        pooled({"router": {"top_k": 3}}),
        f"model.layers[1].moe.losses {POOLED} top_k is 3 here and 2 in layers[0] (x.yaml). Make them equal, or use "
        "switch_balance.",
    ),
    "pooled_balance with different coefficients": (
        pooled({}, coefficient=0.2),
        f"model.layers[1].moe.losses {POOLED} coefficient of pooled_balance is 0.2 here and 0.1 in layers[0] (x.yaml). "
        "Make them equal, or use switch_balance.",
    ),
    # layers
    "two feed-forwards": (
        model(layer(feed_forward={"hidden_dim": 4})),
        "model.layers[0] has both feed_forward and moe (x.yaml). Set exactly one of feed_forward (dense) and moe, or "
        "both and shortcut: true.",
    ),
    "no feed-forward": (
        model({"attention": HEADS}),
        "model.layers[0] has neither feed_forward nor moe (x.yaml). Set exactly one of feed_forward (dense) and moe, "
        "or both and shortcut: true.",
    ),
    "a shortcut without a dense feed-forward": (
        model(layer(shortcut=True), layer()),
        "model.layers[0].shortcut is true, but the layer has no feed_forward (x.yaml). Set both feed_forward (dense) "
        "and moe.",
    ),
    "a shortcut with sandwich norms": (
        model(layer(feed_forward={"hidden_dim": 4}, norm_placement="sandwich", shortcut=True), layer()),
        "model.layers[0].shortcut is true, but norm_placement is sandwich (x.yaml). Use norm_placement: pre.",
    ),
    "a shortcut in the last layer": (
        model(layer(feed_forward={"hidden_dim": 4}, shortcut=True, repeat=2)),
        "model.layers[0].shortcut is true, but no later layer follows to which the MoE output could be added (x.yaml). "
        "Remove it, or add a layer.",
    ),
    "no layers": (
        {"model": {"embed_dim": 10, "layers": []}},
        "model.layers is empty (x.yaml). Add at least one layer.",
    ),
    "too many layers": (
        model(layer() | {"repeat": 1_999}, layer(), layer()),
        "model.layers are 2001 with repeats (x.yaml). Use at most 2000.",
    ),
    "value_residual with another number of values": (
        model(layer(), layer(HEADS | {"head_dim": 8, "value_residual": True})),
        f"{ATTENTION} has no values of 2 heads of width 8 for the value_residual of later layers (x.yaml). Use "
        "grouped_query attention with the same num_kv_heads and value_head_dim in the first layer.",
    ),
    "value_residual with values of another width": (
        model(layer(HEADS | {"value_head_dim": 5}), layer(HEADS | {"value_residual": True})),
        f"{ATTENTION} has no values of 2 heads of width 6 for the value_residual of later layers (x.yaml). Use "
        "grouped_query attention with the same num_kv_heads and value_head_dim in the first layer.",
    ),
    "value_residual with a latent first layer": (
        model(layer(LATENT), layer(HEADS | {"value_residual": True})),
        f"{ATTENTION} has no values of 2 heads of width 6 for the value_residual of later layers (x.yaml). Use "
        "grouped_query attention with the same num_kv_heads and value_head_dim in the first layer.",
    ),
    "value_residual with a convolution as first layer": (
        model(layer({"kind": "short_convolution"}), layer(HEADS | {"value_residual": True})),
        f"{ATTENTION} has no values of 2 heads of width 6 for the value_residual of later layers (x.yaml). Use "
        "grouped_query attention with the same num_kv_heads and value_head_dim in the first layer.",
    ),
    "value_residual on the first layer alone": (
        model(layer(HEADS | {"value_residual": True}), layer()),
        f"{ATTENTION}.value_residual is true, but it mixes the first layer's values into later layers, and none of "
        "them has it (x.yaml). Remove it, or set it on later layers too.",
    ),
    "gating_residual on the first MoE layer alone": (
        model({"attention": HEADS, "feed_forward": {"hidden_dim": 4}}, layer(moe=moe_of({"gating_residual": True}))),
        "model.layers[1].moe.router.gating_residual is true, but there is no MoE layer before this one, and no later "
        "one has it (x.yaml). Remove it, or set it on later MoE layers too.",
    ),
    "depth_average on the first MoE layer alone": (
        model(layer(moe=moe_of({"mlp": {"hidden_dim": 3, "depth_average": True}})), layer()),
        "model.layers[0].moe.router.mlp.depth_average is true, but there is no MoE layer before this one, and no later "
        "one has it (x.yaml). Remove it, or set it on later MoE layers too.",
    ),
    "depth_average behind a router without an MLP": (
        model(layer(), layer(moe=moe_of({"mlp": {"hidden_dim": 3, "depth_average": True}}))),
        "model.layers[1].moe.router.mlp.depth_average is true, but the router of the MoE layer before has no state of "
        "3 (x.yaml). Use the same mlp.hidden_dim in both, or remove it.",
    ),
    # the rest of a config
    "no data": (
        {"data": {"sources": []}},
        "data.sources is empty (x.yaml). Add at least one source, e.g. {kind: dataset, name: fables}.",
    ),
    "prebatched source beside others": (
        {"data": {"sources": [{"kind": "dataset", "name": "fables"}, {"kind": "batches", "path": "x.npy"}]}},
        "data.sources mixes a source of kind batches with 1 more (x.yaml). Use a source of kind batches alone.",
    ),
    "weights of some sources": (
        {"data": {"sources": [{"kind": "text", "path": "a", "weight": 2.0}, {"kind": "text", "path": "b"}]}},
        "data.sources[1].weight is missing, but sources[0] has one (x.yaml). Give every source a weight, or none to "
        "mix them by size.",
    ),
    "no data to validate on": (
        {"data": {"sources": [{"kind": "text", "path": "a"}], "validation": []}},
        "data.validation is empty (x.yaml). Add at least one source, or null for validation_fraction.",
    ),
    "validation sources beside prebatched data": (
        {"data": {"sources": [{"kind": "batches", "path": "a"}], "validation": [{"kind": "text", "path": "b"}]}},
        "data.validation is set beside a source of kind batches (x.yaml). Use that source's validation_batches.",
    ),
    "weight of a validation source": (
        {
            "data": {
                "sources": [{"kind": "text", "path": "a"}],
                "validation": [{"kind": "chat", "path": "b", "weight": 2.0}],
            }
        },
        "data.validation[0].weight is set (x.yaml). Remove it: the sources to validate on follow each other.",
    ),
    "separate documents of token shards": (
        {"data": {"sources": [{"kind": "tokens", "path": "a"}], "documents": "separate"}},
        "data.documents is separate, but sources[0] is of kind tokens, which has no borders of documents (x.yaml). Use "
        "sources of kind text, jsonl or chat, or documents: windows.",
    ),
    "gradient_accumulation that does not divide batch_size": (
        {"training": {"steps": 10, "batch_size": 6, "sequence_length": 8, "gradient_accumulation": 4}},
        "training.gradient_accumulation is 4, which does not divide batch_size = 6 (x.yaml). Use a divisor of "
        "batch_size.",
    ),
    "no role that is trained": (
        {"training": {"steps": 10, "batch_size": 6, "sequence_length": 8, "only": []}},
        "training.only is empty, so nothing is trained (x.yaml). Name a role, or leave it out.",
    ),
    "two groups of one role": (
        {"optimizer": {"learning_rate": 0.001, "groups": [{"roles": ["router"]}, {"roles": ["router"]}]}},
        "optimizer.groups name router twice (x.yaml). Name each role once.",
    ),
    "nesterov without momentum": (
        {"optimizer": {"kind": "sgd", "learning_rate": 0.001, "momentum": 0, "nesterov": True}},
        "optimizer.nesterov is true, but momentum is 0 (x.yaml). Use a momentum above 0.",
    ),
    # adapter
    "adapter of no layer": (
        {"adapter": {"layers": []}},
        "model.adapter.layers is empty, so nothing would be adapted (x.yaml). Name some, or remove layers.",
    ),
    "adapter of a role twice": (
        {"adapter": {"on": ["router", "router"]}},
        "model.adapter.on names the same one twice (x.yaml). Name each once.",
    ),
    "adapter of a layer beyond the last": (
        {"adapter": {"layers": [2]}},
        "model.adapter.layers has 2, but the last layer is 1 (x.yaml). Use indices up to 1.",
    ),
    "adapter of a tied head": (
        model(head={"kind": "tied"}) | {"adapter": {"on": ["head"]}},
        "model.adapter.on has head, but the head is tied to the embedding (x.yaml). Use embedding, whose matrix a tied "
        "head has.",
    ),
    "adapter of a role that no layer has": (
        {"adapter": {"on": ["dense"], "layers": [1]}},
        "model.adapter.on has dense, of which layers 1 has no matrix (x.yaml). Remove dense.",
    ),
    "dropout of adapters of experts": (
        {"adapter": {"dropout": 0.1}},
        "model.adapter.dropout is 0.1, but adapters of experts have none (x.yaml). Use dropout: 0, or name roles "
        "without experts in adapter.on.",
    ),
    "one tracker twice": (
        {"trackers": ["wandb", "tensorboard", "wandb"]},
        "trackers lists one twice: wandb, tensorboard, wandb (x.yaml). List each once.",
    ),
    "two axes that are auto": (
        {"mesh": {"data": "auto", "expert": "auto"}},
        "mesh.expert is 'auto', and so is data (x.yaml). Set one of them to a number.",
    ),
    "experts sharded over tensor": (
        {"mesh": {"rules": {"expert": "tensor"}}},
        "mesh.rules.expert is sharded over tensor, whose devices share the same tokens (x.yaml). Use expert.",
    ),
    "embed sharded over tensor": (
        {"mesh": {"rules": {"embed": ["fsdp", "tensor"]}}},
        "mesh.rules.embed is sharded over tensor, but a block cannot be computed in parts along it (x.yaml). "
        "Use tensor for head, kv_head, hidden or vocab.",
    ),
    "sequences beyond learned positions": (
        model(position={"kind": "learned", "max_length": 7}),
        "training.sequence_length is 8, but positions end at 7 tokens (x.yaml). Use a shorter sequence_length, or a "
        "larger model.position.max_length.",
    ),
    "sequences beyond the length of a RoPE scaling": (
        position(scaling={"kind": "dynamic", "factor": 2, "original_length": 4, "length": 7}),
        "training.sequence_length is 8, but positions end at 7 tokens (x.yaml). Use a shorter sequence_length, or a "
        "larger model.layers[0].attention.position.scaling.length.",
    ),
}


def read(changes):
    sections = {
        "data": {"sources": [{"kind": "dataset", "name": "fables"}]},
        "training": {"steps": 10, "batch_size": 6, "sequence_length": 8},
        "optimizer": {"learning_rate": 0.001},
    }
    return parse_config(yaml.safe_dump(model() | sections | changes), "x.yaml")


@pytest.mark.parametrize("case", CASES)
def test_impossible_combination_is_rejected_in_one_line(case):
    changes, message = CASES[case]
    with pytest.raises(SpecError) as seen:
        read(changes)
    assert str(seen.value) == message


def test_each_validator_has_a_case(monkeypatch):
    """Every `impossible(...)` in the source is reached by a case."""
    reached, written = set(), set()
    for name in MODULES:
        module = importlib.import_module(f"moezoo.core.{name}")
        path = PACKAGE / "core" / f"{name.replace('.', '/')}.py"
        made = module.impossible

        def noting(*arguments, made=made, name=name):
            reached.add((name, sys._getframe(1).f_lineno))
            return made(*arguments)

        monkeypatch.setattr(module, "impossible", noting)
        calls = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call))
        written |= {(name, node.lineno) for node in calls if getattr(node.func, "id", "") == "impossible"}
    for changes, _ in CASES.values():
        with pytest.raises(SpecError):
            read(changes)
    assert written - reached == set()
    assert reached == written


def test_every_file_that_rejects_combinations_is_checked():
    importing = {
        str(path.relative_to(PACKAGE / "core").with_suffix("")).replace("/", ".")
        for path in (PACKAGE / "core").rglob("*.py")
        if "raise impossible(" in path.read_text(encoding="utf-8")
    }
    assert importing == set(MODULES)


# --- similar combinations that are valid -----------------------------------------------------------------------------


ALLOWED = {
    "values_from_keys with an equal value_head_dim": attention(values_from_keys=True, value_head_dim=6),
    "value_residual on repeated layers": model(layer(HEADS | {"value_residual": True}, repeat=2)),
    "value_residual on a later layer": model(layer(), layer(HEADS | {"value_residual": True})),
    "gating_residual on repeated MoE layers": model(layer(moe=moe_of({"gating_residual": True}), repeat=2)),
    "gating_residual on a later MoE layer": model(layer(), layer(moe=moe_of({"gating_residual": True}))),
    "a parallel feed-forward between norms": model(layer(moe=moe_of(shared=PARALLEL), norm_placement="sandwich")),
    "hash with losses on its weights": losses(
        {"kind": "router_z"}, {"kind": "importance"}, router={"choice": {"kind": "hash"}}
    ),
    "noise before expert choice": expert_choice(
        {"jitter": {"amount": 0.1}}, losses=[{"kind": "router_z", "coefficient": 0.1}]
    ),
    "a global balance of one micro-batch": losses({"kind": "global_balance"}),
    "a device for each expert": losses({"kind": "device_balance", "num_devices": 6}),
    "sequences as long as the positions": model(position={"kind": "learned", "max_length": 8}),
    "all experts of the kept groups": grouped(top_k=4, keep=2),
    "all experts": router(top_k=6),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_similar_valid_combination_is_accepted(case):
    read(ALLOWED[case])
