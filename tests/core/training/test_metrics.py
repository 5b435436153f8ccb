import numpy as np

from moezoo.core.training.metrics import (
    LayerRecord,
    MetricsFile,
    RoutingStatistics,
    StepRecord,
    layer_losses,
    layer_state,
    routing_statistics,
)


def test_layer_state_has_short_names_and_cutoffs_are_averages():
    state = {
        "layers.0.moe.router.selection_bias": np.array([0.25, -0.5], np.float32),
        "layers.1.moe.router.cutoff": np.array([0.02, 0.04], np.float32),
        "layers.1.moe.router.cutoff_weight": np.array([0.1], np.float32),
    }
    assert layer_state(state, 0) == {"selection_bias": [0.25, -0.5]}
    assert layer_state(state, 1) == {"cutoff": [0.2, 0.4]}
    assert layer_state(state, 10) == {}


def test_layer_losses_match_the_exact_layer_index():
    losses = {"loss": 1.0, "layers.1.router_z": 2.0, "layers.11.router_z": 3.0}
    assert layer_losses(losses, 1) == {"router_z": 2.0}


def test_load_is_a_share_and_worst_load_is_relative_to_uniform():
    (row,) = routing_statistics([3], [np.array([6, 2, 0, 0])], [2])
    assert row == RoutingStatistics(layer=3, load=(0.75, 0.25, 0.0, 0.0), worst_load=3.0, dropped=0.25)


def test_training_record_is_written_with_its_keys_in_order(tmp_path):
    layers = tuple(
        LayerRecord(RoutingStatistics(layer, (0.75, 0.25), worst, 0.0), {"router_z": 2.0}, {"cutoff": [0.5, 0.25]})
        for layer, worst in ((1, 1.5), (3, 1.25))
    )
    losses = {"loss": 2.5, "cross_entropy": float("nan"), "router_z": 2.0, "router_z_weighted": 0.5}
    record = StepRecord(7, 640, losses, 1.5, 0.001, None, layers)
    assert (record.loss, record.worst_load, record.weighted_losses) == (2.5, 1.5, {"router_z": 0.5})
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(record)
    file.close()
    layer = '{{"layer": {}, "load": [0.75, 0.25], "worst_load": {}, "dropped": 0.0, "losses": {{"router_z": 2.0}}, {}}}'
    rows = ", ".join(layer.format(*row, '"cutoff": [0.5, 0.25]') for row in ((1, 1.5), (3, 1.25)))
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 7, "tokens": 640, "loss": 2.5, "cross_entropy": null, "router_z": 2.0, "router_z_weighted": 0.5, '
        f'"gradient_norm": 1.5, "learning_rate": 0.001, "tokens_per_second": null, "routing": [{rows}]}}\n'
    )
