import itertools
import math

import pytest
from pydantic import TypeAdapter, ValidationError

from moezoo.core.config.schedules import (
    ConstantSchedule,
    CosineSchedule,
    InverseSquareRootSchedule,
    Schedule,
    WSDSchedule,
    learning_rate,
)
from moezoo.core.errors import SpecError

PEAK = 3e-4
ALL_KINDS = (
    ConstantSchedule(warmup_steps=10),
    CosineSchedule(warmup_steps=10, final_fraction=0.1),
    CosineSchedule(warmup_steps=10),
    WSDSchedule(warmup_steps=10, decay_shape="linear"),
    WSDSchedule(warmup_steps=10, decay_shape="1-sqrt", final_fraction=0.1),
    InverseSquareRootSchedule(warmup_steps=10),
    InverseSquareRootSchedule(warmup_steps=10, time_scale_steps=3),
)


def rates(schedule, total_steps=100, peak=PEAK):
    return [learning_rate(schedule, peak, step, total_steps) for step in range(total_steps + 1)]


@pytest.mark.parametrize("schedule", ALL_KINDS, ids=lambda schedule: schedule.kind)
def test_warm_up_is_linear_and_ends_at_the_peak(schedule):
    rate = rates(schedule)
    assert rate[:10] == [pytest.approx(PEAK * (step + 1) / 10, rel=1e-15) for step in range(10)]
    assert rate[9] == rate[10] == PEAK  # the last step of the warm-up and the first one after it


@pytest.mark.parametrize("schedule", ALL_KINDS, ids=lambda schedule: schedule.kind)
def test_rate_never_rises_after_the_warm_up_and_is_never_negative(schedule):
    rate = rates(schedule)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rate[9:]))
    assert all(0 < value <= PEAK for value in rate[:-1])  # no update is wasted
    assert rate[-1] >= 0


@pytest.mark.parametrize("schedule", ALL_KINDS, ids=lambda schedule: schedule.kind)
def test_without_warm_up_the_first_update_has_the_peak(schedule):
    no_warmup = schedule.model_copy(update={"warmup_steps": 0})
    assert learning_rate(no_warmup, PEAK, 0, 100) == PEAK
    assert learning_rate(no_warmup, PEAK, 0, 1) == PEAK


@pytest.mark.parametrize("schedule", ALL_KINDS, ids=lambda schedule: schedule.kind)
def test_rate_is_proportional_to_the_peak(schedule):
    assert rates(schedule, peak=0.0) == [0.0] * 101
    assert rates(schedule, peak=2 * PEAK) == [pytest.approx(2 * rate, rel=1e-15) for rate in rates(schedule)]


def test_constant_schedule_is_constant():
    assert set(rates(ConstantSchedule())) == {PEAK}


def test_cosine_has_its_midpoint_and_ends_at_the_final_fraction():
    rate = rates(CosineSchedule(warmup_steps=20, final_fraction=0.1))
    assert rate[60] == pytest.approx(PEAK * 0.55, rel=1e-14)
    assert rate[40] == pytest.approx(PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2), rel=1e-14)
    assert rate[100] == PEAK * 0.1
    assert rate[99] == pytest.approx(PEAK * 0.1, rel=0.01)
    assert learning_rate(CosineSchedule(), PEAK, 100, 100) == 0.0
    assert learning_rate(CosineSchedule(), PEAK, 1000, 100) == 0.0


@pytest.mark.parametrize(("shape", "quarter", "half"), [("linear", 0.75, 0.5), ("1-sqrt", 0.5, 1 - math.sqrt(0.5))])
def test_wsd_is_stable_and_then_decays_with_the_configured_shape(shape, quarter, half):
    rate = rates(WSDSchedule(warmup_steps=10, decay_fraction=0.2, decay_shape=shape))
    assert set(rate[9:81]) == {PEAK}
    assert rate[81] < PEAK
    assert rate[85] == pytest.approx(PEAK * quarter, rel=1e-14)
    assert rate[90] == pytest.approx(PEAK * half, rel=1e-14)
    assert rate[100] == 0.0
    assert rates(WSDSchedule(decay_shape=shape, final_fraction=0.1))[100] == PEAK * 0.1


def test_wsd_with_decay_fraction_0_is_constant_and_1_is_linear():
    assert set(rates(WSDSchedule(decay_fraction=0.0))) == {PEAK}
    linear = rates(WSDSchedule(decay_fraction=1.0, decay_shape="linear"))
    assert linear == [pytest.approx(PEAK * (1 - step / 100), rel=1e-14) for step in range(101)]


def test_overlapping_warm_up_and_decay_multiply():
    schedule = WSDSchedule(warmup_steps=60, decay_fraction=0.5, decay_shape="linear")
    assert learning_rate(schedule, 1.0, 54, 100) == pytest.approx(55 / 60 * 0.92, rel=1e-14)


def test_inverse_square_root_follows_its_time_scale():
    rate = rates(InverseSquareRootSchedule(warmup_steps=16))
    assert rate[64] == PEAK / 2  # sqrt(16 / 64)
    rate = rates(InverseSquareRootSchedule(warmup_steps=16, time_scale_steps=8))
    assert rate[16 + 24] == PEAK / 2  # sqrt(8 / 32)
    assert rates(InverseSquareRootSchedule())[3] == PEAK / 2  # time scale 1


def test_run_shorter_than_its_warm_up_never_reaches_the_peak():
    for schedule in ALL_KINDS:
        assert learning_rate(schedule.model_copy(update={"warmup_steps": 100}), 1.0, 4, 5) <= 0.05


@pytest.mark.parametrize(
    ("peak", "step", "total", "problem"),
    [(1.0, -1, 10, "step -1 of 10"), (1.0, 0, 0, "step 0 of 0"), (-1.0, 0, 1, "peak learning rate is -1.0")]
    + [(value, 0, 1, "expected a finite number") for value in (math.nan, math.inf)],
)
def test_invalid_arguments_raise(peak, step, total, problem):
    with pytest.raises(SpecError, match=problem):
        learning_rate(ConstantSchedule(), peak, step, total)


def test_kind_selects_the_schedule_and_unknown_keys_are_refused():
    adapter = TypeAdapter(Schedule)
    for schedule in ALL_KINDS:
        assert adapter.validate_python(schedule.model_dump()) == schedule
    for bad in (
        {"kind": "cosin"},
        {"kind": "cosine", "warmup": 3},
        {"kind": "cosine", "warmup_steps": -1},
        {"kind": "cosine", "final_fraction": 1.5},
        {"kind": "wsd", "decay_shape": "sqrt"},
        {"kind": "inverse_square_root", "time_scale_steps": 0},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(bad)


def test_schedule_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        ConstantSchedule().warmup_steps = 3
