"""The sides of a parity check: results of the float64 reference and of each backend for the same weights and tokens."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.backend import Backend, Model
from moezoo.core.config.optimizers import OptimizerConfig
from moezoo.core.config.update_rules import update_rules
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.trained import router_trains, trained_names
from moezoo.core.parity.causality import Causality, check_causality
from moezoo.core.parity.starting_state import Doubles, starting_state
from moezoo.core.quantization.weight import QuantizedWeight
from moezoo.core.random import fold_in, key, micro_batch_keys, uniform
from moezoo.core.spec import ModelSpec, MoESpec
from moezoo.core.tokens import Floats, Integers

_UPDATES_DONE = 9  # number of updates that the moments before the step stand for, in bias correction
_FLOAT32_ROUNDING = 2.0**-24
_ROUNDING_PURPOSE = 0x726F756E64  # "round": seed of the perturbation of weights
_REFERENCE_ROUNDING = 1e-9  # tolerance for reordered float64 sums, far above 1e-16 and far below any real dependence


@dataclass(frozen=True)
class Side:
    """Results of one implementation.

    Fields:
        name: `reference`, or the name of a backend.
        experts: free routing: int32 [P, K] per MoE layer, -1 for an unused slot.
        weights: exported parameters.
        intermediates, logits, losses, gradients: results with forced routing.
        update: parameters after the step, minus those of a reference that used the same experts: so two backends with
            different routing can still be compared. Zero for the reference.
        moments, step: optimizer moments and metrics of the step, corrected in the same way.
        moved_assignments: share of assignments for which the step used other experts than the forward pass.
        inference_logits: logits with inference routing; None if it equals training routing.
        causality: results of the causality check.
    """

    name: str
    experts: list[Integers]
    weights: Mapping[str, NDArray[Any]]
    intermediates: Mapping[str, NDArray[Any]]
    logits: NDArray[Any]
    losses: Mapping[str, float]
    gradients: Mapping[str, NDArray[Any]]
    update: Mapping[str, Doubles]
    moments: Mapping[str, Doubles]
    step: Mapping[str, float]
    moved_assignments: float
    inference_logits: NDArray[Any] | None
    causality: list[Causality]


class Reference:
    """The float64 reference, with the inputs that all sides share."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Floats],
        tokens: Integers,
        targets: Integers,
        optimizer: OptimizerConfig,
        trained: Collection[str] | None = None,
        replayed: list[Integers] | None = None,
    ):
        """`trained`: names of the parameters that are trained; None: all.

        `replayed`: experts [B, T, K] per MoE layer that all sides are forced to; None: the reference's own.
        """
        from moezoo.core.reference.losses import loss_and_gradients, loss_terms
        from moezoo.core.reference.transformer import forward

        self.spec, self.tokens, self.targets, self.optimizer = spec, tokens, targets, optimizer
        self.weights32 = {row.name: np.asarray(weights[row.name], np.float32) for row in parameter_table(spec)}
        self.weights = {name: value.astype(np.float64) for name, value in self.weights32.items()}
        self.state = {row.name: self.weights[row.name] for row in parameter_table(spec) if not row.trained}
        self.trained = trained_names(spec) if trained is None else trained
        self.key = micro_batch_keys(0, 0, 1)[0]
        self.intermediates: dict[str, NDArray[Any]] = {}
        result = forward(spec, self.weights, tokens, record=self.intermediates, key=self.key)
        routings = result.routings
        self.experts = [np.where(routing.valid_PK, routing.expert_PK, -1).astype(np.int32) for routing in routings]
        self.margins = [routing.margin_P for routing in routings]
        self.cutoffs = [routing.cutoff_E for routing in routings]
        self.forced_experts = self.experts
        if replayed is not None:
            self.forced_experts = [own.reshape(-1, own.shape[-1]) for own in replayed]
            options: dict[str, Any] = {"key": self.key, "forced": self.forced_experts}
            result = forward(spec, self.weights, tokens, record=self.intermediates, **options)
        self.logits = result.logits_BTV
        terms = loss_terms(spec, self.logits, targets, result.routings, index_losses=result.index_losses)
        self.losses = {name: float(value) for name, value in terms.items()}
        _, self.gradients = loss_and_gradients(
            spec, self.weights, tokens, targets, forced=self.forced_experts, key=self.key, trained=self.trained
        )
        self.rules = update_rules(optimizer, (row for row in parameter_table(spec) if row.name in self.trained))
        self.moments = starting_state(optimizer, self.rules, self.gradients)

        def run(tokens: Integers, inference: bool) -> Mapping[str, NDArray[Any]]:
            record: dict[str, NDArray[Any]] = {}
            forward(spec, self.weights, tokens, record=record, inference=inference)
            return record

        self.causality = check_causality("reference", run, spec, tokens, _REFERENCE_ROUNDING)
        self.inference_logits = run(tokens, True)["logits"] if spec.inference_differs else None

    def rounding_sensitivity(self, floor: float) -> dict[str, float]:
        """Measure how far intermediates, logits and gradients move if every weight has a float32 rounding error.

        Returns the largest change over tensors, relative as in `Comparison`, with the same experts. No float32
        implementation can be expected to agree within less than a multiple of this. `floor`: gradient_floor.
        """
        from moezoo.core.reference.losses import loss_and_gradients
        from moezoo.core.reference.transformer import forward

        shifted = {}
        for index, (name, value) in enumerate(self.weights.items()):
            share = uniform(fold_in(key(_ROUNDING_PURPOSE), index), value.shape).astype(np.float64)
            shifted[name] = value * (1 + (2 * share - 1) * _FLOAT32_ROUNDING)
        record: dict[str, NDArray[Any]] = {}
        result = forward(
            self.spec, shifted, self.tokens, record=record, key=self.key, forced=self.forced_experts or None
        )
        _, gradients = loss_and_gradients(
            self.spec,
            shifted,
            self.tokens,
            self.targets,
            forced=self.forced_experts,
            key=self.key,
            trained=self.trained,
        )
        least = floor * max(_largest(value) for value in self.gradients.values())
        return {
            "intermediate": _furthest(record, self.intermediates, 0.0),
            "logits": _furthest({"logits": result.logits_BTV}, {"logits": self.logits}, 0.0),
            "gradient": _furthest(gradients, self.gradients, least),
        }

    @property
    def forced(self) -> list[Integers] | None:
        """The experts in a backend's layout: [B, T, K] per MoE layer; None for a dense model."""
        return [expert.reshape(*self.tokens.shape, -1) for expert in self.forced_experts] or None

    @property
    def windows(self) -> Integers:
        """Tokens and targets as one micro-batch [1, B, T + 1]."""
        return np.concatenate([self.tokens, self.targets[:, -1:]], axis=1)[None].astype(np.int32)

    def side(self) -> Side:
        """Return the results of the reference as a Side."""
        after, moments, step = self.stepped(self.experts)
        return Side(
            name="reference",
            experts=self.experts,
            weights=self.weights,
            intermediates=self.intermediates,
            logits=self.logits,
            losses=self.losses,
            gradients=self.gradients,
            update={name: np.zeros_like(value) for name, value in after.items()},
            moments=moments,
            step=step,
            moved_assignments=0.0,
            inference_logits=self.inference_logits,
            causality=self.causality,
        )

    def stepped(self, experts: list[Integers]) -> tuple[dict[str, Doubles], dict[str, Doubles], dict[str, float]]:
        """Do one optimizer step with these experts; return parameters, moments and metrics."""
        from moezoo.core.reference.losses import loss_and_gradients
        from moezoo.core.reference.optimizer import global_norm, optimizer_step
        from moezoo.core.reference.router_state import updated_state

        losses, gradients = self.losses, self.gradients
        if any(not np.array_equal(own, other) for own, other in zip(self.forced_experts, experts, strict=True)):
            losses, gradients = loss_and_gradients(
                self.spec,
                self.weights,
                self.tokens,
                self.targets,
                forced=experts or None,
                key=self.key,
                trained=self.trained,
            )
        parameters, moments = optimizer_step(
            self.optimizer,
            self.rules,
            self.weights,
            gradients,
            {name: value.astype(np.float64) for name, value in self.moments.items()},
            learning_rate=self.optimizer.learning_rate,
            update=_UPDATES_DONE + 1,
        )
        # The load follows from these experts; cutoffs do not depend on the choice.
        loads = [
            np.bincount(expert_PK[expert_PK >= 0], minlength=moe.num_choices).astype(np.float64)
            for moe, expert_PK in zip(self.moes, experts, strict=True)
        ]
        state = self.state
        if router_trains(self.spec, self.trained):
            state = updated_state(self.spec, state, loads, self.cutoffs)
        return (
            {**self.weights, **parameters, **state},
            moments,
            {"gradient_norm": global_norm(gradients), **losses},
        )

    @property
    def moes(self) -> list[MoESpec]:
        """Every MoE layer's spec."""
        return [moe for _, moe in self.spec.moes]


