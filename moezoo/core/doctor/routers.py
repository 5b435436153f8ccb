"""Findings about routers and load: dead and starving experts, collapsed layers, selection biases, constant weights."""

from collections.abc import Iterator, Sequence

import numpy as np

from moezoo.core.config.run_config import Config
from moezoo.core.doctor.curves import is_balanced_by_design
from moezoo.core.doctor.finding import Finding
from moezoo.core.doctor.history import Floats, History, LayerHistory, recent
from moezoo.core.parameters.trained import router_trains, trained_names
from moezoo.core.spec import ModelSpec, MoESpec

_STARVING = 0.1  # of an equal share
_EXPECTED_DEAD, _EXPECTED_STARVING = 30, 500  # assignments of an equal share: fewer can be missing by chance
_FEW = 1.25  # experts in use, as a multiple of top_k
_REACH = 0.05  # of the score's scale
_SCORE = {"sigmoid": 0.5, "sqrt_softplus": 0.83, "none": 1.0}  # of a logit of 0, or a logit itself


def router_findings(spec: ModelSpec) -> Iterator[Finding]:
    """Yield findings about routers from the spec alone."""
    constant = [index for index, moe in spec.moes if not moe.router_learns]
    if constant:
        router = spec.moes[[index for index, _ in spec.moes].index(constant[0])][1].router
        how = "softmax_of_chosen" if router.weight == "softmax_of_chosen" else f"renormalize: {router.renormalize}"
        yield Finding(
            "fault",
            "constant_weights",
            f"every combine weight is the constant {router.scale:g} (top_k {router.top_k} with {how})",
            _layers(constant),
            "The cross-entropy has no gradient for such a router: only auxiliary losses move it.",
            "Use renormalize: none with weight: score (sigmoid_of_chosen for logits), or a larger top_k.",
        )
    rounded = [index for index, moe in spec.moes if moe.router.dtype == "compute"]
    if rounded and spec.precision.compute == "bfloat16":
        yield Finding(
            "warning",
            "router_precision",
            "the routers multiply in bfloat16",
            _layers(rounded),
            "Near ties are decided by rounding, so training and other engines choose other experts.",
            "Set router.dtype: float32; it costs almost nothing.",
        )


def load_findings(config: Config, history: History) -> Iterator[Finding]:
    """Yield findings about the load of the experts at the end of a run."""
    tokens = config.training.batch_size * config.training.sequence_length
    for index, moe in config.model.moes:
        layer = history.layers.get(index)
        if layer is None or is_balanced_by_design(moe):
            continue
        share = layer.recent_E
        if not np.isfinite(share).all():
            continue
        expected = tokens * moe.router.top_k / moe.num_choices * recent(len(history))
        collapsed = effective_experts(share)
        if collapsed <= _FEW * moe.router.top_k and moe.num_choices >= 2 * _FEW * moe.router.top_k:
            yield Finding(
                "fault",
                "collapsed_layer",
                f"the layer uses {collapsed:.1f} of {moe.num_choices} experts, {moe.router.top_k} per token",
                f"layer {index}, experts {_numbers(np.flatnonzero(share > 1 / moe.num_choices))}",
                "All tokens go to the same experts, so the layer is a dense one of their size.",
                "Start again, or from a checkpoint before the collapse, with a balance loss or selection bias.",
            )
            continue
        yield from _idle(index, share, expected)


def _idle(index: int, share: Floats, expected: float) -> Iterator[Finding]:
    dead = np.flatnonzero(share == 0)
    if len(dead) and expected >= _EXPECTED_DEAD:
        yield Finding(
            "fault",
            "dead_expert",
            f"{len(dead)} of {len(share)} experts got no token in the newest records",
            f"layer {index}, {_experts(dead)}",
            "An expert without tokens gets no gradient and stays as it is; its parameters are wasted.",
            "Raise the balance term's coefficient or the bias rate; start the router again if it does not recover.",
        )
    starving = np.flatnonzero((share > 0) & (share < _STARVING / len(share)))
    if len(starving) and expected >= _EXPECTED_STARVING:
        least = float(share[starving].min() * len(share))
        yield Finding(
            "warning",
            "starving_expert",
            f"{len(starving)} of {len(share)} experts get less than a tenth of an equal share, the least {least:.1%}",
            f"layer {index}, {_experts(starving)}",
            "They learn slowly, and get still fewer tokens for it.",
            "Raise the balance term's coefficient or the bias rate.",
        )


def effective_experts(share_E: Floats) -> float:
    """Return the exponential of the load's entropy: as many experts with equal loads would have it."""
    used = share_E[share_E > 0] / max(share_E.sum(), 1e-12)
    return float(np.exp(-(used * np.log(used)).sum()))


def bias_findings(config: Config, history: History) -> Iterator[Finding]:
    """Yield findings about selection biases: those that never move, and rates too small to act within the run."""
    frozen = not router_trains(config.model, trained_names(config.model, config.training.only))
    for index, moe in config.model.moes:
        bias = moe.router.selection_bias
        if bias is None or frozen or is_balanced_by_design(moe) or (bias.rate == 0 and config.init_from is not None):
            continue
        layer = history.layers.get(index)
        if bias.rate == 0 or (layer is not None and _never_moves(layer)):
            yield Finding(
                "fault",
                "selection_bias_stuck",
                "the selection bias never moves" + (": its rate is 0" if bias.rate == 0 else ""),
                f"layer {index}",
                "It is there to balance the load, and does not.",
                "Set router.selection_bias.rate (0.001 is common with sigmoid scores).",
            )
            continue
        reach, scale = bias.rate * config.training.steps, _scale(moe)
        if reach < _REACH * scale:
            yield Finding(
                "warning",
                "selection_bias_rate",
                f"the selection bias can move by {reach:.2g} in {config.training.steps} steps, where scores are about "
                f"{scale:.2g}",
                f"layer {index}, rate {bias.rate:g}",
                "It cannot change which experts are chosen within the run.",
                f"Use a rate of at least {_REACH * scale / config.training.steps:.1g}, or more steps.",
            )


def _never_moves(layer: LayerHistory) -> bool:
    bias = layer.bias_RE
    return bias is not None and len(bias) > 1 and bool((bias == bias[0]).all())


def _scale(moe: MoESpec) -> float:
    """Return the size of a score of the router at the start."""
    return 1 / moe.num_choices if moe.router.score == "softmax" else _SCORE[moe.router.score]


def _layers(indices: Sequence[int]) -> str:
    return f"layer{'s' if len(indices) > 1 else ''} {_numbers(indices)}"


def _experts(indices: Sequence[int] | np.ndarray) -> str:
    return f"expert{'s' if len(indices) > 1 else ''} {_numbers(indices)}"


def _numbers(indices: Sequence[int] | np.ndarray) -> str:
    more = f" and {len(indices) - 12} more" if len(indices) > 12 else ""
    return ", ".join(str(int(index)) for index in indices[:12]) + more
