"""Costs against sums done by hand. Sizes are unequal, so that a swapped letter changes the number."""

import pytest

from moezoo.core.config import parse_config
from moezoo.core.cost import flops_per_token, kv_cache_bytes_per_token, parameter_counts, training_memory
from moezoo.core.errors import SpecError
from moezoo.core.parameters import ROLES, parameter_table
from moezoo.core.spec import ModelSpec

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


def test_parameters_by_role_equal_sums_by_hand(config):
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


def test_active_parameters_are_k_of_e_experts_and_all_the_rest(config):
    counts = parameter_counts(config.model)
    rest = counts.total - counts.by_role["routed experts"]
    assert counts.active_by_role["routed experts"] == 2 * 2 * 3 * 20 * 12
    assert counts.active == rest + 2 * 2 * 3 * 20 * 12
    assert counts.total == sum(row.size for row in parameter_table(config.model))


def test_layers_with_different_k_and_e_each_count_their_own(config):
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


def test_a_tied_head_is_counted_once_but_still_multiplies(config):
    tied = ModelSpec.model_validate({**config.model.model_dump(), "head": {"kind": "tied"}})
    assert parameter_counts(tied).by_role["embeddings"] == 11 * 20
    assert flops_per_token(tied, 5, False).head == flops_per_token(config.model, 5, False).head == 2 * 20 * 11


def test_flops_by_part_equal_sums_by_hand(config):
    flops = flops_per_token(config.model, sequence_length=5, training=False)
    visible = (1 + 2 + 3 + 4 + 5) / 5
    assert flops.attention_projections == 3 * 2 * (20 * 6 * (8 + 2 + 2) + 8 * 6 * 20)
    assert flops.attention_scores == 3 * 2 * (2 * 8 * 6 * visible)
    assert flops.feed_forward == 2 * 3 * 20 * 28
    assert flops.router == 2 * 2 * 20 * 7
    assert flops.routed_experts == 2 * 2 * (2 * 3 * 20 * 12)
    assert flops.shared_experts == 2 * (2 * 3 * 20 * 18)
    assert flops.total == sum(flops.by_part.values())


def test_training_is_three_forward_passes(config):
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


def test_training_memory_equals_its_formula_by_hand(config):
    parameters, tokens = parameter_counts(config.model).total, 3 * 5
    attention = 4 * (4 * 20 + 3 * 48 + 3 * 12) + 4 * 8 * 5
    dense = 4 * (4 * 28 + 20)
    moe = 8 * 7 + 4 * 2 * (4 * 12 + 2 * 20) + 4 * 4 * 18
    assert training_memory(config) == {
        "parameters": 4 * parameters,
        "gradients": 8 * parameters,
        "moments": 8 * parameters,
        "activations": tokens * (3 * attention + dense + 2 * moe + 2 * 4 * 20),
        "logits": 8 * tokens * 11,
    }


def test_without_accumulation_there_is_one_gradient(config):
    training = config.training.model_copy(update={"gradient_accumulation": 1})
    memory = training_memory(config.model_copy(update={"training": training}))
    assert memory["gradients"] == memory["parameters"]
    assert memory["logits"] == 8 * 6 * 5 * 11


def test_a_null_vocabulary_is_refused_by_name(config):
    spec = with_model(config, vocab_size=None).model
    for cost in (parameter_counts, lambda spec: flops_per_token(spec, 5, True)):
        with pytest.raises(SpecError, match=r"model\.vocab_size is null"):
            cost(spec)
