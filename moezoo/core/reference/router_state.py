"""What a training step changes in a router without a gradient: selection biases and cutoffs."""

from collections.abc import Mapping, Sequence

import autograd.numpy as np

from moezoo.core.parameters import parameter_table
from moezoo.core.reference import Array
from moezoo.core.spec import ExpertChoiceSpec, ModelSpec


def updated_bias(bias_E: Array, load_E: Array, rate: float) -> Array:
    """`bias + rate * sign(mean load - load)`: up for experts with less than the mean load, down for those with more.

    Args:
        bias_E: added to selection values.
        load_E: how many tokens chose each expert in the whole step, over all its micro-batches.
        rate: the spec's `selection_bias.rate`.

    Source: Wang et al. 2024, arXiv 2408.15664, algorithm 1; DeepSeek-AI 2024, arXiv 2412.19437, section 2.1.2.
    """
    return bias_E + rate * np.sign(np.mean(load_E) - load_E)


def updated_cutoff(cutoff_E: Array, weight: Array, lowest_E: Array, decay: float) -> tuple[Array, Array]:
    """Moving averages: `decay * cutoff + (1 - decay) * lowest`, and the same of the number one as `weight`.

    `cutoff / weight` is the average without the zeros that it started from (Kingma and Ba 2014, arXiv 1412.6980,
    section 3).

    Args:
        cutoff_E, weight: state, [E] and [1], zeros at first.
        lowest_E: lowest score that each expert took, the mean over the step's micro-batches.
        decay: the spec's `choice.decay`.
    """
    return decay * cutoff_E + (1 - decay) * lowest_E, decay * weight + (1 - decay)


def updated_names(spec: ModelSpec) -> list[str]:
    """Canonical names of the state that a step changes; a hash table is state too, and stays."""
    ends = ("selection_bias", "cutoff", "cutoff_weight")
    return [row.name for row in parameter_table(spec) if not row.trained and row.name.endswith(ends)]


def updated_state(
    spec: ModelSpec, state: Mapping[str, Array], loads: Sequence[Array], cutoffs: Sequence[Array | None]
) -> dict[str, Array]:
    """All state after a step, by canonical name.

    Args:
        spec: the model.
        state: rows of the parameter table that are not trained.
        loads: for each MoE layer, tokens that chose each expert in the step.
        cutoffs: for each MoE layer, `Routing.cutoff_E` averaged over the micro-batches.
    """
    new = dict(state)
    for (layer, moe), load_E, lowest_E in zip(spec.moes, loads, cutoffs, strict=True):
        name = f"layers.{layer}.moe.router"
        if moe.router.selection_bias is not None:
            bias = f"{name}.selection_bias"
            new[bias] = updated_bias(state[bias], load_E, moe.router.selection_bias.rate)
        if isinstance(moe.router.choice, ExpertChoiceSpec) and lowest_E is not None:
            cutoff, weight = f"{name}.cutoff", f"{name}.cutoff_weight"
            new[cutoff], new[weight] = updated_cutoff(state[cutoff], state[weight], lowest_E, moe.router.choice.decay)
    return new
