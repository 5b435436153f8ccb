"""Least time of a training step on an accelerator, from the figures of its data sheet. Writing: writings/scaling.md."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moezoo.core.config.run_config import Config
from moezoo.core.cost.step_plan import DevicePlan
from moezoo.core.errors import SpecError, nearest
from moezoo.core.parameters.precision import compute_dtype

_PREFIXES = {"M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


@dataclass(frozen=True)
class Accelerator:
    """Figures of one device.

    Fields:
        name: of the device, or the figures as they were given.
        source: of the figures.
        flops: most operations per second of dense matrix products, by compute dtype.
        bandwidth: bytes per second between its memory and the chip.
        link: bytes per second that it sends to devices of its own machine or slice; None: not known.
        memory: bytes; None: not known.
    """

    name: str
    source: str
    flops: Mapping[str, float]
    bandwidth: float
    link: float | None = None
    memory: int | None = None


def _flops(bfloat16: float, float32: float) -> Mapping[str, float]:
    return {"bfloat16": bfloat16 * 1e12, "float32": float32 * 1e12}


def _tpu(name: str, bfloat16: float, bandwidth: float, link: float, memory: float) -> Accelerator:
    page = f"cloud.google.com/tpu/docs/{name.removeprefix('TPU ')}"
    # moezoo asks for the highest precision: a product in float32 is six in bfloat16
    return Accelerator(name, page, _flops(bfloat16, bfloat16 / 6), bandwidth, link, round(memory))


# Trap: sheets of GPUs lead with figures for sparse matrices, which are twice these; and links of GPUs and TPUs are
# stated for both directions together, of which a device sends in one.
_ALL = (
    Accelerator("A100", "NVIDIA's A100 80GB SXM data sheet", _flops(312, 19.5), 2.039e12, 300e9, 80 * 10**9),
    Accelerator("H100", "NVIDIA's H100 SXM data sheet", _flops(989.4, 66.9), 3.35e12, 450e9, 80 * 10**9),
    Accelerator("H200", "NVIDIA's H200 SXM data sheet", _flops(989.4, 66.9), 4.8e12, 450e9, 141 * 10**9),
    _tpu("TPU v5e", 197, 819e9, 200e9, 16e9),
    _tpu("TPU v5p", 459, 2765e9, 600e9, 95e9),
    _tpu("TPU v6e", 918, 1638e9, 400e9, 32e9),
    Accelerator("M1", "Apple's announcement of November 2020", _flops(2.6, 2.6), 68e9),
    Accelerator("M1 Max", "Apple's announcement of October 2021", _flops(10.4, 10.4), 400e9),
    Accelerator("M2", "Apple's announcement of June 2022", _flops(3.6, 3.6), 100e9),
)
ACCELERATORS: Mapping[str, Accelerator] = {own.name: own for own in _ALL}
"""Devices by name, with what their makers state."""


def accelerator(text: str) -> Accelerator:
    """Return a device by its name, in any case, or from figures: `18TFLOP/s,546GB/s`, with a link `...,25GB/s`.

    Raises SpecError: neither.
    """
    names = {_plain(name): name for name in ACCELERATORS}
    if _plain(text) in names:
        return ACCELERATORS[names[_plain(text)]]
    rates = [re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([MGTP])(FLOP|B)/s", part.strip()) for part in text.split(",")]
    units = [found and found[3] for found in rates]
    if units not in (["FLOP", "B"], ["FLOP", "B", "B"]) or any(found and float(found[1]) == 0 for found in rates):
        raise SpecError(
            f"--accelerator is {text!r:.100}{nearest(text, ACCELERATORS)}; expected one of {', '.join(ACCELERATORS)}, "
            "or figures, such as 18TFLOP/s,546GB/s: products, and memory; a third one is of what is sent to others."
        )
    peak, bandwidth, *link = [float(found[1]) * _PREFIXES[found[2]] for found in rates if found]
    figures = {"bfloat16": peak, "float32": peak}
    return Accelerator(text, "your figures", figures, bandwidth, link[0] if link else None)


def _plain(text: str) -> str:
    return re.sub(r"[\s_-]", "", text).lower()


@dataclass(frozen=True)
class StepBound:
    """Least seconds of one step on one device, which all others take too.

    Fields:
        on: the device.
        flops: operations of the step on the device, those of `core.cost.flops`.
        flops_per_second: its most, in the model's compute dtype.
        memory_bytes: bytes that the device must at least read or write, see `step_bound`.
        sent_bytes: bytes that it sends to others.
        dtype: that compute dtype.
    """

    on: Accelerator
    flops: int
    flops_per_second: float
    memory_bytes: int
    sent_bytes: int
    dtype: str

    @property
    def seconds_by_limit(self) -> dict[str, float | None]:
        """Seconds that each limit alone asks for; None: the link of the device is not known."""
        link = self.on.link
        return {
            "compute": self.flops / self.flops_per_second,
            "memory": self.memory_bytes / self.on.bandwidth,
            "communication": 0.0 if not self.sent_bytes else None if link is None else self.sent_bytes / link,
        }

    @property
    def seconds(self) -> float:
        """The largest of them: no step is faster, also if all three overlap wholly."""
        return max(seconds for seconds in self.seconds_by_limit.values() if seconds is not None)

    def to_json(self) -> dict[str, Any]:
        """Return the bound as plain data."""
        figures = {**asdict(self.on), "flops": dict(self.on.flops)}
        return {
            "accelerator": figures,
            "dtype": self.dtype,
            "flops": self.flops,
            "memory_bytes": self.memory_bytes,
            "sent_bytes": self.sent_bytes,
            "seconds_by_limit": self.seconds_by_limit,
            "seconds": self.seconds,
        }


def step_bound(config: Config, device: DevicePlan, flops: int, on: Accelerator) -> StepBound:
    """Return the least time of a step: the roofline of an accelerator.

        seconds >= max(operations / peak, bytes / bandwidth, sent / link)

    The bytes are those that no program avoids if its batch uses every expert: in each micro-batch every parameter is
    read in the compute dtype, once forward and once backward; in the update, parameters and what the optimizer keeps
    are read and written, and gradients are written and read. Activations are not counted, nor is work that recomputes
    them or pads. Source: Williams et al. 2009, "Roofline: an insightful visual performance model".

    Args:
        config: with its mesh.
        device: memory and collectives of one device.
        flops: operations of one device in a step.
        on: the device.
    """
    dtype, memory = compute_dtype(config.model), device.memory
    compute_share = {"bfloat16": 2, "float32": 4}[dtype] / 4  # parameters are float32
    passes = 2 * config.training.gradient_accumulation
    read = int(passes * memory.parameters * compute_share)
    update = 2 * (memory.parameters + memory.gradients + memory.moments)
    return StepBound(on, flops, on.flops[dtype], read + update, device.sent, dtype)
