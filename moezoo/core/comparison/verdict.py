"""The verdict of a comparison in words: routing or arithmetic, in which layer it starts, and in which part."""

import math
from dataclasses import dataclass
from typing import Literal

from moezoo.core.comparison.intermediates import PartDifference
from moezoo.core.comparison.report import ComparisonReport

Kind = Literal["equal", "not finite", "rounding", "routing", "arithmetic", "both"]
_MOSTLY = 2 / 3  # share of the KL divergence from which one of the two is the verdict


@dataclass(frozen=True)
class Verdict:
    """The verdict of a comparison.

    Fields:
        kind: the reason of the difference. `rounding`: the same weights, and no difference above that of the backends'
            or dtypes' rounding. `not finite`: a logit is NaN or infinite.
        layer: where it starts; None outside of the layers, or if nothing differs. Where the share of routing is the
            reason for `routing`, that is the first router that prefers other experts.
        part: the part of the model that differs first (`intermediates.PARTS`); None if nothing differs.
        headline: the verdict in a line.
        reasons: what it is based on, a sentence each.
    """

    kind: Kind
    layer: int | None
    part: str | None
    headline: str
    reasons: tuple[str, ...]


def verdict(report: ComparisonReport) -> Verdict:
    """Return the verdict of a report.

    If no parameter that differs is of a router the reason is arithmetic: changes of routing then only follow. If all
    are, it is routing, unless most of the KL divergence stays with A's experts, or no other expert is chosen: then
    it is their combine weights. Else the share of the KL divergence decides that goes away with A's experts.
    """
    cause = _cause(report)
    kind = cause or _kind_by_share(report)
    layer, part = _start(report) if kind != "not finite" else _not_finite_start(report)
    if kind == "routing" and cause is None and report.first_routing is not None:
        layer, part = report.first_routing.layer, "router"
    about = (_weights, _codes, _start_sentence, _routing, _split, _not_finite)
    reasons = tuple(filter(None, (sentence(report) for sentence in about)))
    headline = _headline(report, kind, layer, part) if cause else _headline_by_share(report, kind, layer, part)
    return Verdict(kind, layer, part, headline, reasons)


def _cause(report: ComparisonReport) -> Kind | None:
    """Return the kind that follows from what the models are; None if the share of routing has to decide."""
    if report.equal:
        return "equal"
    if report.not_finite:
        return "not finite"
    names = report.weights.names
    if report.specs:
        return None
    if not names:
        return "rounding" if report.first_part is None and report.first_routing is None else None
    if _routers_alone(report):
        undivided = report.routing_share is None and report.changed  # other experts, whose outputs are all zero
        return "routing" if undivided or _kind_by_share(report) != "arithmetic" else None
    return None if any(_of_router(name) for name in names) else "arithmetic"


def _of_router(name: str) -> bool:
    return ".moe.router." in name


def _routers_alone(report: ComparisonReport) -> bool:
    """Return whether the models differ, and by parameters of routers only."""
    return not report.specs and bool(report.weights.names) and all(map(_of_router, report.weights.names))


def _kind_by_share(report: ComparisonReport) -> Kind:
    share = report.routing_share or 0.0
    return "routing" if share >= _MOSTLY else "arithmetic" if share <= 1 - _MOSTLY else "both"


def _start(report: ComparisonReport) -> tuple[int | None, str | None]:
    """Return layer and part of the first difference: of an intermediate, or of a choice between equal logits."""
    part, routing = report.first_part, report.first_routing
    if routing is not None:
        names = [each.name for each in report.parts]
        logits = f"layers.{routing.layer}.moe.router.logits"
        if part is None or names.index(part.name) > names.index(logits):
            return routing.layer, "router"
    return (None, None) if part is None else (part.layer, part.part)


def _not_finite_start(report: ComparisonReport) -> tuple[int | None, str | None]:
    """Return layer and part of the first value that is not finite."""
    first = _first_not_finite(report)
    return (None, None) if first is None else (first.layer, first.part)


def _first_not_finite(report: ComparisonReport) -> PartDifference | None:
    return next((part for part in report.parts if part.not_finite), None)


