"""The report of a comparison as data."""

from dataclasses import dataclass

from moezoo.core.comparison.divergence import Effect
from moezoo.core.comparison.intermediates import PartDifference
from moezoo.core.comparison.routing_changes import RoutingChange
from moezoo.core.comparison.weights import WeightDifference


@dataclass(frozen=True)
class Rounding:
    """Differences that rounding alone can make.

    Fields:
        relative: relative difference of an intermediate.
        margin: margin of a choice that it may turn.
    """

    relative: float
    margin: float


@dataclass(frozen=True)
class ComparisonReport:
    """Comparison of model B with model A.

    Fields:
        a, b: path, backend and precision of each.
        windows: number of windows compared.
        tokens: number of targets compared; all statistics are over them.
        not_finite: number of targets left out because a logit is NaN or infinite.
        loss: mean loss of A over all tokens with finite logits of A, nats per token; NaN without one.
        total: distance of B from A, each with its own routing.
        arithmetic: distance of B from A when both use A's experts.
        routing: change of the experts by MoE layer.
        parts: relative differences of the intermediates when both use A's experts, in the order of the forward pass.
        weights: parameters that differ.
        specs: a line for each field in which the specs differ.
        rounding: differences that are not above rounding.
    """

    a: str
    b: str
    windows: int
    tokens: int
    not_finite: int
    loss: float
    total: Effect
    arithmetic: Effect
    routing: tuple[RoutingChange, ...]
    parts: tuple[PartDifference, ...]
    weights: WeightDifference
    specs: tuple[str, ...]
    rounding: Rounding

    @property
    def changed(self) -> bool:
        """True if a token has other experts."""
        return any(layer.changed for layer in self.routing)

    @property
    def routing_kl(self) -> float:
        """Mean KL divergence, nats, that replaying A's experts removes: total - arithmetic. It may be negative."""
        return self.total.kl.mean - self.arithmetic.kl.mean if self.changed else 0.0

    @property
    def routing_loss(self) -> float:
        """Change of the loss by B's own choice of experts: that of B minus that of B with A's experts."""
        return self.total.loss - self.arithmetic.loss if self.changed else 0.0

    @property
    def routing_share(self) -> float | None:
        """Share of the mean KL divergence that is routing, from 0 to 1; None if there is no divergence."""
        return min(1.0, max(0.0, self.routing_kl / self.total.kl.mean)) if self.total.kl.mean > 0 else None

    @property
    def equal(self) -> bool:
        """True if nothing differs."""
        same = self.total.kl.max == self.arithmetic.kl.max == 0 and not self.changed and not self.not_finite
        return same and all(part.relative == 0 for part in self.parts)

    @property
    def first_part(self) -> PartDifference | None:
        """The first intermediate that differs by more than rounding, with A's experts in both models."""
        return next((part for part in self.parts if part.relative > self.rounding.relative), None)

    @property
    def first_routing(self) -> RoutingChange | None:
        """The first layer whose router prefers other experts for a token by more than rounding."""
        return next((layer for layer in self.routing if layer.beyond), None)
