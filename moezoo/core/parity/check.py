"""The parity check: compare the float64 reference and the backends on the same weights and tokens.

Writing, with the reasons for forced routing: writings/parity.md.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.backend import Backend, check_length
from moezoo.core.config.optimizers import OptimizerConfig
from moezoo.core.config.run_config import Config
from moezoo.core.config.vocabulary import ASSUMED_CHARACTERS, spec_with_vocab_size
from moezoo.core.errors import SpecError
from moezoo.core.huggingface.nonfinite import nonfinite_names, nonfinite_warning
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.parameters.trained import trained_names
from moezoo.core.parity.reference_size import check_reference_size
from moezoo.core.parity.report import (
    Comparison,
    Kind,
    ParityReport,
    ParityTolerances,
    RoutingComparison,
    names_in_order,
)
from moezoo.core.parity.sides import Reference, Side, backend_side
from moezoo.core.parity.starting_state import Doubles
from moezoo.core.quantization.weight import QuantizedWeight, stored
from moezoo.core.random import fold_in, key, uniform
from moezoo.core.runs.init_from import load_resolved_config, open_initial_weights
from moezoo.core.runs.open import is_config, open_model
from moezoo.core.spec import CapacitySpec, ExpertChoiceSpec, ModelSpec
from moezoo.core.tokens import Floats, Integers
from moezoo.core.traces.replay import replayed_windows
from moezoo.core.traces.trace import RoutingTrace

_CHECKPOINT_RATE = 1e-3  # learning rate of the training step for weights of a Hugging Face checkpoint
_TOKENS_PURPOSE = 0x706172  # "par": purpose of the random tokens, folded into their key


def parity(
    spec: ModelSpec,
    weights: Mapping[str, Floats],
    tokens: Integers,
    targets: Integers,
    backends: Mapping[str, Backend],
    optimizer: OptimizerConfig,
    tolerances: ParityTolerances | None = None,
    *,
    where: str = "model",
    notes: Sequence[str] = (),
    widen_by_rounding: bool = False,
    codes: Mapping[str, QuantizedWeight] | None = None,
    trained: Collection[str] | None = None,
    replayed: list[Integers] | None = None,
) -> ParityReport:
    """Run the float64 reference and each backend on the same weights and tokens, and compare them pairwise.

    With free routing, compare the set of experts of each token and layer. With forced routing (all sides use the
    reference's experts), compare intermediates, logits, loss terms and gradients. Then do one optimizer step from fixed
    nonzero moments with free routing, and compare each backend with a reference that uses the backend's experts.

    Args:
        spec: the model.
        weights: float32 by canonical name.
        tokens, targets: int32 [B, T]; targets are the next tokens: `targets[:, :-1] == tokens[:, 1:]`.
        backends: by name in the report; at least one.
        optimizer: of the step; uses its peak learning rate.
        tolerances: None: those of the spec's compute dtype.
        where: name of the model in the report.
        notes: lines for the report.
        widen_by_rounding: widen tolerances to ten times the effect of one float32 rounding of the weights in the
            reference, if that is more. Trained weights can amplify rounding far more than initial ones.
        codes: parameters, by name, that the forward passes of the backends compute in codes; gradients and the step are
            those of the decoded floats, which `weights` has.
        trained: names of the parameters with gradients and an update (`core.parameters.trained`); None: all.
        replayed: experts [B, T, K] per MoE layer for forced routing; None: the reference's.

    Raises SpecError: no backend, targets that are not the next tokens, or a reference larger than the limit
    (`reference_size`). Raises DataError: more tokens than positions.
    """
    _check_request(spec, tokens, targets, backends)
    tolerances = tolerances or ParityTolerances.of(spec)
    reference = Reference(spec, weights, tokens, targets, optimizer, trained, replayed)
    if widen_by_rounding:
        moved = reference.rounding_sensitivity(tolerances.gradient_floor)
        tolerances = tolerances.widened(moved)
        effects = ", ".join(f"{name} by {value:.1e}" for name, value in moved.items())
        notes = [
            *notes,
            f"one float32 rounding of all weights moves {effects}; tolerances are at least ten times that",
        ]
    sides = [reference.side()]
    sides += [
        backend_side(name, backend, reference, tolerances.intermediate, codes or {})
        for name, backend in backends.items()
    ]
    return _report(reference, sides, tolerances, where, notes, {name: each.facts() for name, each in backends.items()})


def parity_of(
    path: str | Path,
    backends: Mapping[str, Backend],
    *,
    batch_size: int = 2,
    sequence_length: int | None = None,
    adapter: str | Path | None = None,
    replay: RoutingTrace | None = None,
) -> ParityReport:
    """Run `parity` on a config, or on the newest weights of a run folder, a Hugging Face folder or a hub id.

    A config gets initial weights of `training.seed`, or those of `init_from`. Tolerances are widened by rounding for
    checkpoints, whose trained weights amplify it, and for hyper-connections. Tokens are random, a function of
    `training.seed`. A vocab_size of null becomes the tokenizer's size if no data is needed for it, else
    ASSUMED_CHARACTERS. Weights of a Hugging Face checkpoint are compared as float32, and read after the size check.

    Args:
        path: a YAML config, or what `open_model` opens.
        backends: by name in the report.
        batch_size: B.
        adapter: for the model at the path, as `open_model` takes it.
        sequence_length: T; None: `min(training.sequence_length, 64)`.
        replay: trace whose first tokens, with their experts, are used instead of random ones.

    Raises SpecError or CheckpointError: the path cannot be read. Raises what `parity` raises.
    """
    notes: list[str] = []
    if is_config(path):
        config, weights, from_checkpoint = load_resolved_config(path), None, False
    else:
        config, weights, from_checkpoint = _open_weights(path, notes, adapter)
    spec, assumed = spec_with_vocab_size(config, assumed_subwords=ASSUMED_CHARACTERS)
    notes += [f"assumed: {assumed}"] if assumed else []
    length = min(config.training.sequence_length, 64) if sequence_length is None else sequence_length
    if batch_size < 1 or length < 1:
        raise SpecError(
            f"parity needs at least one token; got {batch_size} sequences of {length}; expected at least 1 of 1."
        )
    check_reference_size(spec, batch_size, length, len(backends))
    weights = _initial(config, spec, notes) if weights is None else weights
    windows, replayed = random_windows(spec.vocab, batch_size, length, config.training.seed), None
    if replay is not None:
        windows, replayed = replayed_windows(replay, spec, batch_size, length)
        notes.append(f"forced routing is that of the first {windows[:, :-1].size} tokens of {replay.where}")
    read = {name: np.asarray(weights[name], np.float32) for name in weights}
    notes += [line for line in [nonfinite_warning(nonfinite_names(read.items()), str(path))] if line]
    return parity(
        spec,
        read,
        windows[:, :-1],
        windows[:, 1:],
        backends,
        config.optimizer,
        where=str(path),
        notes=notes,
        widen_by_rounding=from_checkpoint or _gradients_cancel(spec),
        codes=_codes(weights, notes),
        trained=trained_names(spec, config.training.only),
        replayed=replayed,
    )


def _gradients_cancel(spec: ModelSpec) -> bool:
    """Return whether gradients are sums over tokens of terms that cancel, with any weights: of scales of streams.

    Measured: writings/hyper_connections.md. Of other parts initial weights amplify less than the tolerances.
    """
    return spec.residual.kind == "hyper_connections"


def _initial(config: Config, spec: ModelSpec, notes: list[str]) -> Mapping[str, NDArray[Any]]:
    """Return the weights that a config starts from."""
    if config.init_from is None:
        notes.append(f"initial weights of seed {config.training.seed}")
        return initial_weights(spec, config.training.seed, active_adapters=True)
    notes.append(f"weights of {config.init_from.path}")
    return {name: np.asarray(value, np.float32) for name, value in open_initial_weights(config).weights.items()}


def _codes(weights: Mapping[str, Any], notes: list[str]) -> dict[str, QuantizedWeight]:
    codes = {name: value for name in weights if isinstance(value := stored(weights, name), QuantizedWeight)}
    if codes:
        notes.append(f"forward passes compute with {len(codes)} parameters in codes, gradients and the step in floats")
    return codes


def random_windows(vocab_size: int, batch_size: int, length: int, seed: int) -> Integers:
    """Draw uniform random tokens int32 [B, T + 1], equal on every machine."""
    share = uniform(fold_in(key(seed), _TOKENS_PURPOSE), (batch_size, length + 1))
    return np.minimum((share.astype(np.float64) * vocab_size).astype(np.int32), np.int32(vocab_size - 1))


# --- comparisons -----------------------------------------------------------------------------------------------------


def _report(
    reference: Reference,
    sides: Sequence[Side],
    tolerances: ParityTolerances,
    where: str,
    notes: Sequence[str],
    facts: Mapping[str, Mapping[str, str]],
) -> ParityReport:
    """Compare every two sides."""
    comparisons: list[Comparison] = []
    routing: list[RoutingComparison] = []
    first: dict[str, str | None] = {}
    for index, left in enumerate(sides):
        for right in sides[index + 1 :]:
            pair = f"{left.name}/{right.name}"
            routing += _compare_routing(pair, reference, left, right, tolerances)
            rows = _compare(pair, sides[0], left, right, tolerances, reference.optimizer.learning_rate)
            first[pair] = next((row.name for row in rows if row.kind == "intermediate" and not row.passed), None)
            comparisons += rows
    return ParityReport(
        where=where,
        batch_size=reference.tokens.shape[0],
        sequence_length=reference.tokens.shape[1],
        pairs=tuple(first),
        facts=facts,
        routing=tuple(routing),
        comparisons=tuple(comparisons),
        first_difference=first,
        tolerances=tolerances,
        notes=tuple(notes),
        causality=tuple(check for side in sides for check in side.causality),
    )


def _compare(
    pair: str, reference: Side, left: Side, right: Side, tolerances: ParityTolerances, learning_rate: float
) -> list[Comparison]:
    """Compare everything except free routing; intermediates are in the reference's order, that of the forward pass."""
    t = tolerances
    rows: list[Comparison] = []

    def named(kind: Kind, tolerance: float, floor: float = 0.0, prefix: str = "") -> None:
        known, a, b = (_values(side, kind, prefix) for side in (reference, left, right))
        least = floor * max((_largest(value) for value in known.values()), default=0.0) if floor else 0.0
        for name in names_in_order(list(known), [*a, *b]):
            rows.append(_comparison(pair, kind, name, known.get(name), a.get(name), b.get(name), tolerance, least))

    named("weights", 0.0)
    named("intermediate", t.intermediate)
    rows.append(_comparison(pair, "logits", "logits", reference.logits, left.logits, right.logits, t.logits, 0.0))
    if reference.inference_logits is not None:
        known, a, b = (side.inference_logits for side in (reference, left, right))
        rows.append(_comparison(pair, "logits", "logits by inference routing", known, a, b, t.logits, 0.0))
    named("loss", t.loss)
    named("gradient", t.gradient, t.gradient_floor)
    float32_sides = 1 if left is reference else 2
    for name, weight in reference.weights.items():
        rows.append(
            _update(pair, name, weight, left.update.get(name), right.update.get(name), learning_rate, float32_sides, t)
        )
    for order, power in (("first_moment", 1), ("momentum", 1), ("second_moment", 2)):
        named("moment", t.gradient, t.gradient_floor**power, order)
    named("step", t.loss)
    moved = max(left.moved_assignments, right.moved_assignments)
    rows.append(Comparison(pair, "step", "load: share of assignments that differ", moved, moved, t.load))
    return rows


def _values(side: Side, kind: Kind, prefix: str) -> dict[str, Any]:
    """Return a side's tensors of a kind by name, those whose name starts with `prefix`."""
    values: dict[Kind, Mapping[str, Any]] = {
        "weights": side.weights,
        "intermediate": side.intermediates,
        "loss": side.losses,
        "gradient": side.gradients,
        "moment": side.moments,
        "step": side.step,
    }
    return {name: value for name, value in values[kind].items() if name.startswith(prefix)}


def _comparison(
    pair: str, kind: Kind, name: str, reference: Any, left: Any, right: Any, tolerance: float, floor: float
) -> Comparison:
    """Compare a tensor: largest absolute difference, also relative to the reference's largest absolute value.

    `floor`: lower limit of that scale.
    """
    if reference is None or left is None or right is None or np.shape(left) != np.shape(right):
        return Comparison(pair, kind, name, float("inf"), float("inf"), tolerance)
    absolute = _largest(np.asarray(left, np.float64) - np.asarray(right, np.float64))
    scale = max(_largest(reference), floor)
    relative = 0.0 if absolute == 0 else absolute / scale if scale else float("inf")
    return Comparison(pair, kind, name, absolute, relative, tolerance)


def _update(
    pair: str,
    name: str,
    weight: Doubles,
    left: Doubles | None,
    right: Doubles | None,
    learning_rate: float,
    float32_sides: int,
    tolerances: ParityTolerances,
) -> Comparison:
    """Compare a parameter after the step: difference beyond float32 precision, relative to the learning rate."""
    if left is None or right is None:
        return Comparison(pair, "update", name, float("inf"), float("inf"), tolerances.update)
    difference = np.abs(left - right)
    last_place = np.spacing(np.abs(weight).astype(np.float32)).astype(np.float64)
    beyond = _largest(np.maximum(difference - float32_sides * last_place, 0.0))
    return Comparison(pair, "update", name, _largest(difference), beyond / learning_rate, tolerances.update)


def _compare_routing(
    pair: str, reference: Reference, left: Side, right: Side, tolerances: ParityTolerances
) -> list[RoutingComparison]:
    """Compare the experts of each token with free routing, layer by layer.

    Tokens that an earlier difference can have affected are counted as downstream and not judged.
    """
    spec, shape = reference.spec, reference.tokens.shape
    affected_BT = np.zeros(shape, bool)
    rows = []
    for index, layer in enumerate(spec.moe_layers):
        one, other = np.sort(left.experts[index], axis=-1), np.sort(right.experts[index], axis=-1)
        differs_BT = np.any(one != other, axis=-1).reshape(shape)
        moe = reference.moes[index]
        if isinstance(moe.router.choice, ExpertChoiceSpec) and np.any(affected_BT):
            affected_BT[:] = True  # experts choose among all tokens, and one of them changed
        margin_BT = reference.margins[index].reshape(shape)
        judged = margin_BT[differs_BT & ~affected_BT]
        rows.append(
            RoutingComparison(
                pair=pair,
                layer=layer,
                tokens=differs_BT.size,
                identical=int(np.sum(~differs_BT)),
                downstream=int(np.sum(differs_BT & affected_BT)),
                margin=float(np.max(judged)) if judged.size else None,
                tolerance=tolerances.margin,
            )
        )
        # A difference affects later layers of the same token and, through attention, of the tokens after it.
        affected_BT |= np.logical_or.accumulate(differs_BT, axis=1)
        if moe.inference_differs:
            # A slot that one token takes in an expert is lost to the other tokens of its group.
            by_sequence = isinstance(moe.dispatch, CapacitySpec) and moe.dispatch.group == "sequence"
            affected_BT |= np.any(differs_BT, axis=1 if by_sequence else None, keepdims=True)
    return rows


def _largest(values: Any) -> float:
    """Return the largest absolute value; NaN if there is one."""
    array = np.abs(np.asarray(values, np.float64))
    return float(np.max(array)) if array.size else 0.0


# --- inputs ----------------------------------------------------------------------------------------------------------


def _check_request(spec: ModelSpec, tokens: Integers, targets: Integers, backends: Mapping[str, Backend]) -> None:
    if not backends:
        raise SpecError("parity compares backends with the reference; got none; expected at least one. Pass a backend.")
    if "reference" in backends:
        raise SpecError("a backend is named 'reference', which is the name of the float64 side. Use another name.")
    if tokens.shape != targets.shape or not np.array_equal(tokens[:, 1:], targets[:, :-1]):
        raise SpecError(
            f"targets are not the next tokens; got tokens {tokens.shape} and targets {targets.shape}; expected "
            "targets[:, :-1] == tokens[:, 1:], as in a training step. Slice both from one window."
        )
    check_length(spec, tokens.shape[1], f"sequences of {tokens.shape[1]} tokens")
    check_reference_size(spec, tokens.shape[0], tokens.shape[1], len(backends))


def _open_weights(
    path: str | Path, notes: list[str], adapter: str | Path | None
) -> tuple[Config, Mapping[str, NDArray[Any]], bool]:
    """Open config and newest weights of a run or a Hugging Face checkpoint; also return whether it is the latter."""
    opened = open_model(path, adapter=adapter)
    notes.extend(opened.problems)
    if opened.checkpoint is None:
        notes.append(f"weights of step {opened.step}")
        return opened.config, opened.weights, False
    notes.append(f"weights of {opened.checkpoint.family.name} ({opened.path}), as float32")
    # Trap: updates are compared in units of the learning rate, and 1e-5 is close to the float32 rounding of a weight.
    optimizer = opened.config.optimizer.model_copy(update={"learning_rate": _CHECKPOINT_RATE})
    return opened.config.model_copy(update={"optimizer": optimizer}), opened.weights, True
