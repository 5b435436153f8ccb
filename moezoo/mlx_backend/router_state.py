"""Router state. Spec: moezoo.core.reference.router_state."""

from collections.abc import Mapping, Sequence

import mlx.core as mx

from moezoo.core.spec import ExpertChoiceSpec, ModelSpec


def updated_bias(bias_E: mx.array, load_E: mx.array, rate: float) -> mx.array:
    """Spec: moezoo.core.reference.router_state.updated_bias."""
    # Integers compare a load with the mean exactly: E * load against the sum.
    return bias_E + rate * mx.sign(mx.sum(load_E) - load_E * load_E.shape[0]).astype(mx.float32)


def updated_cutoff(cutoff_E: mx.array, weight: mx.array, lowest_E: mx.array, decay: float) -> tuple[mx.array, mx.array]:
    """Spec: moezoo.core.reference.router_state.updated_cutoff."""
    return decay * cutoff_E + (1 - decay) * lowest_E, decay * weight + (1 - decay)


def updated_state(
    spec: ModelSpec, state: Mapping[str, mx.array], loads: Sequence[mx.array], cutoffs: Sequence[mx.array | None]
) -> dict[str, mx.array]:
    """Spec: moezoo.core.reference.router_state.updated_state."""
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