def backend_side(
    name: str, backend: Backend, reference: Reference, rounding: float, codes: Mapping[str, QuantizedWeight]
) -> Side:
    """Run a backend on all inputs of the reference; its forward passes compute with `codes`, which cannot be trained.

    `rounding`: tolerance of its causality check.
    """
    in_codes: Mapping[str, Any] = {**reference.weights32, **codes}
    trained = backend.build(reference.spec, reference.weights32)
    model = backend.build(reference.spec, in_codes) if codes else trained
    weights = trained.export_parameters()
    free = model.forward(reference.tokens, key=reference.key)
    experts = [routing.expert.reshape(-1, routing.expert.shape[-1]) for routing in free.routing]
    options: dict[str, Any] = {"forced": reference.forced, "key": reference.key}
    output = model.forward(reference.tokens, reference.targets, record=True, **options)
    _, gradients = trained.loss_and_gradients(reference.tokens, reference.targets, **options, trained=reference.trained)

    def run(tokens: Integers, inference: bool) -> Mapping[str, NDArray[Any]]:
        return model.forward(tokens, record=True, inference=inference).intermediates

    causality = check_causality(name, run, reference.spec, reference.tokens, rounding)
    inference_logits = run(reference.tokens, True)["logits"] if reference.spec.inference_differs else None
    after, moments, step, load = _stepped(trained, reference)
    expected_after, expected_moments, expected_step = reference.stepped(_aligned_experts(reference.experts, experts))
    own = reference.side()
    return Side(
        name=name,
        experts=experts,
        weights=weights,
        intermediates=output.intermediates,
        logits=output.logits,
        losses=output.losses,
        gradients=gradients,
        update=_corrected(after, expected_after, own.update),
        moments=_corrected(moments, expected_moments, own.moments),
        step={key: own.step[key] + step[key] - expected_step[key] for key in step if key in expected_step},
        moved_assignments=_moved_assignments(reference.spec, experts, load),
        inference_logits=inference_logits,
        causality=causality,
    )


