"""Findings from the losses of a run: values that are not finite, spikes, divergence, and terms out of scale."""

from collections.abc import Iterator

import numpy as np

from moezoo.core.config.run_config import Config
from moezoo.core.doctor.finding import Finding
from moezoo.core.doctor.history import Floats, History, recent
from moezoo.core.parameters.trained import router_trains, trained_names
from moezoo.core.spec import ExpertChoiceSpec, HashChoiceSpec, MoESpec

_BEFORE, _SPIKE_SHARE, _SPIKE_DEVIATIONS = 10, 0.25, 8.0  # records; of the loss; of the scatter before it
_SMOOTH, _RISE = 5, 0.2  # records of a median; share above the best one
_STRONG, _WEAK = 0.3, 1e-5  # of the cross-entropy
UNEVEN = 2.0  # worst load, of which 1 is balanced
_NORMAL = 1.4826  # standard deviations in a median absolute deviation


def curve_findings(history: History) -> Iterator[Finding]:
    """Yield findings about the curves of loss and gradient norm."""
    yield from _nonfinite(history)
    loss = history.terms["cross_entropy"]
    finite = np.isfinite(loss)
    loss, step = loss[finite], history.step_R[finite]
    spikes = [(float(loss[at]), at, _median(loss[max(0, at - _BEFORE) : at])) for at in _spikes(loss)]
    if spikes:
        value, at, before = max(spikes)
        yield Finding(
            "warning",
            "loss_spike",
            f"the cross-entropy jumped {len(spikes)} times, most to {value:.3g} from about {before:.3g}",
            f"step {step[at]}",
            "A spike loses progress, and often comes before divergence or a dead expert.",
            "Lower the learning rate, lengthen the warm-up, or clip gradients (optimizer.clip_norm).",
        )
    medians = [_median(loss[first : first + _SMOOTH]) for first in range(len(loss) - _SMOOTH + 1)]
    if len(loss) >= 2 * _SMOOTH and medians[-1] > (1 + _RISE) * min(medians):
        best = int(np.argmin(medians))
        yield Finding(
            "fault",
            "divergence",
            f"the cross-entropy ends at {medians[-1]:.3g}, above its best of {min(medians):.3g}",
            f"from step {step[best]} on",
            "The run got worse and did not recover.",
            "Resume from a checkpoint before that step with a lower learning rate.",
        )


def _nonfinite(history: History) -> Iterator[Finding]:
    loads = {f"load of layer {index}": layer.load_RE.sum(axis=1) for index, layer in history.layers.items()}
    for name, values in {**history.terms, **loads}.items():
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            yield Finding(
                "fault",
                "nonfinite_metric",
                f"{name:.80} is not finite in {len(wrong)} records",
                f"first at step {history.step_R[wrong[0]]}",
                "A NaN or infinity in the loss or its gradient spoils every parameter that the update reaches.",
                "Resume from a checkpoint before that step with a lower learning rate.",
            )
            return


def _spikes(loss: Floats) -> list[int]:
    found = []
    for at in range(_BEFORE // 2, len(loss)):
        before = loss[max(0, at - _BEFORE) : at]
        middle = _median(before)
        scatter = _NORMAL * _median(np.abs(before - middle))
        if loss[at] > middle + max(_SPIKE_SHARE * middle, _SPIKE_DEVIATIONS * scatter):
            found.append(at)
    return found


def _median(values: Floats) -> float:
    return float(np.median(values))


def balance_findings(config: Config, history: History) -> Iterator[Finding]:
    """Yield findings about terms that balance the load: absent, switched off, or far from the loss's scale."""
    trains = router_trains(config.model, trained_names(config.model, config.training.only))
    for index, moe in config.model.moes:
        off = [loss.kind for loss in moe.losses if loss.coefficient == 0]
        if off:
            yield Finding(
                "warning",
                "balance_off",
                f"{', '.join(off)} has the coefficient 0",
                f"layer {index}",
                "The term is computed and has no effect.",
                "Set its coefficient (0.01 is common for switch_balance), or remove it.",
            )
        if trains and index in history.layers and not is_balanced_by_design(moe):
            worst = float(history.layers[index].recent_E.max() * moe.num_choices)
            if worst > UNEVEN and not _balancing(moe):
                yield Finding(
                    "warning",
                    "no_balance",
                    f"nothing balances the load, and the busiest expert has {worst:.1f} times its share",
                    f"layer {index}",
                    "Experts that start ahead get more training and stay ahead.",
                    "Add a loss (switch_balance), or a router.selection_bias with a rate.",
                )
    yield from _scale_findings(config, history)


def _scale_findings(config: Config, history: History) -> Iterator[Finding]:
    kinds = {loss.kind: loss.coefficient for _, moe in config.model.moes for loss in moe.losses}
    window = recent(len(history))
    for kind, coefficient in kinds.items():
        weighted, loss = history.terms.get(f"{kind}_weighted"), history.terms["cross_entropy"]
        if weighted is None or not len(history) or coefficient == 0:
            continue
        share = float(np.nanmedian(np.abs(weighted[-window:]) / np.maximum(loss[-window:], 1e-9)))
        if share > _STRONG:
            yield Finding(
                "warning",
                "balance_scale",
                f"{kind} contributes {share:.0%} as much to the objective as the cross-entropy",
                f"coefficient {coefficient:g}",
                "The routers are trained to please the auxiliary term rather than to predict.",
                f"Lower its coefficient, by a factor of about {max(2, round(share / 0.02))}.",
            )
        elif share < _WEAK and _is_uneven(config, history, kind):
            yield Finding(
                "warning",
                "balance_scale",
                f"{kind} contributes {share:.1e} of the cross-entropy, and the load is uneven",
                f"coefficient {coefficient:g}",
                "The term is too small to act.",
                "Raise its coefficient (0.01 is common for switch_balance, 0.001 for router_z).",
            )


def _is_uneven(config: Config, history: History, kind: str) -> bool:
    """Return whether the load of a layer that lists a balance term is uneven, and nothing else balances it."""
    return any(
        history.layers[index].recent_E.max() * moe.num_choices > UNEVEN
        for index, moe in config.model.moes
        if kind != "router_z" and index in history.layers
        if [loss.kind for loss in moe.losses if loss.kind not in ("router_z", kind)] == []
        if moe.router.selection_bias is None or moe.router.selection_bias.rate == 0
    )


def is_balanced_by_design(moe: MoESpec) -> bool:
    """Return whether the choice itself fixes the load, or every expert gets every token."""
    fixed = isinstance(moe.router.choice, ExpertChoiceSpec | HashChoiceSpec)
    return fixed or moe.router.top_k >= moe.num_choices


def _balancing(moe: MoESpec) -> bool:
    bias = moe.router.selection_bias
    return any(loss.kind != "router_z" for loss in moe.losses) or (bias is not None and bias.rate > 0)
