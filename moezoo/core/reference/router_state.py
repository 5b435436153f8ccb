"""Router state that a training step updates without gradients: selection biases and expert-choice cutoffs."""

from collections.abc import Mapping, Sequence

import autograd.numpy as np

from moezoo.core.parameters import parameter_table
from moezoo.core.reference import Array
from moezoo.core.spec import ExpertChoiceSpec, ModelSpec


def updated_bias(bias_E: Array, load_E: Array, rate: float) -> Array:
    """Update the selection bias: up by `rate` for experts below the mean load, down for those above it.

    `bias + rate * sign(mean load - load)` (auxiliary-loss-free load balancing).

    Args:
        bias_E: added to the scores for expert selection.
        load_E: tokens that chose each expert in the whole step, over all its micro-batches.
        rate: the spec's `selection_bias.rate`.

    Source: Wang et al. 2024, arXiv 2408.15664, algorithm 1; DeepSeek-AI 2024, arXiv 2412.19437, section 2.1.2.
    """
    return bias_E + rate * np.sign(np.mean(load_E) - load_E)


def updated_cutoff(cutoff_E: Array, weight: Array, lowest_E: Array, decay: float) -> tuple[Array, Array]:
    """Update moving averages: `decay * cutoff + (1 - decay) * lowest`, and the same for the constant 1 as `weight`.

    `cutoff / weight` is the bias-corrected average (Kingma and Ba 2014, arXiv 1412.6980,
    section 3).

    Args:
        cutoff_E, weight: state, [E] and [1], initially zero.
        lowest_E: lowest score that each expert accepted, averaged over the micro-batches of the step.
        decay: the spec's `choice.decay`.
    """
    return decay * cutoff_E + (1 - decay) * lowest_E, decay * weight + (1 - decay)


def updated_names(spec: ModelSpec) -> list[str]:
    """Return the canonical names of the state that a step updates; a hash table is state too, but constant."""
    ends = ("selection_bias", "cutoff", "cutoff_weight")
    return [row.name for row in parameter_table(spec) if not row.trained and row.name.endswith(ends)]


def updated_state(
    spec: ModelSpec, state: Mapping[str, Array], loads: Sequence[Array], cutoffs: Sequence[Array | None]
) -> dict[str, Array]:
    """Return all router state after a step, by canonical name.

    Args:
        spec: the model.
        state: rows of the parameter table that are not trained.
        loads: tokens that chose each expert in the step, for each MoE layer.
        cutoffs: `Routing.cutoff_E` of each MoE layer, averaged over the micro-batches.
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
