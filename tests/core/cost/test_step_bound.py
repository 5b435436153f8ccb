"""The least time of a step: its formula, by hand, and the figures of devices."""

import pytest
from rich.console import Console

from moezoo.core.config.run_config import load_config
from moezoo.core.cost.make_plan import Plan, make_plan
from moezoo.core.cost.step_bound import ACCELERATORS, StepBound, accelerator
from moezoo.core.errors import SpecError
from moezoo.core.files import PACKAGE
from moezoo.core.reports.plan_page import plan_page

SMALL = PACKAGE / "configs" / "bench" / "small.yaml"


def planned(on: str, *overrides: str, memory: int | None = None) -> tuple[Plan, StepBound]:
    plan = make_plan(load_config(SMALL, overrides), None, memory, on=accelerator(on))
    assert plan.bound is not None
    return plan, plan.bound


def test_the_bound_is_the_largest_of_its_limits() -> None:
    plan, bound = planned("1TFLOP/s,100GB/s", "training.gradient_accumulation=4")
    memory = plan.device.memory
    traffic = 4 * 2 * memory.parameters + 2 * (memory.parameters + memory.gradients + memory.moments)
    assert bound.memory_bytes == traffic
    assert bound.seconds_by_limit == {"compute": plan.flops / 1e12, "memory": traffic / 1e11, "communication": 0}
    assert bound.seconds == plan.flops / 1e12
    assert planned("1000TFLOP/s,1GB/s")[1].seconds == planned("1TFLOP/s,1GB/s")[1].memory_bytes / 1e9
    assert plan.to_json()["bound"]["seconds"] == bound.seconds
    assert "bound" not in make_plan(load_config(SMALL), None, None).to_json()


def test_bfloat16_reads_half_of_each_parameter_and_has_its_own_peak() -> None:
    (plan, float32), (_, bfloat16) = planned("H100"), planned("H100", "model.precision={compute: bfloat16}")
    assert float32.memory_bytes - bfloat16.memory_bytes == plan.device.memory.parameters
    assert (float32.flops_per_second, bfloat16.flops_per_second) == pytest.approx((66.9e12, 989.4e12))


def test_communication_counts_where_the_link_has_a_figure() -> None:
    links = (",1TB/s", ",1MB/s", "")
    (plan, fast), (_, slow), (_, unknown) = (planned(f"900TFLOP/s,900TB/s{link}", "mesh.data=2") for link in links)
    sent = plan.device.sent
    assert sent > 0
    assert fast.seconds_by_limit["communication"] == sent / 1e12
    assert slow.seconds == sent / 1e6
    assert unknown.seconds_by_limit["communication"] is None
    assert unknown.seconds < slow.seconds


def test_the_memory_of_an_accelerator_is_the_limit_unless_another_is_given() -> None:
    assert planned("tpu-V5E")[0].memory_limit == 16 * 10**9
    assert planned("H100", memory=5)[0].memory_limit == 5
    assert planned("M2")[0].memory_limit is None


def test_the_page_says_that_it_is_a_bound(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=100).print(plan_page(planned("M2")[0], "small"))
    shown = capsys.readouterr().out
    assert "least time of a step, M2" in shown
    assert "tokens/s on all devices: a bound, not a measurement, from Apple's" in shown


def test_names_are_plain_and_figures_have_units() -> None:
    assert accelerator("m1max") is ACCELERATORS["M1 Max"]
    assert all(own.source and own.flops["bfloat16"] >= own.flops["float32"] for own in ACCELERATORS.values())
    for wrong in ("M9", "18,546", "0TFLOP/s,1GB/s", "546GB/s,18TFLOP/s", "1TFLOP/s"):
        with pytest.raises(SpecError, match=r"--accelerator is .*; expected one of A100, .* such as 18TFLOP/s,546GB/s"):
            accelerator(wrong)
