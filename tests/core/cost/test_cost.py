"""Costs by formula equal hand-computed sums. Sizes are unequal, so that a swapped dimension changes the number."""

from fractions import Fraction

import pytest

from moezoo.core.config.run_config import parse_config
from moezoo.core.cost.flops import flops_per_token
from moezoo.core.cost.memory import TrainingMemory, cache_bytes, kv_cache_bytes_per_token, training_memory
from moezoo.core.cost.parameters import active_experts, parameter_counts
from moezoo.core.errors import SpecError
from moezoo.core.parameters import ROLES, parameter_table
from moezoo.core.spec import (
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    HyperConnectionsSpec,
    LayerSpec,
    ModelSpec,
)

# D=20, N=8, M=2, H=6, F=28 (dense), 12 (experts), 2 x 9 (shared), E=7, K=2, V=11, L=3 (one dense, two MoE)
CONFIG = """
model:
  vocab_size: 11
  embed_dim: 20
  layers:
    - attention: {num_heads: 8, num_kv_heads: 2, head_dim: 6, qkv_bias: true, qk_norm: {}}
      feed_forward: {hidden_dim: 28}
    - repeat: 2
      attention: {num_heads: 8, num_kv_heads: 2, head_dim: 6}
      moe:
        num_experts: 7
        router: {top_k: 2}
        experts: {hidden_dim: 12}
        shared: {num_experts: 2, hidden_dim: 9}
data: {sources: [{kind: dataset, name: fables}]}
training: {steps: 10, batch_size: 6, sequence_length: 5, gradient_accumulation: 2}
optimizer: {learning_rate: 1.0e-3}
"""


@pytest.fixture
def config():
    return parse_config(CONFIG)


def with_model(config, **changes):
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def test_parameters_by_role_equal_hand_computed_sums(config):
    counts = parameter_counts(config.model)
    attention = 20 * 6 * (8 + 2 + 2) + 8 * 6 * 20
    assert counts.by_role == {
        "embeddings": 2 * 11 * 20,
        "attention": 3 * attention + 6 * (8 + 2 + 2),
        "feed-forward": 3 * 20 * 28,
        "router": 2 * 20 * 7,
        "routed experts": 2 * 7 * 3 * 20 * 12,
        "shared experts": 2 * 3 * 20 * 18,
        "norms": 7 * 20 + 2 * 6,
    }
    assert tuple(counts.by_role) == tuple(counts.active_by_role) == ROLES


def test_active_parameters_are_k_of_e_experts_and_all_others(config):
    counts = parameter_counts(config.model)
    rest = counts.total - counts.by_role["routed experts"]
    assert counts.active_by_role["routed experts"] == 2 * 2 * 3 * 20 * 12
    assert counts.active == rest + 2 * 2 * 3 * 20 * 12
    assert counts.total == sum(row.size for row in parameter_table(config.model))


def test_layers_with_different_k_and_e_are_counted_separately(config):
    moe = config.model.layers[1]
    wide = moe.model_copy(
        update={
            "repeat": 1,
            "moe": moe.moe.model_copy(
                update={"num_experts": 12, "router": moe.moe.router.model_copy(update={"top_k": 5})}
            ),
        }
    )
    spec = config.model.model_copy(update={"layers": (moe, wide)})
    assert parameter_counts(spec).active_by_role["routed experts"] == (2 * 2 + 5) * 3 * 20 * 12


def test_tied_head_is_counted_once_but_costs_flops(config):
    tied = ModelSpec.model_validate({**config.model.model_dump(), "head": {"kind": "tied"}})
    assert parameter_counts(tied).by_role["embeddings"] == 11 * 20
    assert flops_per_token(tied, 5, False).head == flops_per_token(config.model, 5, False).head == 2 * 20 * 11


