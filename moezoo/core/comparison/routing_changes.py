"""Tokens for which two models choose other experts, layer by layer."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from moezoo.core.comparison.distribution import Distribution, Spread
from moezoo.core.layer_routing import LayerRouting
from moezoo.core.reference.choice import choose
from moezoo.core.spec import ExpertChoiceSpec, HashChoiceSpec, MoESpec
from moezoo.core.tokens import Integers

_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True)
class RoutingChange:
    """Change of the experts in one MoE layer from model A to model B.

    Fields:
        layer: index in the model.
        tokens: number of tokens compared.
        changed: share of tokens with another set of experts.
        moved: share of assignments to other experts.
        own: share of tokens for which the layer's router prefers another set although B has used A's experts in all
            layers: what this layer changes by itself, and not because of changes in earlier layers.
        beyond: share of tokens among `own` whose margin is above rounding.
        margin: margins in A of the tokens of `own`: the relative distance of the nearest decision from the opposite one
            (`core.reference.choice.Choice.margin_P`); NaN where the choice makes no decision by values.
        all_margin: margins in A of all tokens.
    """

    layer: int
    tokens: int
    changed: float
    moved: float
    own: float
    beyond: float
    margin: Spread
    all_margin: Spread

    @property
    def near_ties(self) -> bool:
        """True if what changed was near a tie: its median margin is at most a quarter of the median of all tokens."""
        return self.margin.median <= self.all_margin.median / 4


class LayerChanges:
    """Sums over the tokens of one MoE layer so far."""

    def __init__(self, layer: int, moe: MoESpec, rounding: float) -> None:
        """`rounding`: a margin at most as large may change by rounding."""
        self._layer, self._moe, self._rounding = layer, moe, rounding
        self._tokens = self._assignments = self._changed = self._moved = self._own = self._beyond = 0
        self._margin, self._all_margin = Distribution(), Distribution()

    def add(
        self,
        a: Integers,
        b: Integers,
        margins: LayerRouting,
        replayed: LayerRouting,
        counted_P: NDArray[np.bool_],
    ) -> None:
        """Add the tokens `counted_P`.

        Args:
            a, b: experts of A and of B, int32 [B, T, K].
            margins: routing that the margins are of.
            replayed: routing of B with A's experts.
            counted_P: bool [P].
        """
        a_PK, b_PK = (_flat(expert)[counted_P] for expert in (a, b))
        shared_P = _shared(a_PK, b_PK)
        changed_P = _differs(a_PK, b_PK)
        self._tokens += len(a_PK)
        self._assignments += int((a_PK >= 0).sum())
        self._changed += int(changed_P.sum())
        self._moved += int((a_PK >= 0).sum() - shared_P.sum())
        own_P, margin_P = changed_P, np.full(len(a_PK), np.inf)
        if not isinstance(self._moe.router.choice, ExpertChoiceSpec | HashChoiceSpec):
            margin_P = _decided(self._moe, margins, counted_P)[1]
            preferred_PK, _ = _decided(self._moe, replayed, counted_P)
            own_P = _differs(a_PK, preferred_PK)
        self._own += int(own_P.sum())
        self._beyond += int((margin_P[own_P] > self._rounding).sum())
        self._margin.add(margin_P[own_P])
        self._all_margin.add(margin_P)

    def change(self) -> RoutingChange:
        """Return the change over all tokens so far."""
        tokens, assignments = max(self._tokens, 1), max(self._assignments, 1)
        return RoutingChange(
            layer=self._layer,
            tokens=self._tokens,
            changed=self._changed / tokens,
            moved=self._moved / assignments,
            own=self._own / tokens,
            beyond=self._beyond / tokens,
            margin=self._margin.spread(),
            all_margin=self._all_margin.spread(),
        )


def by_selection(routing: LayerRouting) -> Integers:
    """Return the experts by falling selection value, the order in which routers choose them, unused slots last."""
    value = np.take_along_axis(routing.selection, np.maximum(routing.expert, 0), axis=-1)
    order = np.lexsort((routing.expert, -value, routing.expert < 0), axis=-1)
    return np.take_along_axis(routing.expert, order, axis=-1)


def _decided(moe: MoESpec, routing: LayerRouting, counted_P: NDArray[np.bool_]) -> tuple[Integers, NDArray[np.float64]]:
    """Return the experts that a router's own values choose, with or without forced routing, and the margin."""
    value_PE, score_PE = (_flat(part)[counted_P].astype(np.float64) for part in (routing.selection, routing.score))
    choice = choose(moe.router, value_PE, score_PE, value_PE)
    return np.where(choice.valid_PK, choice.expert_PK, -1), np.asarray(choice.margin_P, np.float64)


def _shared(one_PK: Integers, other_PK: Integers) -> NDArray[np.int64]:
    """Return the number of experts of each token that are in both sets; -1 is none."""
    both_PKK = (one_PK[:, :, None] == other_PK[:, None, :]) & (one_PK >= 0)[:, :, None]
    count_P: NDArray[np.int64] = both_PKK.sum((1, 2))
    return count_P


def _differs(one_PK: Integers, other_PK: Integers) -> NDArray[np.bool_]:
    """Return which tokens have different sets of experts."""
    differ_P: NDArray[np.bool_] = np.any(np.sort(one_PK, axis=-1) != np.sort(other_PK, axis=-1), axis=-1)
    return differ_P


def _flat(values: NDArray[_Number]) -> NDArray[_Number]:
    return values.reshape(-1, values.shape[-1])
