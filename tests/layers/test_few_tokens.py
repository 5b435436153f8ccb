"""Few tokens on MLX, as in decoding: chosen experts are indexed, without a dispatch; text and numbers stay the same."""

from pathlib import Path

import numpy as np
import pytest

from moezoo.core.config.run_config import load_config
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.choice import RoutingContext
from moezoo.core.reference.moe import moe
from moezoo.core.spec import ExpertChoiceSpec, PlainFeedForwardSpec, RouterSpec, TopPChoiceSpec
from tests.layers.test_moe import (
    RAW_BTD,
    SPECS,
    assert_bfloat16_is_near_float32,
    context_of,
    layer_of,
    moe_of,
    output,
    values_of,
)
from tests.support.backends_available import require_backend
from tests.support.tolerances import FLOAT32, assert_close
from tests.support.twins import B, D, E, F, K, Twin, assert_layer_matches, normal

SMALL = Path(__file__).parents[2] / "configs" / "bench" / "small.yaml"
ROWS, LENGTH = 2, 3  # six tokens, at most two rows per expert
X_BTD = normal(0, ROWS, LENGTH, D)
KINDS = SPECS | {
    "top p": moe_of(router=RouterSpec(top_k=K, choice=TopPChoiceSpec(p=0.4))),
    "biases": moe_of(experts=PlainFeedForwardSpec(kind="gelu", hidden_dim=F, bias=True)),
}
DISPATCHED = {kind for kind in KINDS if "computation" in kind or "capacity" in kind} | {
    *("weight on input", "copies", "top p"),
}


@pytest.fixture(params=[False, True], ids=["one stream", "two streams"])
def mlx(request, monkeypatch) -> Twin:
    require_backend("mlx")
    twin = Twin("mlx")
    kernels = twin.module("kernels.chosen_experts")
    monkeypatch.setattr(kernels, "is_x86_cpu", lambda: request.param)
    monkeypatch.setattr(kernels, "ROWS_OF_TWO_STREAMS", 1)
    return twin


@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens_match_the_reference_and_are_dispatched_only_where_slots_may_be_unused(mlx, kind):
    spec = KINDS[kind]
    values = values_of(spec)
    inputs = {"x_BTD": X_BTD} | ({"raw_BTD": RAW_BTD[:ROWS, :LENGTH]} if kind == "parallel" else {})
    assert_layer_matches(
        mlx,
        layer_of(mlx, spec, values),
        lambda layer, *arrays: layer(**dict(zip(inputs, arrays, strict=True)))[0],
        lambda values, *arrays: moe(spec, values, **dict(zip(inputs, arrays, strict=True)))[0],
        values,
        *inputs.values(),
    )
    found = layer_of(mlx, spec, values)(mlx.array(X_BTD))[2]
    assert (found is not None) == (kind in DISPATCHED)


@pytest.mark.parametrize("kind", ["capacity", "capacity by score", "capacity of sequences", "weight on input"])
def test_a_capacity_that_inference_ignores_needs_no_dispatch(mlx, kind):
    spec = SPECS[kind]
    layer = layer_of(mlx, spec)
    out, _, dispatched = layer(mlx.array(X_BTD), context_of(mlx, inference=True))
    assert dispatched is None
    expected = moe(spec, values_of(spec), X_BTD, RoutingContext(inference=True))[0]
    assert_close(mlx.numpy(out), expected, FLOAT32)


def test_cutoffs_of_expert_choice_keep_the_dispatch(mlx):
    spec = moe_of(router=RouterSpec(top_k=K, renormalize="none", choice=ExpertChoiceSpec()))
    values = values_of(spec) | {"router.cutoff": np.full(E, 0.2), "router.cutoff_weight": np.ones(1)}
    _, _, dispatched = layer_of(mlx, spec, values)(mlx.array(X_BTD[:1, :1]), context_of(mlx, inference=True))
    assert dispatched is not None


@pytest.mark.parametrize("kind", ["top 2", "latent, weight on input", "biases"])
def test_forced_slots_that_are_unused_add_nothing(mlx, kind):
    spec, forced_PK = KINDS[kind], np.array([[3, -1], [-1, 4], [2, 5], [0, 1], [6, -1], [4, 3]])
    expected = moe(spec, values_of(spec), X_BTD, RoutingContext(forced_PK=forced_PK))[0]
    assert_close(output(mlx, spec, X_BTD, forced_PK=forced_PK), expected, FLOAT32)


@pytest.mark.parametrize("kind", ["top 2", "latent, weight on input", "biases"])
def test_few_tokens_of_bfloat16_are_near_float32(mlx, kind):
    assert_bfloat16_is_near_float32(mlx, KINDS[kind], X_BTD)


def test_a_token_takes_few_operations():
    """Each costs some microseconds. 340 were counted; MLX's own norms, rotations and einsums made it 890."""
    require_backend("mlx")
    from moezoo.mlx_backend.planning.operations import operations_per_token

    spec = load_config(SMALL).model
    assert operations_per_token(Twin("mlx").backend().build(spec, initial_weights(spec, 0))) <= 400


def test_output_of_few_tokens_is_that_of_many(mlx):
    """A pass reports the same experts, weights and drops whichever way it takes."""
    spec = SPECS["top 2"]
    many = output(mlx, spec, np.tile(X_BTD, (B, 1, 1)))[:ROWS]
    assert_close(output(mlx, spec, X_BTD), many, FLOAT32)