def test_flops_by_part_equal_hand_computed_sums(config):
    flops = flops_per_token(config.model, sequence_length=5, training=False)
    visible = (1 + 2 + 3 + 4 + 5) / 5
    assert flops.attention_projections == 3 * 2 * (20 * 6 * (8 + 2 + 2) + 8 * 6 * 20)
    assert flops.attention_scores == 3 * 2 * (2 * 8 * 6 * visible)
    assert flops.feed_forward == 2 * 3 * 20 * 28
    assert flops.router == 2 * 2 * 20 * 7
    assert flops.routed_experts == 2 * 2 * (2 * 3 * 20 * 12)
    assert flops.shared_experts == 2 * (2 * 3 * 20 * 18)
    assert flops.total == sum(flops.by_part.values())


def test_training_flops_are_three_times_forward(config):
    forward, training = (flops_per_token(config.model, 5, kind) for kind in (False, True))
    assert {name: 3 * value for name, value in forward.by_part.items()} == training.by_part


def test_products_are_two_flops_per_active_matrix_parameter(config):
    """Kaplan's 2 N: without biases, norms, scores and the lookup, every active parameter is one multiply-add."""
    flops = flops_per_token(config.model, 5, False)
    counts = parameter_counts(config.model)
    matrices = counts.active - counts.by_role["norms"] - 6 * (8 + 2 + 2) - 11 * 20
    assert flops.total - flops.attention_scores == 2 * matrices


def test_more_experts_cost_parameters_but_only_router_flops(config):
    moe = config.model.layers[1]
    more = moe.model_copy(update={"moe": moe.moe.model_copy(update={"num_experts": 14})})
    spec = config.model.model_copy(update={"layers": (config.model.layers[0], more)})
    before, after = flops_per_token(config.model, 5, False), flops_per_token(spec, 5, False)
    assert after.total - before.total == 2 * 2 * 20 * 7
    assert (
        parameter_counts(spec).by_role["routed experts"] == 2 * parameter_counts(config.model).by_role["routed experts"]
    )


def test_cache_bytes_count_key_value_heads_in_the_compute_dtype(config):
    assert kv_cache_bytes_per_token(config.model) == 3 * 2 * 2 * 6 * 4
    half = ModelSpec.model_validate({**config.model.model_dump(), "precision": {"compute": "bfloat16"}})
    assert kv_cache_bytes_per_token(half) == 3 * 2 * 2 * 6 * 2


def test_training_memory_equals_hand_computed_sums(config):
    parameters, tokens = parameter_counts(config.model).total, 3 * 5
    attention = 4 * (4 * 20 + 3 * 48 + 3 * 12) + 4 * 8 * 5
    dense = 4 * (4 * 28 + 20)
    moe = 8 * 7 + 4 * 2 * (4 * 12 + 2 * 20) + 4 * 4 * 18
    assert training_memory(config) == TrainingMemory(
        parameters=4 * parameters,
        gradients=8 * parameters,
        moments=8 * parameters,
        activations=tokens * (3 * attention + dense + 2 * moe + 2 * 4 * 20),
        logits=8 * tokens * 11,
    )


def test_packed_documents_have_a_byte_for_every_pair_of_tokens(config):
    packed = config.model_copy(update={"data": config.data.model_copy(update={"documents": "separate"})})
    assert training_memory(packed).activations == training_memory(config).activations + 3 * 5 * 5


def test_without_gradient_accumulation_there_is_one_gradient(config):
    training = config.training.model_copy(update={"gradient_accumulation": 1})
    memory = training_memory(config.model_copy(update={"training": training}))
    assert memory.gradients == memory.parameters
    assert memory.logits == 8 * 6 * 5 * 11


def test_block_rematerialization_saves_all_activations_of_one_layer_at_a_time(config):
    training = config.training.model_copy(update={"rematerialize": "block"})
    memory = training_memory(config.model_copy(update={"training": training}))
    attention = 4 * (4 * 20 + 3 * 48 + 3 * 12) + 4 * 8 * 5
    moe = 8 * 7 + 4 * 2 * (4 * 12 + 2 * 20) + 4 * 4 * 18
    kept = 3 * 4 * 4 * 20 + 2 * 8 * 7
    assert memory.activations == 3 * 5 * (kept + attention + moe + 2 * 4 * 20)


