"""Do the reference and the backends compute the same model? Weights and tokens in, every difference out.

What is compared, and why it is done under forced routing, stands in writings/parity.md.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.backend import Backend, check_length
from moezoo.core.config.run_config import Config
from moezoo.core.config.training import OptimizerConfig
from moezoo.core.config.vocabulary import ASSUMED_CHARACTERS, spec_with_vocab_size
from moezoo.core.cost.memory import attention_widths
from moezoo.core.cost.parameters import parameter_counts
from moezoo.core.errors import SpecError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.parity.report import (
    Comparison,
    Kind,
    ParityReport,
    ParityTolerances,
    RoutingComparison,
    names_in_order,
)
from moezoo.core.parity.sides import Doubles, Reference, Side, backend_side
from moezoo.core.random import fold_in, key, uniform
from moezoo.core.runs.init_from import load_resolved_config, open_initial_weights
from moezoo.core.runs.open import is_config, open_model
from moezoo.core.spec import CapacitySpec, ExpertChoiceSpec, ModelSpec
from moezoo.core.tokens import Floats, Integers

LIMIT_BYTES = 8 * 2**30
_CHECKPOINT_RATE = 1e-3  # learning rate of the one step with weights of a Hugging Face checkpoint
_TOKENS_PURPOSE = 0x706172  # "par": what the random tokens are for, as a counter


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
    by_amplification: bool = False,
) -> ParityReport:
    """Run the float64 reference and each backend on the same weights and tokens, and compare every two of them.

    Free routing: the sets of chosen experts, per layer. Forced routing (everyone takes the reference's experts):
    intermediates, logits, loss terms, gradients. Then one optimizer step from given moments, with free routing, each
    backend against a reference that takes that backend's experts.

    Args:
        spec: the model.
        weights: float32 by canonical name.
        tokens, targets: int32 [B, T]; targets are the next tokens: `targets[:, :-1] == tokens[:, 1:]`.
        backends: name in the report -> backend; at least one.
        optimizer: of the step; its learning rate is the peak.
        tolerances: None for those of the spec's compute dtype.
        where: what the report calls the model.
        notes: lines for the report.
        by_amplification: widen tolerances to ten times what one rounding of the weights moves in the reference, where
            that is more: trained weights can amplify it far more than initial ones.

    Raises SpecError: no backend, targets that are not the next tokens, or a reference larger than LIMIT_BYTES. Raises
    DataError: more tokens than learned positions.
    """
    _check_request(spec, tokens, targets, backends)
    tolerances = tolerances or ParityTolerances.of(spec)
    reference = Reference(spec, weights, tokens, targets, optimizer)
    if by_amplification:
        moved = reference.amplified(tolerances.gradient_floor)
        tolerances = tolerances.amplified(moved)
        told = ", ".join(f"{name} by {value:.1e}" for name, value in moved.items())
        notes = [*notes, f"one float32 rounding of every weight moves {told}; tolerances are at least ten times that"]
    sides = [reference.side()]
    sides += [backend_side(name, backend, reference, tolerances.intermediate) for name, backend in backends.items()]
    pairs = [(left, right) for place, left in enumerate(sides) for right in sides[place + 1 :]]
    comparisons: list[Comparison] = []
    routing: list[RoutingComparison] = []
    first: dict[str, str | None] = {}
    for left, right in pairs:
        pair = f"{left.name}/{right.name}"
        routing += _compare_routing(pair, reference, left, right, tolerances)
        rows = _compare(pair, sides[0], left, right, tolerances, optimizer.learning_rate)
        first[pair] = next((row.name for row in rows if row.kind == "intermediate" and not row.passed), None)
        comparisons += rows
    return ParityReport(
        where=where,
        batch_size=tokens.shape[0],
        sequence_length=tokens.shape[1],
        pairs=tuple(first),
        facts={name: backend.facts() for name, backend in backends.items()},
        routing=tuple(routing),
        comparisons=tuple(comparisons),
        first_difference=first,
        tolerances=tolerances,
        notes=tuple(notes),
        causality=tuple(check for side in sides for check in side.causality),
    )


def parity_of(
    path: str | Path,
    backends: Mapping[str, Backend],
    *,
    batch_size: int = 2,
    sequence_length: int | None = None,
    overrides: Sequence[str] = (),
    tolerances: ParityTolerances | None = None,
) -> ParityReport:
    """`parity` of a config (initial weights of `training.seed`), or of what `open_model` opens, on its newest weights.

    Tokens are random, a function of `training.seed`; T is `min(training.sequence_length, 64)` unless given. A
    vocab_size of null becomes the tokenizer's number where it needs no data, and ASSUMED_CHARACTERS elsewhere.
    `overrides` are of a config. Weights of a Hugging Face checkpoint are compared as float32, whatever they are stored
    in; they are read once the size is known to be small enough.

    Raises SpecError or CheckpointError for what cannot be read, and otherwise as `parity`.
    """
    notes: list[str] = []
    weights: Mapping[str, NDArray[Any]] | None = None
    from_checkpoint = False
    if is_config(path):
        config = load_resolved_config(path, overrides)
    else:
        config, weights, from_checkpoint = _opened(path, notes)
    spec, assumed = spec_with_vocab_size(config, assumed_subwords=ASSUMED_CHARACTERS)
    notes += [f"assumed: {assumed}"] if assumed else []
    length = min(config.training.sequence_length, 64) if sequence_length is None else sequence_length
    if batch_size < 1 or length < 1:
        raise SpecError(f"parity needs tokens; got {batch_size} sequences of {length}; expected at least 1 of 1.")
    refuse_if_too_large(spec, batch_size, length, len(backends))
    if weights is None and config.init_from is not None:
        weights = {name: np.asarray(value, np.float32) for name, value in open_initial_weights(config).weights.items()}
        notes.append(f"weights of {config.init_from.path}")
    elif weights is None:
        weights = initial_weights(spec, config.training.seed)
        notes.append(f"initial weights of seed {config.training.seed}")
    windows = random_windows(spec.vocab, batch_size, length, config.training.seed)
    return parity(
        spec,
        {name: np.asarray(weights[name], np.float32) for name in weights},
        windows[:, :-1],
        windows[:, 1:],
        backends,
        config.optimizer,
        tolerances,
        where=str(path),
        notes=notes,
        by_amplification=from_checkpoint,
    )


def random_windows(vocab_size: int, batch_size: int, length: int, seed: int) -> Integers:
    """Uniform random tokens int32 [B, T + 1], the same wherever they are drawn."""
    share = uniform(fold_in(key(seed), _TOKENS_PURPOSE), (batch_size, length + 1))
    return np.minimum((share.astype(np.float64) * vocab_size).astype(np.int32), np.int32(vocab_size - 1))


def reference_bytes(spec: ModelSpec, batch_size: int, length: int, num_backends: int) -> int:
    """Estimate of the memory that a check needs.

    `n (96 + 40 * backends)` for n parameters: weights, gradients, moments and updates, in float64 and, per backend,
    in float32. And what autograd keeps of each operation in float64, with P = B T and R = P K: per layer `64 P N T` for
    the scores, `80 P F` or `80 R F` for a feed-forward, `16 P R` for the combine, `64 P (2 N + 2 M) H`, `160 P D`; and
    `64 P V` at the end.
    """
    parameters = parameter_counts(spec).total
    tokens, doubles = batch_size * length, 0
    for layer in spec.all_layers:
        moe, (heads, projected) = layer.moe, attention_widths(layer.attention, spec.embed_dim)
        doubles += 8 * heads * length + 16 * projected + 20 * spec.embed_dim
        if layer.feed_forward is not None:
            doubles += 10 * layer.feed_forward.hidden_dim
        if moe is not None:
            slots = moe.num_slots
            doubles += 10 * slots * moe.experts.hidden_dim + 2 * tokens * slots
            doubles += 10 * moe.shared_feed_forward.hidden_dim if moe.shared is not None else 0
    return parameters * (96 + 40 * num_backends) + 8 * tokens * (doubles + 8 * spec.vocab)


def refuse_if_too_large(spec: ModelSpec, batch_size: int, length: int, num_backends: int) -> None:
    """Raises SpecError where `reference_bytes` is above LIMIT_BYTES, before anything is built."""
    needed = reference_bytes(spec, batch_size, length, num_backends)
    if needed > LIMIT_BYTES:
        raise SpecError(
            f"the float64 reference of this model would need about {needed / 2**30:.1f} GiB (parameters "
            f"{parameter_counts(spec).total:,}, tokens {batch_size} x {length}); expected at most "
            f"{LIMIT_BYTES / 2**30:.0f} GiB. Check a config of the same parts with smaller sizes."
        )


# --- comparing -------------------------------------------------------------------------------------------------------


def _compare(
    pair: str, reference: Side, left: Side, right: Side, tolerances: ParityTolerances, learning_rate: float
) -> list[Comparison]:
    """Every comparison but free routing; intermediates in the reference's order, which is that of the forward pass."""
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
    for order, power in (("first_moment.", 1), ("second_moment.", 2)):
        named("moment", t.gradient, t.gradient_floor**power, order)
    named("step", t.loss)
    moved = max(left.moved_copies, right.moved_copies)
    rows.append(Comparison(pair, "step", "load: share of copies sent elsewhere", moved, moved, t.load))
    return rows


def _values(side: Side, kind: Kind, prefix: str) -> dict[str, Any]:
    """What a side has of this kind, by name; of names that start with `prefix`."""
    of: dict[Kind, Mapping[str, Any]] = {
        "weights": side.weights,
        "intermediate": side.intermediates,
        "loss": side.losses,
        "gradient": side.gradients,
        "moment": side.moments,
        "step": side.step,
    }
    return {name: value for name, value in of[kind].items() if name.startswith(prefix)}


def _comparison(
    pair: str, kind: Kind, name: str, reference: Any, left: Any, right: Any, tolerance: float, floor: float
) -> Comparison:
    """Largest absolute difference, and the same relative to the reference's largest absolute value, or to `floor`."""
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
    """Difference of a parameter after the step; relative to the learning rate, beyond what float32 can hold."""
    if left is None or right is None:
        return Comparison(pair, "update", name, float("inf"), float("inf"), tolerances.update)
    difference = np.abs(left - right)
    last_place = np.spacing(np.abs(weight).astype(np.float32)).astype(np.float64)
    beyond = _largest(np.maximum(difference - float32_sides * last_place, 0.0))
    return Comparison(pair, "update", name, _largest(difference), beyond / learning_rate, tolerances.update)


def _compare_routing(
    pair: str, reference: Reference, left: Side, right: Side, tolerances: ParityTolerances
) -> list[RoutingComparison]:
    """Sets of experts under free routing, layer by layer; what an earlier difference can have reached is set apart."""
    spec, shape = reference.spec, reference.tokens.shape
    reached_BT = np.zeros(shape, bool)
    rows = []
    for place, layer in enumerate(spec.moe_layers):
        one, other = np.sort(left.experts[place], axis=-1), np.sort(right.experts[place], axis=-1)
        differs_BT = np.any(one != other, axis=-1).reshape(shape)
        moe = reference.moes[place]
        if isinstance(moe.router.choice, ExpertChoiceSpec) and np.any(reached_BT):
            reached_BT[:] = True  # experts choose among all tokens, and one of them has changed
        margin_BT = reference.margins[place].reshape(shape)
        judged = margin_BT[differs_BT & ~reached_BT]
        rows.append(
            RoutingComparison(
                pair=pair,
                layer=layer,
                tokens=differs_BT.size,
                identical=int(np.sum(~differs_BT)),
                downstream=int(np.sum(differs_BT & reached_BT)),
                margin=float(np.max(judged)) if judged.size else None,
                tolerance=tolerances.margin,
            )
        )
        # A token's own later layers, and through attention those of the tokens after it, see the difference.
        reached_BT |= np.logical_or.accumulate(differs_BT, axis=1)
        if moe.inference_differs:
            # A place that one token takes from an expert is a place lost to any other, of its group.
            by_sequence = isinstance(moe.dispatch, CapacitySpec) and moe.dispatch.group == "sequence"
            reached_BT |= np.any(differs_BT, axis=1 if by_sequence else None, keepdims=True)
    return rows


def _largest(values: Any) -> float:
    """Largest absolute value; NaN where there is one."""
    array = np.abs(np.asarray(values, np.float64))
    return float(np.max(array)) if array.size else 0.0


# --- what is asked ---------------------------------------------------------------------------------------------------


def _check_request(spec: ModelSpec, tokens: Integers, targets: Integers, backends: Mapping[str, Backend]) -> None:
    if not backends:
        raise SpecError("parity compares backends with the reference; got none. Give at least one.")
    if "reference" in backends:
        raise SpecError("a backend is called 'reference', which is the name of the float64 side. Use another name.")
    if tokens.shape != targets.shape or not np.array_equal(tokens[:, 1:], targets[:, :-1]):
        raise SpecError(
            f"targets are not the next tokens; got tokens {tokens.shape} and targets {targets.shape}; expected "
            "targets[:, :-1] == tokens[:, 1:], as a training step has them. Cut both from one window."
        )
    check_length(spec, tokens.shape[1], f"sequences of {tokens.shape[1]} tokens")
    refuse_if_too_large(spec, tokens.shape[0], tokens.shape[1], len(backends))


def _opened(path: str | Path, notes: list[str]) -> tuple[Config, Mapping[str, NDArray[Any]], bool]:
    """Config and newest weights of a run, of a Hugging Face folder or hub id; and whether it is of the latter."""
    opened = open_model(path)
    notes.extend(opened.problems)
    if opened.checkpoint is None:
        notes.append(f"weights of step {opened.step}")
        return opened.config, opened.weights, False
    notes.append(f"weights of {opened.checkpoint.family.name} ({opened.path}), as float32")
    # Trap: the step is compared in learning rates, and one of 1e-5 is not far from what float32 rounds off a weight.
    optimizer = opened.config.optimizer.model_copy(update={"learning_rate": _CHECKPOINT_RATE})
    return opened.config.model_copy(update={"optimizer": optimizer}), opened.weights, True
