"""State-space layers shared by several families: their tensor names, and how limits of steps are read."""

from typing import Any

import numpy as np

from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.tensors import Fused, Part, Tensor, beside

_LARGEST = float(np.finfo(np.float32).max)


def mamba2(theirs: str, ours: str = "layers.{layer}.attention") -> tuple[Fused, ...]:
    """Return rules for a Mamba-2 layer: one matrix of gate, values, keys, queries and steps, and one convolution."""
    heads, groups = ("n z", "n z"), ("m h", "m h")
    convolved = (("value", *heads), ("key", *groups), ("query", *groups))
    projected = (("gate", *heads), *convolved, ("step", "n", "n"))
    found = (
        Fused(
            f"{theirs}.in_proj.weight",
            "x d",
            tuple(Part(f"{ours}.w_{which}", taken, f"d {axes}") for which, taken, axes in projected),
        ),
        Fused(
            f"{theirs}.in_proj.bias",
            "x",
            tuple(Part(f"{ours}.b_{which}", taken, axes) for which, taken, axes in projected),
        ),
        Fused(
            f"{theirs}.conv1d.weight",
            "x 1 w",
            tuple(Part(f"{ours}.conv_{which}", taken, f"w {axes}") for which, taken, axes in convolved),
        ),
        Fused(
            f"{theirs}.conv1d.bias",
            "x",
            tuple(Part(f"{ours}.b_conv_{which}", taken, axes) for which, taken, axes in convolved),
        ),
        Tensor(f"{theirs}.dt_bias", "n", f"{ours}.step_bias", "n"),
        Tensor(f"{theirs}.A_log", "n", f"{ours}.log_decay_rate", "n"),
        Tensor(f"{theirs}.D", "n", f"{ours}.skip", "n"),
        Tensor(f"{theirs}.norm.weight", "(n z)", f"{ours}.norm_scale", "n z"),
        Tensor(f"{theirs}.out_proj.weight", "d (n z)", f"{ours}.w_output", "n z d"),
        Tensor(f"{theirs}.out_proj.bias", "d", f"{ours}.b_output", "d"),
    )
    return beside(f"{ours}.norm_scale", "n z", found)


def mlx_mamba2(theirs: str, ours: str = "layers.{layer}.attention") -> tuple[Fused, ...]:
    """Return mlx-lm's rule for the convolution, whose axes it orders otherwise."""
    (convolution,) = (rule for rule in mamba2(theirs, ours) if rule.theirs.endswith("conv1d.weight"))
    return (Fused(convolution.theirs, "x w 1", convolution.parts, convolution.sizes),)


def written_limits(least: float, greatest: float | None) -> list[Any]:
    """Return `time_step_limit`; its inverse is `step_limits`. Infinity is no number of JSON for every reader."""
    return [least, _LARGEST if greatest is None else greatest]


def step_limits(fields: Fields) -> tuple[float, float | None]:
    """Return the least and the greatest step of `time_step_limit`; None if no float32 number is above it."""
    limits = fields.get("time_step_limit", likely=([0.0, 1.0],))
    if limits is None:
        return 0.0, None
    if not isinstance(limits, list):
        raise fields.refuse("time_step_limit", "two numbers")
    numbers = [each for each in limits if each is not None]
    if len(numbers) != 2 or any(type(each) not in (int, float) or each < 0 for each in numbers):
        raise fields.refuse("time_step_limit", "two numbers of at least 0")
    return float(numbers[0]), None if numbers[1] >= _LARGEST else float(numbers[1])