def test_block_rematerialization_keeps_new_gradients_of_one_layer_at_a_time(config):
    training = config.training.model_copy(update={"rematerialize": "block"})
    memory = training_memory(config.model_copy(update={"training": training}))
    layers = [
        sum(row.size for row in parameter_table(config.model) if row.name.startswith(f"layers.{index}."))
        for index in range(3)
    ]
    assert memory.gradients == memory.parameters + 4 * max(layers)
    single = training.model_copy(update={"gradient_accumulation": 1})
    assert training_memory(config.model_copy(update={"training": single})).gradients == memory.parameters


def test_expert_rematerialization_saves_expert_activations_of_one_layer_at_a_time(config):
    training = config.training.model_copy(update={"rematerialize": "experts"})
    memory, plain = training_memory(config.model_copy(update={"training": training})), training_memory(config)
    activations, parameters = (
        4 * 2 * (4 * 12 + 2 * 20),
        [
            sum(
                row.size for row in parameter_table(config.model) if row.name.startswith(f"layers.{index}.moe.experts.")
            )
            for index in range(3)
        ],
    )
    assert sorted(size > 0 for size in parameters) == [False, True, True]
    assert plain.activations - memory.activations == 3 * 5 * activations
    assert plain.gradients - memory.gradients == 4 * min(size for size in parameters if size)


def test_null_vocabulary_is_an_error_that_names_the_key(config):
    spec = with_model(config, vocab_size=None).model
    for cost in (parameter_counts, lambda spec: flops_per_token(spec, 5, True)):
        with pytest.raises(SpecError, match=r"model\.vocab_size is null"):
            cost(spec)


# --- parts with formulas of their own --------------------------------------------------------------------------------

# N=4, H=6 and 4 with RoPE, values of width 5, Z=7, query latent of 9; 3 index heads of width 4 that choose 2 tokens
OPTIONS = ", query_latent_dim: 9, indexer: {num_heads: 3, head_dim: 4, top_k: 2}"
LATENT = f"{{kind: latent, num_heads: 4, head_dim: 6, rope_head_dim: 4, value_head_dim: 5, latent_dim: 7{OPTIONS}}}"
LATENT_MATRICES = 20 * 9 + 9 * 4 * 10 + 20 * 7 + 20 * 4 + 7 * 4 * 6 + 7 * 4 * 5 + 4 * 5 * 20
INDEXER_MATRICES = 9 * 3 * 4 + 20 * 4 + 20 * 3
# 2 key heads of width 3 and 4 value heads of width 5, after convolutions of width 3
DELTA = "{kind: gated_delta, num_key_heads: 2, num_value_heads: 4, key_head_dim: 3, value_head_dim: 5, conv_width: 3}"
DELTA_MATRICES = 2 * 20 * 2 * 3 + 2 * 20 * 4 * 5 + 2 * 20 * 4 + 4 * 5 * 20 + 3 * (2 * 2 * 3 + 4 * 5)
# E=7 in a latent space of 8; zero-computation experts: 1 zero, 1 copy, 2 constant, with an FFN share of 0.5
MOE = (
    "{num_experts: 7, router: {top_k: 2}, experts: {kind: gelu, hidden_dim: 12}, latent_dim: 8, "
    "zero_computation: {num_zero: 1, num_copy: 1, num_constant: 2, ffn_share: 0.5}, shared: {hidden_dim: 9}}"
)
GROUPED = "{num_heads: 8, num_kv_heads: 2, head_dim: 6}"
PLAIN = "feed_forward: {kind: relu, hidden_dim: 28}"
AROUND = 2 * 4 * 20  # bytes of the final norm's input and output


def one_layer(attention=GROUPED, rest=PLAIN):
    start, end = CONFIG.index("    - attention"), CONFIG.index("data:")
    return parse_config(f"{CONFIG[:start]}    - {{attention: {attention}, {rest}}}\n{CONFIG[end:]}")


