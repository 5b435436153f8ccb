"""Findings from a forward pass: what the routers do with real tokens, which tensors alone do not show."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moezoo.core.backend import Model
from moezoo.core.doctor.finding import Finding
from moezoo.core.spec import ModelSpec

RANDOM = "random tokens"

_EQUAL = 1e-6  # combine weights that differ less are one constant
_EXPECTED = 100  # assignments of an equal share, below which an expert may be idle by chance


def forward_findings(spec: ModelSpec, model: Model, tokens: NDArray[np.int32], data: str) -> Iterator[Finding]:
    """Yield findings about logits and routing of tokens [B, T]; `data` names them.

    Experts without tokens count unless the tokens are RANDOM."""
    output = model.forward(tokens)
    if not np.isfinite(output.logits).all():
        yield Finding(
            "fault",
            "nonfinite_logits",
            f"{np.mean(~np.isfinite(output.logits)):.1%} of the logits are NaN or infinite",
            data,
            "The model predicts nothing for these tokens.",
            "Look for tensors that are not finite, or compute in float32.",
        )
    for (index, moe), routing in zip(spec.moes, output.routing, strict=True):
        expert, weight = (np.asarray(part).reshape(-1, part.shape[-1]) for part in (routing.expert, routing.weight))
        used = expert >= 0
        if not used.any() or not np.isfinite(weight[used]).all():  # found above, or nothing to say
            continue
        spread = float(np.ptp(weight[used]))
        if spread < _EQUAL and len(expert) > 1 and moe.num_choices > 1:
            yield Finding(
                "fault",
                "constant_weights",
                f"all {used.sum()} combine weights are {float(weight[used].mean()):.3g}",
                f"layer {index}; {data}",
                "The weights do not depend on the token, so the router has no gradient from the loss.",
                "Look for a router that is zero or saturated, or a renormalization of a single expert.",
            )
        counts = np.bincount(expert[used], minlength=moe.num_choices)
        idle = np.flatnonzero(counts == 0)
        if len(idle) and used.sum() >= _EXPECTED * moe.num_choices and data != RANDOM:
            yield Finding(
                "warning",
                "idle_expert",
                f"{len(idle)} of {moe.num_choices} experts get none of {len(expert)} tokens",
                f"layer {index}, experts {', '.join(map(str, idle[:12].tolist()))}; {data}",
                "They add memory and no quality on such text.",
                "Measure on more of your text; `moezoo analyze` says which tokens each expert gets.",
            )
