"""Findings from the tensors of a checkpoint, read one at a time: parameters, and the state of the optimizer."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moezoo.core.config.run_config import Config
from moezoo.core.doctor.finding import Finding
from moezoo.core.huggingface.nonfinite import is_finite, is_finite_weight
from moezoo.core.parameters import Parameter, parameter_table
from moezoo.core.parameters.initialize import initial_value
from moezoo.core.parameters.trained import trained_rows
from moezoo.core.progress import Progress
from moezoo.core.quantization.weight import QuantizedWeight, stored
from moezoo.core.spec import ModelSpec

_ROUTER, _EXPERT = ".router.w_router", "expert"
_ROUTER_BITS = 8  # what mlx-lm keeps routers in
_FIRST = 64  # numbers, which show of nearly every array that it is not zero

State = Mapping[str, NDArray[Any]]


@dataclass
class _Seen:
    """Names of the parameters with each problem."""

    nonfinite: list[str]
    zero_router: list[str]
    few_bits: list[str]
    zero_experts: dict[str, list[int]]


def weight_findings(spec: ModelSpec, weights: Mapping[str, Any], on_progress: Progress | None = None) -> list[Finding]:
    """Return findings about the values of parameters, of which one is in memory at a time.

    Args:
        spec: the model.
        weights: by canonical name, or a part of them (of an adapter).
        on_progress: called with the number of parameters read.
    """
    seen = _Seen([], [], [], {})
    rows = [row for row in parameter_table(spec) if row.name in weights]
    for number, row in enumerate(rows):
        if on_progress is not None:
            on_progress("parameters", number, len(rows))
        value = stored(weights, row.name)
        if isinstance(value, QuantizedWeight):
            if not is_finite_weight(value):
                seen.nonfinite.append(row.name)
            if row.name.endswith(_ROUTER) and value.format.bits < _ROUTER_BITS:
                seen.few_bits.append(row.name)
            continue
        if not is_finite(value):
            seen.nonfinite.append(row.name)
        elif row.name.endswith(_ROUTER) and (value == value[:, :1]).all():
            seen.zero_router.append(row.name)
        elif row.axes[0] == _EXPERT and row.matrix is not None and len(row.shape) > 1:
            zero = [expert for expert in range(len(value)) if _is_zero(value[expert])]
            if zero and not _starts_at_zero(row):
                seen.zero_experts[row.name] = zero
    return list(_weight_findings(seen))


def _starts_at_zero(row: Parameter) -> bool:
    """Return whether a row may be zero because training starts it there (factors of an adapter among them)."""
    return row.initializer.kind == "constant" or row.base is not None


def _weight_findings(seen: _Seen) -> Iterator[Finding]:
    if seen.nonfinite:
        yield Finding(
            "fault",
            "nonfinite_tensor",
            f"{len(seen.nonfinite)} of the parameters have NaN or infinity",
            _names(seen.nonfinite),
            "The model's outputs may be meaningless.",
            "Use an earlier checkpoint, or download the file again.",
        )
    if seen.zero_router:
        yield Finding(
            "fault",
            "constant_weights",
            f"{len(seen.zero_router)} of the routers score all experts alike",
            _names(seen.zero_router),
            "Every token goes to the same experts, with the same weights.",
            "Load or initialize the router; it may be missing from the file that the weights were converted from.",
        )
    if seen.few_bits:
        yield Finding(
            "warning",
            "router_precision",
            f"{len(seen.few_bits)} routers are in codes of less than {_ROUTER_BITS} bits",
            _names(seen.few_bits),
            "Rounded logits change which experts are chosen, and routers are a thousandth of the size.",
            "Quantize again and keep the routers: `moezoo convert --quantize ... --router 8` or float.",
        )
    if seen.zero_experts:
        first, experts = next(iter(seen.zero_experts.items()))
        yield Finding(
            "fault",
            "zero_expert",
            f"{sum(map(len, seen.zero_experts.values()))} matrices of experts are zero",
            f"{first}, experts {experts[:12]}"
            + (f" and {len(seen.zero_experts) - 1} more" if len(seen.zero_experts) > 1 else ""),
            "Such an expert adds nothing for the tokens that it gets.",
            "Check the conversion or the pruning that wrote the file.",
        )


def unused_findings(
    config: Config,
    weights: Mapping[str, Any],
    optimizer: State,
    earlier: Callable[[], Mapping[str, Any] | None],
    on_progress: Progress | None = None,
) -> list[Finding]:
    """Return a finding about trained parameters that never had a gradient.

    The moments of a parameter, or of one expert in it, are zero if and only if all its gradients were. Where an
    optimizer keeps no state, a parameter counts that has the value it had before: weight decay would have moved it.

    Args:
        config: of the run.
        weights: at its newest checkpoint.
        optimizer: state there, by `<kind>.<name>`.
        earlier: returns the weights at an earlier checkpoint; None: there is none, and those of the seed are compared.
        on_progress: called with the number of parameters read.
    """
    kinds = sorted({name.partition(".")[0] for name in optimizer})
    whole: list[str] = []
    experts: dict[str, list[int]] = {}
    rows = [row for row in trained_rows(config.model, config.training.only) if row.name in weights]
    for number, row in enumerate(rows):
        if on_progress is not None:
            on_progress("optimizer state", number, len(rows))
        moments = [optimizer[name] for kind in kinds if (name := f"{kind}.{row.name}") in optimizer]
        if not moments:
            if _is_unchanged(row, config, weights, earlier()):
                whole.append(row.name)
            continue
        if all(_is_zero(moment) for moment in moments):
            whole.append(row.name)
        elif row.axes[0] == _EXPERT and row.matrix is not None and all(len(m) == row.shape[0] for m in moments):
            idle = [e for e in range(row.shape[0]) if all(_is_zero(moment[e]) for moment in moments)]
            if idle:
                experts[row.name] = idle
    return list(_unused(whole, experts))


def _is_unchanged(
    row: Parameter, config: Config, weights: Mapping[str, Any], earlier: Mapping[str, Any] | None
) -> bool:
    if earlier is not None and row.name in earlier:
        return bool(np.array_equal(earlier[row.name], weights[row.name]))
    if config.init_from is not None:
        return False
    return bool(np.array_equal(initial_value(row, config.training.seed), weights[row.name]))


def _unused(whole: list[str], experts: dict[str, list[int]]) -> Iterator[Finding]:
    if whole:
        yield Finding(
            "fault",
            "unused_parameters",
            f"{len(whole)} trained parameters never had a gradient",
            _names(whole),
            "They are not connected to the loss, or something before them is zero.",
            "Remove the part from the config, freeze it (training.only), or find out what cuts it off.",
        )
    layers = {name.split(".moe.")[0]: idle for name, idle in experts.items()}
    for layer, idle in layers.items():
        yield Finding(
            "fault",
            "dead_expert",
            f"{len(idle)} experts never had a gradient",
            f"{layer.replace('layers.', 'layer ')}, experts {', '.join(map(str, idle[:12]))}",
            "No token ever went there: their parameters are as they were initialized.",
            "Raise the balance term's coefficient or the bias rate, or start the router again.",
        )


def _is_zero(array: NDArray[Any]) -> bool:
    return not array.flat[:_FIRST].any() and not array.any()


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"