def test_feed_forward_without_gate_has_two_matrices():
    config = one_layer()
    assert parameter_counts(config.model).by_role["feed-forward"] == 2 * 20 * 28
    assert flops_per_token(config.model, 5, False).feed_forward == 2 * 2 * 20 * 28
    saved = 4 * (4 * 20 + 3 * (8 + 2) * 6) + 4 * 8 * 5 + 4 * (2 * 28 + 20)
    assert training_memory(config).activations == 3 * 5 * (saved + AROUND)


def test_value_width_is_counted_separately():
    heads = "{num_heads: 8, num_kv_heads: 2, head_dim: 6, qkv_bias: true, OPTION}"
    narrow, keys, plain = (
        one_layer(heads.replace("OPTION", option)).model
        for option in ("value_head_dim: 5", "values_from_keys: true", "window: null")
    )
    assert flops_per_token(narrow, 5, False).attention_scores == 2 * 8 * (6 + 5) * 3
    assert kv_cache_bytes_per_token(narrow) == 2 * (6 + 5) * 4
    sharing = narrow.model_copy(
        update={
            "layers": (
                *narrow.layers,
                narrow.layers[0].model_copy(
                    update={"attention": narrow.layers[0].attention.model_copy(update={"keys_of_layer": 0})}
                ),
            )
        }
    )
    assert kv_cache_bytes_per_token(sharing) == kv_cache_bytes_per_token(narrow)
    total = parameter_counts(plain).total
    assert total - parameter_counts(narrow).total == 2 * (20 + 1) + 8 * 20
    assert total - parameter_counts(keys).total == 2 * 6 * (20 + 1)


def test_latent_attention_equals_hand_computed_sums():
    config = one_layer(LATENT)
    counts, flops = parameter_counts(config.model), flops_per_token(config.model, 5, False)
    assert counts.by_role["attention"] == LATENT_MATRICES + INDEXER_MATRICES
    assert counts.by_role["norms"] == 3 * 20 + 9 + 7 + 2 * 4
    assert flops.attention_projections == 2 * (LATENT_MATRICES + INDEXER_MATRICES)
    chosen, visible = (1 + 2 + 2 + 2 + 2) / 5, (1 + 2 + 3 + 4 + 5) / 5
    assert flops.attention_scores == 2 * 4 * (6 + 4 + 5) * chosen + 2 * 3 * 4 * visible
    assert kv_cache_bytes_per_token(config.model) == 4 * (7 + 4 + 4)
    saved = 4 * (4 * 20 + 3 * (4 * (6 + 4 + 5) + 7)) + 4 * 4 * 5 + 4 * (2 * 28 + 20)
    assert training_memory(config).activations == 3 * 5 * (saved + AROUND)


def test_latent_attention_without_options_does_not_count_them():
    spec = one_layer(LATENT.replace(OPTIONS, "")).model
    assert parameter_counts(spec).by_role["attention"] == LATENT_MATRICES - 20 * 9 + (20 - 9) * 4 * 10
    assert flops_per_token(spec, 5, False).attention_scores == 2 * 4 * (6 + 4 + 5) * 3
    assert kv_cache_bytes_per_token(spec) == 4 * (7 + 4)


def test_several_residual_streams_have_maps_and_are_all_saved():
    config = one_layer(LATENT)
    residual = HyperConnectionsSpec(num_streams=3, sinkhorn_iterations=4)
    streams = config.model_copy(update={"model": config.model.model_copy(update={"residual": residual})})
    maps, vectors = 2 * 3 * 20 * (3 + 3 + 9) + 3 * 20 * 3, 2 * (3 + 3 + 9 + 3) + 3 + 1
    assert parameter_counts(streams.model).total - parameter_counts(config.model).total == maps + vectors
    difference = flops_per_token(streams.model, 5, False).total - flops_per_token(config.model, 5, False).total
    assert difference == 2 * maps
    saved = training_memory(streams).activations - training_memory(config).activations
    assert saved == 3 * 5 * 2 * (4 * 3 * 20 + 4 * 2 * 4 * 9)


