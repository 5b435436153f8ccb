import numpy as np
import pytest

from moezoo.core.config.optimizers import AdamWConfig
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.random import micro_batch_keys
from moezoo.core.reference.router_state import updated_bias, updated_cutoff, updated_state
from moezoo.core.spec import (
    ExpertChoiceSpec,
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    RouterSpec,
    SelectionBiasSpec,
)
from tests.support.tolerances import EXACT, FLOAT32, FLOAT64, assert_all_close, assert_close
from tests.support.twins import D, E, F, H, K, M, N, Twin, V, beside, normal

ATTENTION = GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H)
BIASED = RouterSpec(top_k=K, score="sigmoid", selection_bias=SelectionBiasSpec(rate=0.25))
CHOSEN = RouterSpec(top_k=K, renormalize="none", choice=ExpertChoiceSpec(decay=0.9))
OPTIMIZER = AdamWConfig(learning_rate=1e-3)


def model(*routers: RouterSpec) -> ModelSpec:
    layers = tuple(
        LayerSpec(
            attention=ATTENTION,
            moe=MoESpec(num_experts=E, router=router, experts=GatedFeedForwardSpec(hidden_dim=F)),
        )
        for router in routers
    )
    return ModelSpec(vocab_size=V, embed_dim=D, layers=layers)


def state_rows(spec: ModelSpec) -> list[str]:
    return [row.name for row in parameter_table(spec) if not row.trained]


def test_an_expert_below_the_mean_goes_up_and_one_at_the_mean_stays(twin: Twin) -> None:
    load_E, bias_E = np.array([0, 3, 6, 3, 3, 1, 5]), normal(0, E)  # the mean is 3
    expected = bias_E + 0.25 * np.array([1, 0, -1, 0, 0, 1, -1])
    assert_close(updated_bias(bias_E, load_E, 0.25), expected, FLOAT64)
    actual = twin.module("router_state").updated_bias(twin.array(bias_E), twin.array(load_E), 0.25)
    assert_close(twin.numpy(actual), expected, FLOAT32)


def test_a_mean_that_float32_cannot_represent_changes_no_bias(twin: Twin) -> None:
    load_E = np.full(E, 2**24 + 1)
    bias_E = twin.module("router_state").updated_bias(twin.array(np.zeros(E)), twin.array(load_E), 0.25)
    assert_close(twin.numpy(bias_E), np.zeros(E), EXACT)


def test_a_cutoff_divided_by_its_weight_is_the_mean_of_its_inputs(twin: Twin) -> None:
    lowest_E = np.abs(normal(1, E))
    for function, array in (
        (updated_cutoff, np.asarray),
        (twin.module("router_state").updated_cutoff, lambda values: twin.array(np.asarray(values, np.float64))),
    ):
        cutoff_E, weight = array(np.zeros(E)), array(np.zeros(1))
        for _ in range(3):
            cutoff_E, weight = function(cutoff_E, weight, array(lowest_E), 0.9)
        ratio = np.asarray(cutoff_E, np.float64) / np.asarray(weight, np.float64)
        assert_close(ratio, lowest_E, FLOAT32)


def test_each_layer_is_updated_by_its_own_load_and_cutoffs(twin: Twin) -> None:
    spec = model(BIASED, CHOSEN)
    assert state_rows(spec) == [
        "layers.0.moe.router.selection_bias",
        "layers.1.moe.router.cutoff",
        "layers.1.moe.router.cutoff_weight",
    ]
    state = {name: normal(place, *((1,) if "weight" in name else (E,))) for place, name in enumerate(state_rows(spec))}
    loads, cutoffs = [np.arange(E), np.ones(E, np.int64)], [None, np.abs(normal(7, E))]
    expected = updated_state(spec, state, loads, cutoffs)
    actual = twin.module("router_state").updated_state(
        spec,
        {name: twin.array(value) for name, value in state.items()},
        [twin.array(load_E) for load_E in loads],
        [None, twin.array(cutoffs[1])],
    )
    assert_all_close({name: twin.numpy(value) for name, value in actual.items()}, expected, FLOAT32)


@pytest.mark.parametrize("router", [BIASED, CHOSEN], ids=["bias", "cutoff"])
def test_a_step_moves_state_once_and_no_optimizer_keeps_moments_for_it(twin: Twin, router: RouterSpec) -> None:
    spec = model(router)
    weights = initial_weights(spec, 0)
    windows = np.random.default_rng(0).integers(0, V, (4, 3, 6)).astype(np.int32)
    stepped = {}
    for each, parts in ((beside(), 1), (twin, 4)):
        built = each.backend().build(spec, weights)
        built.start_training(OPTIMIZER)
        batch = windows.reshape(parts, 12 // parts, 6)
        built.train_step(batch, 1e-3, micro_batch_keys(0, 0, parts)).fetch()
        stepped[parts] = built.export_parameters()
        assert not [name for name in built.export_optimizer() if "router.selection" in name or "cutoff" in name]
    for name in state_rows(spec):
        assert np.any(stepped[1][name] != weights[name]), name
        if router is BIASED:
            np.testing.assert_array_equal(stepped[1][name], stepped[4][name])
            assert np.max(np.abs(stepped[4][name])) == np.float32(0.25)
        if name.endswith("cutoff_weight"):
            assert_close(stepped[4][name], np.array([0.1]), FLOAT32)


def test_state_has_no_gradient(twin: Twin) -> None:
    spec = model(BIASED)
    tokens = np.random.default_rng(1).integers(0, V, (2, 6)).astype(np.int32)
    _, gradients = (
        twin.backend().build(spec, initial_weights(spec, 0)).loss_and_gradients(tokens[:, :-1], tokens[:, 1:])
    )
    assert sorted(gradients) == sorted(row.name for row in parameter_table(spec) if row.trained)
