"""A few numbers of a trace, and its description."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moezoo.core.errors import SpecError, counted
from moezoo.core.spec import ModelSpec
from moezoo.core.traces.margins import NEAR_TIE
from moezoo.core.traces.trace import RoutingTrace, TraceInfo


@dataclass(frozen=True)
class TraceSummary:
    """Numbers of a trace.

    Fields:
        tokens: rows; `generated` of them the model generated.
        layers: MoE layers.
        targets: tokens of the data that have a loss.
        loss: mean of these losses, nats; None without any.
        near_ties: share of the choices with a margin below NEAR_TIE; None without margins.
    """

    tokens: int
    generated: int
    layers: int
    targets: int
    loss: float | None
    near_ties: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """Describe the numbers in a line."""
        parts = [counted(self.tokens, "token") + (f" ({self.generated:,} generated)" if self.generated else "")]
        parts.append(counted(self.layers, "MoE layer"))
        parts += [] if self.loss is None else [f"loss {self.loss:.4f} nats per token"]
        parts += [] if self.near_ties is None else [f"{100 * self.near_ties:.3g} % near ties (margin < {NEAR_TIE:g})"]
        return ", ".join(parts)


def summarize(trace: RoutingTrace) -> TraceSummary:
    """Return the numbers of a trace, read a part at a time."""
    generated, targets, near, choices, nats = 0, 0, 0, 0, 0.0
    for rows in trace.chunks():
        new = np.zeros(len(rows), bool) if rows.generated is None else rows.generated > 0
        generated += int(new.sum())
        if rows.loss is not None:
            counted = ~np.isnan(rows.loss) & ~new
            targets += int(counted.sum())
            nats += float(rows.loss[counted].astype(np.float64).sum())
        if rows.margin is not None:
            near += int(np.sum(rows.margin < NEAR_TIE))
            choices += int(np.sum(rows.expert[..., 0] >= 0))
    loss, near_ties = nats / targets if targets else None, near / choices if choices else None
    return TraceSummary(trace.num_tokens, generated, trace.num_layers, targets, loss, near_ties)


def describe_recording(
    spec: ModelSpec,
    domains: Sequence[str],
    *,
    sequence_length: int,
    inference: bool,
    model: str,
    weights: str,
    backend: str,
) -> TraceInfo:
    """Return the description of a trace to record. `weights`: hash of the weights. Raises SpecError: a dense model."""
    if not spec.moes:
        raise SpecError(f"{model} has no MoE layer, so it routes nothing; expected at least one. Use another model.")
    return TraceInfo(
        layers=tuple(spec.moe_layers),
        num_experts=tuple(moe.num_choices for _, moe in spec.moes),
        domains=tuple(domains),
        sequence_length=sequence_length,
        inference=inference,
        model=model,
        spec_sha256=hashlib.sha256(spec.model_dump_json().encode()).hexdigest(),
        weights_sha256=weights,
        backend=backend,
        compute=spec.precision.compute,
    )
