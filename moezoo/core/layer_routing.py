"""Routing as it leaves a backend, and forced routing as it enters one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moezoo.core.errors import DataError
from moezoo.core.spec import ModelSpec
from moezoo.core.tokens import NOT_REPLAYED, UNUSED, Counts, Flags, Floats, Integers


@dataclass(frozen=True)
class LayerRouting:
    """Routing of one MoE layer. A token's experts are sorted by descending weight; ties by lower id; unused slots last.

    Fields:
        layer: index of the layer in the model.
        expert: int32 [B, T, K], expert ids; UNUSED (-1) in a slot that the router left unused.
        weight: float32 [B, T, K], combine weights: the factor of each expert's output, 0 for a dropped assignment.
        score: float32 [B, T, E], router scores of all experts; zero-computation experts last.
        selection: float32 [B, T, E], values that the choice compared: scores or logits (`RouterSpec.selection_basis`),
            with the selection bias; those of groups that were left out too.
        dropped: bool [B, T, K], assignments beyond an expert's capacity.
    """

    layer: int
    expert: Integers
    weight: Floats
    score: Floats
    selection: Floats
    dropped: Flags


def layer_routing(
    layer: int,
    shape: tuple[int, ...],
    expert_PK: Integers,
    valid_PK: Flags,
    kept_PK: Flags,
    weight_PK: Floats,
    score_PE: Floats,
    selection_PE: Floats,
) -> LayerRouting:
    """Return the LayerRouting of tokens [B, T], from what a backend computed of P = B * T tokens or more.

    `valid_PK`: slots that the router used. `kept_PK`: assignments within the expert's capacity.
    """
    order_PK = _falling_weights(expert_PK, valid_PK, kept_PK, weight_PK)
    dropped_PK = np.take_along_axis(valid_PK & ~kept_PK, order_PK, axis=-1)
    expert_PK, weight_PK = combine_weights(expert_PK, valid_PK, kept_PK, weight_PK)
    count = int(np.prod(shape))

    def by_sequence(values: Any) -> Any:
        return values[:count].reshape(*shape, -1)

    return LayerRouting(layer, *map(by_sequence, (expert_PK, weight_PK, score_PE, selection_PE, dropped_PK)))


def combine_weights(expert_PK: Integers, valid_PK: Flags, kept_PK: Flags, weight_PK: Floats) -> tuple[Integers, Floats]:
    """Return `expert` and `weight` of a LayerRouting, both [P, K], sorted.

    `valid_PK`: slots that the router used. `kept_PK`: assignments within the expert's capacity.
    """
    order_PK = _falling_weights(expert_PK, valid_PK, kept_PK, weight_PK)
    weight_PK = np.where(kept_PK, weight_PK, np.zeros((), weight_PK.dtype))
    expert_PK = np.where(valid_PK, expert_PK, UNUSED).astype(np.int32)
    return np.take_along_axis(expert_PK, order_PK, axis=-1), np.take_along_axis(weight_PK, order_PK, axis=-1)


def _falling_weights(expert_PK: Integers, valid_PK: Flags, kept_PK: Flags, weight_PK: Floats) -> Counts:
    """Return the order of each token's slots: used ones first, by falling weight, ties by lower id."""
    return np.lexsort((expert_PK, -np.where(kept_PK, weight_PK, 0), ~valid_PK), axis=-1)


def check_forced(spec: ModelSpec, tokens: Integers, forced: Sequence[Integers] | None) -> None:
    """Check forced routing of tokens [..., B, T], if there is one: [..., B, T, K] per MoE layer.

    Trap: for an expert that does not exist, JAX takes the last one and MLX reads unrelated memory.

    Raises DataError: another number of layers or another shape, or an expert that the layer does not have.
    """
    if forced is None:
        return
    if len(forced) != len(spec.moes):
        raise DataError(
            f"forced routing is of {len(forced)} layers; expected one array for each of {len(spec.moes)} MoE layers."
        )
    for (layer, moe), expert in zip(spec.moes, forced, strict=True):
        if expert.shape != (*tokens.shape, moe.num_slots):
            raise DataError(
                f"forced routing of layer {layer} is {list(expert.shape)}; expected {[*tokens.shape, moe.num_slots]}, "
                f"an expert for each of {moe.num_slots} slots of a token."
            )
        if expert.size and not NOT_REPLAYED <= expert.min() <= expert.max() < moe.num_choices:
            worst = expert.max() if expert.max() >= moe.num_choices else expert.min()
            raise DataError(
                f"forced routing of layer {layer} has expert {worst}; expected ids from 0 to {moe.num_choices - 1}, "
                f"{UNUSED} for an unused slot, or {NOT_REPLAYED} for a token that is routed freely."
            )
