"""Margins of routing: how near each token's choice of experts was to another one."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moezoo.core.layer_routing import LayerRouting
from moezoo.core.reference.choice import RoutingContext, choose, runner_up
from moezoo.core.reference.routing import average_cutoff
from moezoo.core.spec import ExpertChoiceSpec, HashChoiceSpec, ModelSpec, RouterSpec
from moezoo.core.tokens import UNUSED, Floats

NEAR_TIE = 2e-4
"""Margin below which two implementations in float32 may choose differently (parity's own tolerance)."""

Cutoffs = Mapping[int, NDArray[np.float64]]
"""Average cutoffs of the layers that route by expert choice at inference."""


def cutoff_names(spec: ModelSpec) -> list[str]:
    """Return the names of the router state that `cutoffs_of` reads."""
    own = [layer for layer, moe in spec.moes if isinstance(moe.router.choice, ExpertChoiceSpec)]
    return [f"layers.{layer}.moe.router.{name}" for layer in own for name in ("cutoff", "cutoff_weight")]


def cutoffs_of(spec: ModelSpec, state: Mapping[str, Floats]) -> Cutoffs:
    """Return the average cutoffs by layer, from the router state."""
    own = {name: np.asarray(state[name], np.float64) for name in cutoff_names(spec)}
    prefixes = {name.rpartition(".")[0] for name in own}
    return {
        int(prefix.split(".")[1]): average_cutoff(own[f"{prefix}.cutoff"], own[f"{prefix}.cutoff_weight"])
        for prefix in prefixes
    }


def margins(
    spec: RouterSpec,
    routing: LayerRouting,
    *,
    inference: bool = False,
    real: NDArray[np.bool_] | None = None,
    cutoff_E: NDArray[np.float64] | None = None,
) -> tuple[Floats, NDArray[np.int16]]:
    """Return margin and runner-up of tokens [B, T], as `TraceRows` has them; computed in float64.

    Args:
        spec: the router.
        routing: of one MoE layer, as a backend returned it; without noise.
        inference: it was routed as in generation.
        real: bool [B, T], False for padding; None: there is none.
        cutoff_E: of expert choice at inference.
    """
    shape = routing.expert.shape[:2]
    if isinstance(spec.choice, HashChoiceSpec):
        return np.full(shape, np.inf, np.float32), np.full(shape, UNUSED, np.int16)
    selection_PE, score_PE = (
        values.reshape(-1, values.shape[-1]).astype(np.float64) for values in (routing.selection, routing.score)
    )
    context = RoutingContext(inference=inference, real_P=None if real is None else real.reshape(-1))
    # Only sparsemixer reads logits: its selection values are the logits.
    margin_P = choose(spec, selection_PE, score_PE, selection_PE, context, cutoff_E=cutoff_E).margin_P
    expert_PK = routing.expert.reshape(-1, routing.expert.shape[-1])
    next_P = runner_up(spec, selection_PE, expert_PK, expert_PK != UNUSED)
    return margin_P.reshape(shape).astype(np.float32), next_P.reshape(shape).astype(np.int16)