def _stepped(
    model: Model, reference: Reference
) -> tuple[Mapping[str, Floats], dict[str, Floats], dict[str, float], list[NDArray[np.int64]]]:
    """Do one `train_step` of a backend from the same moments."""
    model.start_training(reference.optimizer, reference.moments, _UPDATES_DONE, trained=reference.trained)
    metrics = model.train_step(reference.windows, reference.optimizer.learning_rate, reference.key[None]).fetch()
    numbers = {"gradient_norm": metrics.gradient_norm, **metrics.losses}
    return model.export_parameters(), model.export_optimizer(), numbers, metrics.load


def _corrected(
    values: Mapping[str, Floats], expected: Mapping[str, Doubles], own: Mapping[str, Doubles]
) -> dict[str, Doubles]:
    """Return `own + (values - expected)` by name, for names with the expected shape."""
    return {
        name: own[name] + (np.asarray(value, np.float64) - expected[name])
        for name, value in values.items()
        if name in expected and np.shape(value) == np.shape(expected[name])
    }


def _aligned_experts(own: list[Integers], other: list[Integers]) -> list[Integers]:
    """Return the other side's experts, in our order for each token with the same set.

    A backend reports experts by descending weight, but with a choice that draws one expert after the other
    (sparsemixer) weights depend on the order.
    """

    def aligned(own_PK: Integers, other_PK: Integers) -> Integers:
        same_P = np.all(np.sort(own_PK, axis=-1) == np.sort(other_PK, axis=-1), axis=-1)
        return np.where(same_P[:, None], own_PK, other_PK)

    return [aligned(own_PK, other_PK) for own_PK, other_PK in zip(own, other, strict=True)]


def _moved_assignments(spec: ModelSpec, experts: list[Integers], load: list[NDArray[np.int64]]) -> float:
    """Return the share of assignments that differ between the step and the forward pass, in the worst layer."""
    moes = [moe for _, moe in spec.moes]
    if len(load) != len(moes):
        return float("inf")
    shares = [0.0]
    for moe, expert_PK, size_E in zip(moes, experts, load, strict=True):
        counts_E = np.bincount(expert_PK[expert_PK >= 0], minlength=moe.num_choices)
        shares.append(float(np.sum(np.abs(counts_E - size_E)) / 2 / max(counts_E.sum(), 1)))
    return max(shares)


def _largest(values: Any) -> float:
    return float(np.max(np.abs(values))) if np.size(values) else 0.0


def _furthest(found: Mapping[str, NDArray[Any]], known: Mapping[str, NDArray[Any]], least: float) -> float:
    """Return the largest relative difference of any tensor. `least`: lower limit of a tensor's scale."""
    scales = {name: max(_largest(value), least) for name, value in known.items()}
    return max((_largest(found[name] - known[name]) / scale for name, scale in scales.items() if scale), default=0.0)
