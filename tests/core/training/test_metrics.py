import numpy as np

from moezoo.core.training.metrics import layer_losses, layer_state, routing_statistics


def test_state_of_a_layer_goes_by_its_short_name_and_a_cutoff_is_an_average():
    state = {
        "layers.0.moe.router.selection_bias": np.array([0.25, -0.5], np.float32),
        "layers.1.moe.router.cutoff": np.array([0.02, 0.04], np.float32),
        "layers.1.moe.router.cutoff_weight": np.array([0.1], np.float32),
    }
    assert layer_state(state, 0) == {"selection_bias": [0.25, -0.5]}
    assert layer_state(state, 1) == {"cutoff": [0.2, 0.4]}
    assert layer_state(state, 10) == {}


def test_a_layer_has_the_losses_that_name_it():
    losses = {"loss": 1.0, "layers.1.router_z": 2.0, "layers.11.router_z": 3.0}
    assert layer_losses(losses, 1) == {"router_z": 2.0}


def test_load_is_a_share_and_the_worst_one_is_relative_to_a_fair_share():
    (row,) = routing_statistics([3], [np.array([6, 2, 0, 0])], [2])
    assert row == {"layer": 3, "load": [0.75, 0.25, 0.0, 0.0], "worst_load": 3.0, "dropped": 0.25}
