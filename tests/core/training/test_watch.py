"""Warnings while a run trains: each is given once, and noise is none."""

import numpy as np
import pytest

from moezoo.core.training.watch import WINDOW, Watch


def train(watch: Watch, steps: range, loads: list[list[int]], loss=lambda step: 2.0) -> list[str]:
    for step in steps:
        watch.add(step, loss(step), [np.array(load, np.int64) for load in loads])
    return watch.warnings()


def windows(first: int, last: int) -> range:
    return range(first * WINDOW + 1, (last + 1) * WINDOW + 1)


def test_experts_without_tokens_are_named_once_in_one_line():
    watch = Watch([1, 4])
    load = [[3, 3, 0, 4], [0, 0, 5, 5]]
    assert train(watch, range(1, WINDOW), load) == []
    assert train(watch, range(WINDOW, WINDOW + 1), load) == [
        "warning: no token in steps 1-100 for expert 2 of 4 in layer 1, experts 0, 1 of 4 in layer 4"
    ]
    assert train(watch, windows(1, 3), load) == []
    assert train(watch, windows(4, 4), [[3, 3, 0, 4], [0, 0, 0, 9]]) == [
        "warning: no token in steps 401-500 for expert 2 of 4 in layer 4",
        "warning: MaxVio above 2 in steps 401-500: layer 4: 3.00 (expert 3)",
    ]


def test_a_token_in_the_window_is_enough():
    watch = Watch([0])
    assert train(watch, range(1, 3), [[1, 1]]) + train(watch, range(3, WINDOW + 1), [[0, 9]]) == []


def test_many_idle_experts_are_counted():
    assert train(Watch([0]), windows(0, 0), [[1] * 30 + [0] * 30])[0].endswith(
        "for experts 30, 31, 32, 33, 34, 35, 36, 37 and 22 more of 60 in layer 0"
    )


def test_a_layer_is_unbalanced_over_a_window_once():
    watch = Watch([0, 2])
    load = [[9, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 3]]
    assert train(watch, windows(0, 2), load) == ["warning: MaxVio above 2 in steps 1-100: layer 0: 2.86 (expert 0)"]


def test_only_a_spike_larger_than_the_last_one_is_reported():
    noise = np.random.default_rng(0).normal(2, 0.05, 10 * WINDOW)
    spikes = {250: 3.5, 251: 3.4, 420: 3.0, 777: 5.0}
    found = train(Watch([]), windows(0, 8), [], lambda step: spikes.get(step, noise[step]))
    assert [warning[:39] for warning in found] == [
        "warning: loss 3.5000 at step 250 is a s",
        "warning: loss 5.0000 at step 777 is a s",
    ]
    assert "the median of steps 101-200 was 1.9984" in found[0]


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_a_falling_loss_are_no_spikes(seed):
    noise = np.random.default_rng(seed).normal(0, 0.1, 30 * WINDOW)
    assert train(Watch([]), windows(0, 28), [], lambda step: 1 + 4 * 0.997**step + noise[step]) == []


def test_losses_that_hardly_differ_make_no_spike_of_a_small_rise():
    assert train(Watch([]), windows(0, 2), [], lambda step: 2.0 if step < 250 else 2.09) == []