def test_gates_of_norms_and_of_the_query_latent_are_matrices():
    spec = one_layer(LATENT).model
    attention = spec.layers[0].attention.model_copy(update={"raw_query_latent": True, "query_gate": True})
    gates = {"attention": attention, "attention_norm_gate": 3, "feed_forward_norm_gate": 2}
    gated = spec.model_copy(update={"layers": (spec.layers[0].model_copy(update=gates),)})
    of_queries, of_norms = 9 * 4 * 10 + 2 * 9 * 4 * 5, 2 * 20 * (3 + 2)
    before, after = parameter_counts(spec), parameter_counts(gated)
    assert after.by_role["attention"] - before.by_role["attention"] == of_queries
    assert after.total - before.total == of_queries + of_norms
    difference = flops_per_token(gated, 5, False).total - flops_per_token(spec, 5, False).total
    assert difference == 2 * (of_queries + of_norms)


def test_a_layer_without_an_indexer_of_its_own_attends_to_as_many_tokens_as_its_other_layer_chooses():
    spec = one_layer(LATENT).model
    attention = spec.layers[0].attention.model_copy(update={"indexer": None, "indexer_of_layer": 0})
    both = spec.model_copy(
        update={"layers": (*spec.layers, spec.layers[0].model_copy(update={"attention": attention}))}
    )
    chosen, visible = (1 + 2 + 2 + 2 + 2) / 5, (1 + 2 + 3 + 4 + 5) / 5
    assert flops_per_token(both, 5, False).attention_scores == 4 * 4 * (6 + 4 + 5) * chosen + 2 * 3 * 4 * visible
    assert kv_cache_bytes_per_token(both) == 4 * (7 + 4 + 4) + 4 * (7 + 4)


def test_linear_attention_costs_the_same_at_every_length_and_adds_nothing_to_the_cache():
    config = one_layer(DELTA)
    counts, flops = parameter_counts(config.model), flops_per_token(config.model, 5, False)
    assert counts.by_role["attention"] == DELTA_MATRICES + 2 * 4
    assert counts.by_role["norms"] == 3 * 20 + 5
    assert flops.attention_projections == 2 * DELTA_MATRICES
    assert flops.attention_scores == 6 * 4 * 3 * 5
    assert flops_per_token(config.model, 500, False) == flops
    assert kv_cache_bytes_per_token(config.model) == 0
    saved = 4 * (4 * 20 + 3 * (2 * 2 * 3 + 2 * 4 * 5)) + 4 * (2 * 28 + 20)
    assert training_memory(config).activations == 3 * 5 * (saved + AROUND)
    config = one_layer(DELTA.replace("}", ", decay: channel, decay_rank: 6, gate_rank: 2}"))
    matrices = DELTA_MATRICES - 20 * 4 * 5 - 20 * 4 + (20 * 2 + 2 * 4 * 5) + (20 * 6 + 6 * 4 * 3)
    assert parameter_counts(config.model).by_role["attention"] == matrices + 4 * 3 + 4
    assert training_memory(config).activations == 3 * 5 * (saved + 4 * 3 * 4 * 3 + AROUND)


def test_of_heads_that_a_router_chooses_only_the_chosen_ones_are_active():
    heads, width = 10 * 6, 2 * 6
    attention = "{num_heads: 10, num_kv_heads: 2, head_dim: 6}"
    chosen = one_layer(attention, "mixer_only: true, head_router: {router: {top_k: 2}}").model
    counts, flops = parameter_counts(chosen), flops_per_token(chosen, 5, False)
    assert counts.by_role["attention"] == 2 * 20 * heads + 2 * 20 * width
    assert counts.active_by_role["attention"] == 2 * 20 * heads * 2 // 5 + 2 * 20 * width
    assert counts.by_role["router"] == 20 * 5
    assert flops.attention_scores == 2 * 2 * 2 * (6 + 6) * 3
    assert flops.attention_projections == 2 * counts.active_by_role["attention"]
    assert flops.router == 2 * 20 * 5