def _headline(report: ComparisonReport, kind: Kind, layer: int | None, part: str | None) -> str:
    if kind == "equal":
        return f"equal: the same logits and experts for all {report.tokens:,} tokens"
    if kind == "rounding":
        return "rounding: the same weights, and no difference above the rounding of backend and precision"
    if kind == "not finite":
        first = _first_not_finite(report)
        models = "" if first is None else {"A": " in A", "B": " in B"}.get(first.not_finite, " in A and B")
        return f"not finite: NaN or infinity{models}{_where(layer, part)}"
    return f"{kind}{_where(layer, part)}"


def _headline_by_share(report: ComparisonReport, kind: Kind, layer: int | None, part: str | None) -> str:
    share, where = report.routing_share or 0.0, _where(layer, part)
    if kind == "both":
        return f"both: {_percent(share)} routing, {_percent(1 - share)} arithmetic{where}"
    if kind == "arithmetic" and _routers_alone(report):
        if not report.changed:
            return f"arithmetic: the router's combine weights, no other experts{where}"
        return f"mostly arithmetic: {_percent(1 - share)} by the routers' combine weights{where}"
    return f"mostly {kind}: {_percent(share if kind == 'routing' else 1 - share)} of the KL divergence{where}"


def _where(layer: int | None, part: str | None) -> str:
    return "" if part is None else f", starting in the {part}" + ("" if layer is None else f" of layer {layer}")


def _weights(report: ComparisonReport) -> str:
    weights, count = report.weights, len(report.weights.names)
    if not count:
        return "" if report.equal else "All weights are the same."
    everything = weights.equal + count
    if count <= 3:
        shown = ", ".join(weights.names)
        return f"{count} of {everything} parameters {'differ' if count > 1 else 'differs'}: {shown}."
    most = max(weights.differing, key=lambda pair: pair[1], default=None)
    furthest = "" if most is None else f", most {most[0]} by {_percent(most[1])}"
    alone = len(weights.only_a) + len(weights.only_b)
    return f"{count} of {everything} parameters differ{furthest}." + (
        f" {alone} are in one model only." if alone else ""
    )


def _codes(report: ComparisonReport) -> str:
    codes = {"A": report.weights.codes_a, "B": report.weights.codes_b}
    used = [f"{name} has {count} parameters in codes" for name, count in codes.items() if count]
    return f"{' and '.join(used)}." if used and not report.weights.same_codes else ""


def _start_sentence(report: ComparisonReport) -> str:
    part = report.first_part if not report.not_finite else _first_not_finite(report)
    if part is None:
        return ""
    if part.not_finite:
        return f"{part.name} is the first that is not finite."
    if not report.routing:
        return f"{part.name} is the first to differ, by {_percent(part.relative)}."
    return f"With A's experts in both, {part.name} is the first to differ, by {_percent(part.relative)}."


def _routing(report: ComparisonReport) -> str:
    layer = report.first_routing or next((layer for layer in report.routing if layer.own), None)
    if layer is None or report.not_finite:  # the order of values that are NaN says nothing
        return ""
    sentence = f"Routers start to differ in layer {layer.layer}, for {_percent(layer.own)} of the tokens"
    median = layer.margin.median
    if not math.isfinite(median):
        return f"{sentence}."
    ties = "near ties" if layer.near_ties else "not near ties"
    rounded = "" if report.first_routing else ", which rounding turns"
    return (
        f"{sentence}: {ties}{rounded}; their median margin is {median:.2g}, that of all tokens "
        f"{layer.all_margin.median:.2g}."
    )


def _split(report: ComparisonReport) -> str:
    if not report.changed or report.routing_share is None or not report.tokens:
        return ""
    total, arithmetic = report.total.kl.mean, report.arithmetic.kl.mean
    if report.routing_kl < 0:
        return (
            f"With A's experts B is further from A ({arithmetic:.3g} nats, {total:.3g} with its own): its own choice "
            "makes up for a part of its arithmetic."
        )
    return (
        f"With A's experts in B, {_percent(report.routing_share)} of the KL divergence goes away ({total:.3g} nats "
        f"become {arithmetic:.3g})."
    )


def _not_finite(report: ComparisonReport) -> str:
    if not report.not_finite:
        return ""
    everything = report.tokens + report.not_finite
    return f"{report.not_finite:,} of {everything:,} tokens are left out: their logits are NaN or infinite."


def _percent(share: float) -> str:
    """Format with two significant digits, and without a decimal from 10 % on."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"
