"""Compare two models on the same text, with each model's own routing and with model A's routing in both.

Writing, with the definitions: writings/compare.md.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from moezoo.core.backend import Model, Output
from moezoo.core.comparison.divergence import Divergence
from moezoo.core.comparison.intermediates import IntermediateDifferences
from moezoo.core.comparison.report import ComparisonReport, Rounding
from moezoo.core.comparison.routing_changes import LayerChanges, by_selection
from moezoo.core.comparison.side import Side
from moezoo.core.comparison.specs import check_comparable, spec_differences
from moezoo.core.comparison.weights import weight_difference
from moezoo.core.data.evaluation_windows import EvaluationBatch
from moezoo.core.parity.report import ParityTolerances
from moezoo.core.progress import Progress
from moezoo.core.tokens import IGNORED, Floats, Integers


def compare_models(
    a: Side, b: Side, num_windows: int, batches: Iterable[EvaluationBatch], on_progress: Progress
) -> ComparisonReport:
    """Compare model B with model A on windows, which are read one batch at a time.

    Routing is that of inference: causal, without drops and without noise. All statistics are over the targets that
    are not IGNORED.

    Raises SpecError: the models differ in vocabulary, MoE layers, or experts per token.
    """
    spec_a, spec_b = a.model.spec, b.model.spec
    check_comparable(spec_a, spec_b)
    weights, specs = weight_difference(a.model, b.model, on_progress), spec_differences(spec_a, spec_b)
    same_program = (a.backend, a.compute) == (b.backend, b.compute) and weights.same_codes and not specs
    rounding = Rounding(0.0, 0.0) if same_program and spec_a.adapter == spec_b.adapter else _rounding(a, b)
    sums, done = _Sums(a.model, b.model, rounding), 0
    on_progress("comparing windows", 0, num_windows)
    for batch in batches:
        sums.add(batch)
        done += len(batch.windows)
        on_progress("comparing windows", done, num_windows)
    total = sums.total.effect()
    return ComparisonReport(
        a=a.describe(),
        b=b.describe(),
        windows=done,
        tokens=total.kl.count,
        not_finite=sums.not_finite,
        loss=sums.total.left_loss,
        total=total,
        arithmetic=sums.arithmetic.effect(),
        routing=tuple(layer.change() for layer in sums.layers),
        parts=sums.parts.differences(),
        weights=weights,
        specs=specs,
        rounding=rounding,
    )


def _rounding(a: Side, b: Side) -> Rounding:
    """Return the differences that two programs for the same formulas may have, in the coarser precision."""
    tolerances = ParityTolerances.of(a.model.spec if a.compute != "float32" else b.model.spec)
    return Rounding(tolerances.intermediate, tolerances.margin)


class _Sums:
    """Sums over the windows so far."""

    def __init__(self, a: Model, b: Model, rounding: Rounding) -> None:
        self._a, self._b = a, b
        self.total, self.arithmetic, self.parts = Divergence(), Divergence(), IntermediateDifferences()
        self.layers = [LayerChanges(layer, moe, rounding.margin) for layer, moe in a.spec.moes]
        self.not_finite = 0

    def add(self, batch: EvaluationBatch) -> None:
        """Run both models on a batch: freely, and with A's experts where B has chosen others."""
        counted_P = (batch.targets != IGNORED).reshape(-1)
        if not counted_P.any():
            return
        target_P = batch.targets.reshape(-1)[counted_P]
        a, b = (_forward(model, batch) for model in (self._a, self._b))
        self.not_finite += self.total.add(_logits(a, counted_P), _logits(b, counted_P), target_P)
        routing_a, routing_b = a.routing, b.routing
        del a, b  # their logits
        # A is run again too, so that one backend runs the same program for both: equal models are equal bit for bit.
        forced = [by_selection(routing) for routing in routing_a]
        a, b = (_forward(model, batch, forced, record=True) for model in (self._a, self._b))
        self.arithmetic.add(_logits(a, counted_P), _logits(b, counted_P), target_P)
        self.parts.add(a, b, counted_P)
        for layer, own, other, replayed in zip(self.layers, routing_a, routing_b, b.routing, strict=True):
            layer.add(own.expert, other.expert, own, replayed, counted_P)


def _forward(
    model: Model, batch: EvaluationBatch, forced: list[Integers] | None = None, *, record: bool = False
) -> Output:
    return model.forward(batch.inputs, forced=forced, record=record, inference=True, documents=batch.documents)


def _logits(output: Output, counted_P: NDArray[np.bool_]) -> Floats:
    return output.logits.reshape(len(counted_P), -1)[counted_P]