def test_mamba2_costs_the_same_at_every_length_and_adds_nothing_to_the_cache():
    config = one_layer("{kind: mamba2, num_heads: 4, head_dim: 5, state_dim: 3, num_groups: 2, conv_width: 3}")
    counts, flops = parameter_counts(config.model), flops_per_token(config.model, 5, False)
    matrices = 2 * 20 * 4 * 5 + 2 * 20 * 2 * 3 + 20 * 4 + 4 * 5 * 20 + 3 * (4 * 5 + 2 * 2 * 3)
    assert counts.by_role["attention"] == matrices + (4 * 5 + 2 * 2 * 3) + 3 * 4
    assert counts.by_role["norms"] == 3 * 20 + 4 * 5
    assert flops.attention_projections == 2 * matrices
    assert flops.attention_scores == 4 * 4 * 3 * 5
    assert flops_per_token(config.model, 500, False) == flops
    assert kv_cache_bytes_per_token(config.model) == 0
    saved = 4 * (4 * 20 + 3 * (2 * 2 * 3 + 2 * 4 * 5)) + 4 * (2 * 28 + 20)
    assert training_memory(config).activations == 3 * 5 * (saved + AROUND)


def test_lightning_attention_costs_the_same_at_every_length_and_adds_nothing_to_the_cache():
    config = one_layer("{kind: lightning, num_heads: 4, head_dim: 5}")
    counts, flops = parameter_counts(config.model), flops_per_token(config.model, 5, False)
    assert counts.by_role["attention"] == 5 * 20 * 4 * 5
    assert counts.by_role["norms"] == 3 * 20 + 4 * 5
    assert flops.attention_projections == 2 * 5 * 20 * 4 * 5
    assert flops.attention_scores == 4 * 4 * 5 * 5
    assert flops_per_token(config.model, 500, False) == flops
    assert kv_cache_bytes_per_token(config.model) == 0
    saved = 4 * (4 * 20 + 3 * 4 * 4 * 5) + 4 * (2 * 28 + 20)
    assert training_memory(config).activations == 3 * 5 * (saved + AROUND)


def test_mamba_costs_the_same_at_every_length_and_adds_nothing_to_the_cache():
    config = one_layer("{kind: mamba, inner_dim: 12, state_dim: 3, step_rank: 2, conv_width: 3, norm: {}}")
    counts, flops = parameter_counts(config.model), flops_per_token(config.model, 5, False)
    matrices = 3 * 20 * 12 + 12 * (2 + 3 + 3) + 2 * 12 + 3 * 12
    assert counts.by_role["attention"] == matrices + 3 * 12 + 12 * 3
    assert counts.by_role["norms"] == 3 * 20 + 2 + 3 + 3
    assert flops.attention_projections == 2 * matrices
    assert flops.attention_scores == 4 * 12 * 3
    assert flops_per_token(config.model, 500, False) == flops
    assert kv_cache_bytes_per_token(config.model) == 0
    saved = 4 * (4 * 20 + 3 * 2 * 12) + 4 * (2 * 28 + 20)
    assert training_memory(config).activations == 3 * 5 * (saved + AROUND)


def test_convolutional_attention_counts_filters_and_what_they_save():
    option = "convolution: {conv_width: 3, mix_width: 2}, key_temperature: true"
    config, plain = one_layer(GROUPED.replace("}", f", {option}}}")), one_layer()
    n, m, h = 8, 2, 6
    filters, biases = (n + m) * (3 * h + 2 * h * h), 2 * (n + m) * h
    counts, before = (parameter_counts(each.model).by_role["attention"] for each in (config, plain))
    assert counts == before + filters + biases + m
    flops, others = (flops_per_token(each.model, 5, False) for each in (config, plain))
    assert flops.attention_projections == others.attention_projections + 2 * filters
    assert flops.attention_scores == others.attention_scores
    assert kv_cache_bytes_per_token(config.model) == kv_cache_bytes_per_token(plain.model)
    more = training_memory(config).activations - training_memory(plain).activations
    assert more == 3 * 5 * 4 * 3 * (n + m) * h


