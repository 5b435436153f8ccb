"""Masks that take experts away from a model (`ExpertMasks`), and what they mean for each kind of choice."""

from collections.abc import Sequence
from typing import Literal, assert_never, get_args

import numpy as np
from numpy.typing import NDArray

from moezoo.core.errors import SpecError
from moezoo.core.interventions.experts import Experts, parse_experts
from moezoo.core.spec import GroupedTopKChoiceSpec, HashChoiceSpec, ModelSpec, MoESpec
from moezoo.core.tokens import ExpertMasks, Integers

Mode = Literal["silence", "reroute"]
"""`silence`: an expert is chosen as ever, and adds nothing. `reroute`: it is not chosen; the best of the others are."""


def expert_masks(spec: ModelSpec, experts: Experts, mode: Mode = "silence") -> list[ExpertMasks]:
    """Return the masks of each MoE layer that take these experts away from one sequence: bool [1, E]."""
    without = [np.isin(np.arange(moe.num_choices), experts.get(layer, ()))[None] for layer, moe in spec.moes]
    return masks_of(without, mode)


def named_masks(spec: ModelSpec, names: str | Sequence[str], mode: Mode, number: int) -> list[ExpertMasks]:
    """Return the masks that take the named experts away from a number of sequences. Raises SpecError: unknown names."""
    if mode not in get_args(Mode):
        raise SpecError(f"unknown mode; got {mode!r:.80}; expected one of {', '.join(get_args(Mode))}.")
    return [own.of_batch(number) for own in expert_masks(spec, parse_experts(spec, names), mode)]


def masks_of(without: Sequence[NDArray[np.bool_]], mode: Mode) -> list[ExpertMasks]:
    """Return masks from the experts of each MoE layer that each sequence does without: bool [B, E]."""
    match mode:
        case "silence":
            return [ExpertMasks(silenced=mask_BE) for mask_BE in without]
        case "reroute":
            return [ExpertMasks(excluded=mask_BE) for mask_BE in without]
        case _:
            assert_never(mode)


def check_masks(spec: ModelSpec, tokens: Integers, masks: Sequence[ExpertMasks] | None) -> None:
    """Check the masks of every MoE layer, for tokens [B, T].

    Raises SpecError: another number of layers, another shape or dtype, a choice that cannot do without an expert, or
    too few experts left for a token.
    """
    if masks is None:
        return
    if len(masks) != len(spec.moes):
        raise SpecError(f"got masks of {len(masks)} layers; expected one for each of {len(spec.moes)} MoE layers.")
    for (layer, moe), own in zip(spec.moes, masks, strict=True):
        expected = (len(tokens), moe.num_choices)
        for mask in own:
            if mask is not None and (mask.shape != expected or mask.dtype != np.bool_):
                raise SpecError(
                    f"a mask of layer {layer} is {mask.dtype} {list(mask.shape)}; expected bool {list(expected)}: "
                    "sequences and experts."
                )
        if own.silenced is not None and own.silenced.any():
            _check_silenced(layer, moe)
        if own.excluded is not None and own.excluded.any():
            _check_excluded(layer, moe, own.excluded)


def _check_silenced(layer: int, moe: MoESpec) -> None:
    if moe.router.apply_to == "input" and moe.experts.bias:
        raise SpecError(
            f"an expert of layer {layer} cannot be silenced: its weight multiplies its input (apply_to: input), and "
            "with an input of zero it still adds its biases. Use --mode reroute."
        )


def _check_excluded(layer: int, moe: MoESpec, excluded_BE: NDArray[np.bool_]) -> None:
    top_k, choice = moe.router.top_k, moe.router.choice
    if isinstance(choice, HashChoiceSpec):
        raise SpecError(
            f"tokens of layer {layer} cannot be rerouted: with choice hash a table decides alone. Use --mode silence."
        )
    left_BE, where = ~excluded_BE, f"in layer {layer}"
    left_B = left_BE.sum(axis=-1)
    if isinstance(choice, GroupedTopKChoiceSpec) and choice.others == "never":
        # The groups of a token may be the smallest ones; those without an expert are only taken for want of others.
        left_BG = left_BE.reshape(len(left_BE), choice.num_groups, -1).sum(axis=-1)
        rising_BG = np.sort(np.where(left_BG > 0, left_BG, moe.num_choices + 1), axis=-1)[:, : choice.keep]
        left_B = np.where(rising_BG > moe.num_choices, 0, rising_BG).sum(axis=-1)
        where += f", in the {choice.keep} groups that a token may get,"
    if (left := int(left_B.min())) < top_k:
        raise SpecError(
            f"too few of {moe.num_choices} experts {where} remain to choose from; got {left}; expected at least top_k, "
            f"{top_k}. Exclude fewer, or use --mode silence."
        )
