"""Router saturation: how much of the routing of the last checkpoint an earlier one already has.

Formulas and sources: writings/measures.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moezoo.core.analysis.chosen import is_chosen, is_routed, most_experts, share, spans
from moezoo.core.errors import DataError
from moezoo.core.progress import Progress
from moezoo.core.traces.trace import RoutingTrace


@dataclass(frozen=True)
class Saturation:
    """Saturation of a trace, against the last of the run.

    Fields:
        where: the trace.
        all_experts: [L], mean share of a token's last experts that it has already.
        first_expert: [L], share of tokens whose first expert is that of the last trace.
        chance: [L], `all_experts` if the experts of both traces were paired at random: the overlap of their loads.
    """

    where: str
    all_experts: NDArray[np.float64]
    first_expert: NDArray[np.float64]
    chance: NDArray[np.float64]


def measure_saturation(traces: Sequence[RoutingTrace], on_progress: Progress | None = None) -> tuple[Saturation, ...]:
    """Return the saturation of each trace but the last, T: `mean over tokens of |E_t and E_T| / |E_T|`.

    Raises DataError: traces of other layers or tokens.

    Source: Muennighoff et al. 2024, arXiv 2409.02060, eq. 5.
    """
    final = traces[-1]
    for trace in traces[:-1]:
        _check_alike(trace, final)
    return tuple(_saturation(trace, final, on_progress) for trace in traces[:-1])


def _saturation(trace: RoutingTrace, final: RoutingTrace, on_progress: Progress | None) -> Saturation:
    num_layers = final.num_layers
    shared_L, first_L, routed_L = np.zeros(num_layers), np.zeros(num_layers), np.zeros(num_layers)
    counts = np.zeros((2, num_layers, most_experts(final)))
    for first, last in spans(final, f"saturation of {trace.where}", on_progress):
        _check_tokens(trace, final, first, last)
        now_NLE, then_NLE = is_chosen(trace, first, last), is_chosen(final, first, last)
        known_NL = is_routed(now_NLE) & is_routed(then_NLE)
        overlap_NL = share((now_NLE & then_NLE).sum(axis=-1), then_NLE.sum(axis=-1))
        shared_L += np.where(known_NL, overlap_NL, 0.0).sum(axis=0)
        same_NL = trace.column("expert", first, last)[..., 0] == final.column("expert", first, last)[..., 0]
        first_L += (same_NL & known_NL).sum(axis=0)
        routed_L += known_NL.sum(axis=0)
        counts += np.stack([(chosen & known_NL[..., None]).sum(axis=0) for chosen in (now_NLE, then_NLE)])
    usage = share(counts, routed_L[None, :, None])
    return Saturation(
        where=trace.where,
        all_experts=share(shared_L, routed_L),
        first_expert=share(first_L, routed_L),
        chance=share(usage.prod(axis=0).sum(axis=-1), usage[1].sum(axis=-1)),
    )


def _check_alike(trace: RoutingTrace, final: RoutingTrace) -> None:
    own, other = ((one.info.layers, one.info.num_experts, one.num_tokens, one.has("token")) for one in (trace, final))
    if own[:3] != other[:3]:
        raise DataError(
            f"{trace.where} has {trace.num_tokens:,} tokens, {trace.num_layers} MoE layers and {max(own[1])} experts; "
            f"expected {final.num_tokens:,}, {final.num_layers} and {max(other[1])}, as {final.where} has. Record "
            "checkpoints of one run over the same text."
        )


def _check_tokens(trace: RoutingTrace, final: RoutingTrace, first: int, last: int) -> None:
    if not (trace.has("token") and final.has("token")):
        return
    other = trace.column("token", first, last) != final.column("token", first, last)
    if other.any():
        place = first + int(np.argmax(other))
        raise DataError(
            f"{trace.where} and {final.where} have other tokens from token {place} on; expected the same text. Record "
            "checkpoints of one run over the same text."
        )