def test_compressed_attention_counts_its_window_and_entries():
    config = one_layer(
        "{kind: compressed, num_heads: 4, head_dim: 6, rope_head_dim: 2, query_latent_dim: 7, output_groups: 2, "
        "output_latent_dim: 5, window: 3, compression: {ratio: 2, overlap: true, "
        "indexer: {num_heads: 3, head_dim: 4, top_k: 1, key_norm: {kind: rms}}}}"
    )
    counts, flops = parameter_counts(config.model), flops_per_token(config.model, 5, False)
    matrices = 20 * 7 + 7 * 4 * 6 + 20 * 6 + 2 * 6 * 2 * 5 + 2 * 5 * 20
    matrices += 2 * 20 * 12 + 7 * 3 * 4 + 20 * 3 + 2 * 20 * 8
    assert counts.by_role["attention"] == matrices + 4 + 2 * (12 + 8)
    assert counts.by_role["norms"] == 3 * 20 + 7 + 6 + 6 + 4
    assert flops.attention_projections == 2 * matrices
    keys, chosen, visible = 1 + 2 + 3 + 3 + 3, 0 + 1 + 1 + 1 + 1, 0 + 1 + 1 + 2 + 2
    assert flops.attention_scores == (4 * 4 * 6 * (keys + chosen) + 2 * 3 * 4 * visible) / 5
    assert kv_cache_bytes_per_token(config.model) == 4 * (6 + (6 + 4) / 2)
    assert cache_bytes(config.model, 5) == 4 * (3 * 6 + 2 * (6 + 4))
    saved = 4 * (4 * 20 + 3 * (5 * 6 + 2 * (6 + 4))) + 4 * 4 * 5 + 4 * (2 * 28 + 20)
    assert training_memory(config).activations == 3 * 5 * (saved + AROUND)


def test_short_convolution_counts_matrices_and_filter():
    config = one_layer("{kind: short_convolution, conv_width: 4, bias: true}")
    counts, flops = parameter_counts(config.model), flops_per_token(config.model, 5, False)
    assert counts.by_role["attention"] == 4 * 20 * 20 + 4 * 20 + 5 * 20
    assert flops.attention_projections == 2 * (4 * 20 * 20 + 4 * 20)
    assert flops.attention_scores == kv_cache_bytes_per_token(config.model) == 0
    saved = 4 * (4 * 20 + 3 * 2 * 20) + 4 * (2 * 28 + 20)
    assert training_memory(config).activations == 3 * 5 * (saved + AROUND)


@pytest.mark.parametrize(
    ("what", "seen"),
    [
        ("window: 3", [1, 2, 3, 3, 3]),
        ("window: 1", [1, 1, 1, 1, 1]),
        ("window: 9", [1, 2, 3, 4, 5]),
        ("chunk: 2", [1, 2, 1, 2, 1]),
        ("chunk: 3", [1, 2, 3, 1, 2]),
        ("chunk: 9", [1, 2, 3, 4, 5]),
    ],
)
def test_window_or_chunk_limits_attention_scores_only(what, seen):
    limited, full = one_layer(GROUPED.replace("}", f", {what}}}")).model, one_layer().model
    flops, all_flops = (flops_per_token(spec, 5, False) for spec in (limited, full))
    assert flops.attention_scores == round(Fraction(4 * 8 * 6 * sum(seen), 5))
    assert flops.total - flops.attention_scores == all_flops.total - all_flops.attention_scores
    assert kv_cache_bytes_per_token(limited) == kv_cache_bytes_per_token(full)


def test_a_dynamic_mask_limits_attention_scores_and_projects_values():
    masked, full = one_layer(GROUPED.replace("}", ", dynamic_mask: {keep: 3}}")).model, one_layer().model
    flops, all_flops = (flops_per_token(spec, 5, False) for spec in (masked, full))
    assert flops.attention_scores == round(Fraction(4 * 8 * 6 * (1 + 2 + 3 + 3 + 3), 5))
    assert flops.attention_projections == all_flops.attention_projections + 2 * 2 * 6 * 2
    assert kv_cache_bytes_per_token(masked) == kv_cache_bytes_per_token(full)


