"""Learning-rate schedules, shared by both backends: peak * warm-up factor * decay factor.

Steps are counted from 0, and `learning_rate(schedule, peak, step, total_steps)` is the rate of the update of that
step. The warm-up is linear and has no update with rate zero: with w warm-up steps, step 0 uses peak/w and step w-1
the peak. The decay starts at step w, whose rate is the peak again, and reaches its final value at
step = total_steps, just after the last update, so the last update does not have rate zero either.
"""

import math
from typing import Annotated, Literal, assert_never

from pydantic import Field, NonNegativeInt, PositiveInt

from moezoo.core.errors import SpecError
from moezoo.core.spec import Part

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class _Schedule(Part):
    warmup_steps: NonNegativeInt = 0


class ConstantSchedule(_Schedule):
    """Constant learning rate after the warm-up."""

    kind: Literal["constant"] = "constant"


class CosineSchedule(_Schedule):
    """Cosine decay from the peak to `final_fraction` of it.

    Source: Loshchilov and Hutter 2016, arXiv 1608.03983, eq. 5, without restarts.
    """

    kind: Literal["cosine"] = "cosine"
    final_fraction: Fraction = 0.0


class WSDSchedule(_Schedule):
    """Warmup-stable-decay: constant at the peak, then decay over the last `decay_fraction` of all steps.

    The decay ends at `final_fraction` of the peak. `decay_shape` is `linear`, 1 - x, or `1-sqrt`, 1 - sqrt(x), for x
    from 0 to 1 over the decay. The decay has round(decay_fraction * total_steps) steps.

    Source: Hu et al. 2024, MiniCPM, arXiv 2404.06395, section 4; the two shapes are those of Hägele et al.
    2024, arXiv 2405.18392, section 3.
    Differs: MiniCPM decays exponentially.
    """

    kind: Literal["wsd"] = "wsd"
    decay_fraction: Fraction = 0.2
    decay_shape: Literal["linear", "1-sqrt"] = "1-sqrt"
    final_fraction: Fraction = 0.0


class InverseSquareRootSchedule(_Schedule):
    """Inverse square root decay: peak * sqrt(t / (t + step - w)) after w warm-up steps, with t = `time_scale_steps`.

    A time scale of null means t = w (at least 1): then the rate is peak * sqrt(w / step).

    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 3, for t = w; the time scale as in Zhai et al. 2021,
    arXiv 2106.04560, and its code, big_vision.
    Differs: the peak is an argument, not derived from the width; Vaswani et al. count steps from 1.
    """

    kind: Literal["inverse_square_root"] = "inverse_square_root"
    time_scale_steps: PositiveInt | None = None


Schedule = Annotated[
    ConstantSchedule | CosineSchedule | WSDSchedule | InverseSquareRootSchedule, Field(discriminator="kind")
]


def learning_rate(schedule: Schedule, peak: float, step: int, total_steps: int) -> float:
    """Return the learning rate (float64, >= 0) of the update of `step`, counted from 0, in a run of `total_steps`.

    Formula: peak * min(1, (step + 1) / warmup_steps) * decay, where decay is 1 up to step warmup_steps and
    follows the schedule from there; the module docstring has the boundary cases. `peak` >= 0 is finite. A step at or
    past `total_steps` (an evaluation after the run) has the final rate. A run shorter than its warm-up never
    reaches the peak; if the decay of `wsd` overlaps the warm-up, the two factors multiply.

    Raises SpecError for a negative step, no steps, or a peak that is negative or not finite.
    """
    if step < 0 or total_steps < 1:
        raise SpecError(f"no learning rate at step {step} of {total_steps}; expected step >= 0 and total_steps >= 1.")
    if not (math.isfinite(peak) and peak >= 0):
        raise SpecError(f"the peak learning rate is {peak}; expected a finite number >= 0.")
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    return peak * warmup * _decay(schedule, step, total_steps)


def _decay(schedule: Schedule, step: int, total_steps: int) -> float:
    match schedule:
        case ConstantSchedule():
            return 1.0
        case CosineSchedule():
            progress = _progress(step, schedule.warmup_steps, total_steps)
            # cos(x)/2 + 1/2 as a squared cosine: it cannot go below zero by rounding
            return _between(schedule.final_fraction, math.cos(math.pi / 2 * progress) ** 2, progress)
        case WSDSchedule():
            decay_steps = round(schedule.decay_fraction * total_steps)
            progress = _progress(step, total_steps - decay_steps, total_steps)
            shape = 1 - progress if schedule.decay_shape == "linear" else 1 - math.sqrt(progress)
            return _between(schedule.final_fraction, shape, progress)
        case InverseSquareRootSchedule():
            time_scale = schedule.time_scale_steps or max(schedule.warmup_steps, 1)
            return math.sqrt(time_scale / (time_scale + max(0, step - schedule.warmup_steps)))
        case _:
            assert_never(schedule)


def _progress(step: int, start: int, end: int) -> float:
    """Return the completed fraction of a decay from step `start` to step `end`, in [0, 1]; 0 if it has no steps."""
    if step <= start or start >= end:
        return 0.0
    return min(1.0, (step - start) / (end - start))


def _between(final: float, shape: float, progress: float) -> float:
    return final if progress == 1.0 else final + (1 - final) * shape