def test_zero_computation_experts_reduce_active_experts():
    config = one_layer(rest=f"moe: {MOE}")
    counts, flops = parameter_counts(config.model), flops_per_token(config.model, 5, False)
    used = Fraction(14, 15)  # 2 * 3.5 / (3.5 + 4)
    assert active_experts(config.model.layers[0].moe) == used
    around, constant, matrix = 2 * 20 * 8, 2 * 20 + 2 * 20 * 2, 8 * 12
    assert counts.by_role["routed experts"] == around + constant + 7 * 2 * matrix
    assert counts.active_by_role["routed experts"] == around + constant + 2 * round(used * matrix)
    assert counts.by_role["router"] == counts.active_by_role["router"] == 20 * 11
    assert counts.by_role["shared experts"] == 2 * 20 * 9
    assert flops.routed_experts == round(2 * (around + constant + used * 2 * matrix))
    assert flops.router == 2 * 20 * 11
    attention = 4 * (4 * 20 + 3 * (8 + 2) * 6) + 4 * 8 * 5
    saved = attention + 8 * 11 + 4 * 2 * (2 * 12 + 2 * 8) + 4 * 2 * 9
    assert training_memory(config).activations == 3 * 5 * (saved + AROUND)


@pytest.mark.parametrize(
    ("router", "parameters", "matrices"),
    [
        ("bias: true", 20 * 7 + 7, 20 * 7),
        ("selection_bias: {}", 20 * 7 + 7, 20 * 7),
        ("input: normalized, per_expert_scale: true", 20 * 7 + 20 + 7, 20 * 7),
        ("choice: {kind: hash}", 20 * 7 + 11 * 2, 20 * 7),
        ("renormalize: none, choice: {kind: expert_choice}", 20 * 7 + 7 + 1, 20 * 7),
        ("choice: {kind: noisy_top_k}", 2 * 20 * 7, 2 * 20 * 7),
    ],
)
def test_router_biases_scales_and_state_count_as_parameters_but_cost_no_flops(router, parameters, matrices):
    moe = f"moe: {{num_experts: 7, router: {{top_k: 2, {router}}}, experts: {{hidden_dim: 12}}}}"
    spec = one_layer(rest=moe).model
    assert parameter_counts(spec).by_role["router"] == parameters
    assert flops_per_token(spec, 5, False).router == 2 * matrices
    assert active_experts(spec.layers[0].moe) == 2


def test_learned_positions_are_embeddings_without_flops():
    text = CONFIG.replace("embed_dim: 20", "embed_dim: 20\n  position: {kind: learned, max_length: 13}")
    spec, without = parse_config(text).model, parse_config(CONFIG).model
    assert parameter_counts(spec).by_role["embeddings"] == 2 * 11 * 20 + 13 * 20
    assert flops_per_token(spec, 5, False) == flops_per_token(without, 5, False)


def test_window_or_chunks_limit_cache_bytes():
    heads = GroupedQueryAttentionSpec(num_heads=8, num_kv_heads=2, head_dim=6)
    kinds = (heads, heads.model_copy(update={"window": 7}), heads.model_copy(update={"chunk": 11}))
    layers = tuple(LayerSpec(attention=kind, feed_forward=GatedFeedForwardSpec(hidden_dim=4)) for kind in kinds)
    spec = ModelSpec(vocab_size=9, embed_dim=8, layers=layers)
    assert cache_bytes(spec, 5) == 5 * kv_cache_bytes_per_token(spec)
    assert cache_bytes(spec, 20) == (20 + 7 + 11) * 2 * 2 * 6 * 4
    sharing = LayerSpec(
        attention=heads.model_copy(update={"keys_of_layer": 1}), feed_forward=GatedFeedForwardSpec(hidden_dim=4)
    )
    wider = ModelSpec(vocab_size=9, embed_dim=8, layers=(*layers, sharing))
    assert wider.reaches[1] is None
    assert cache_bytes(wider, 20) == (20 + 20 + 11) * 2 * 2 * 6 * 4
