"""The differences of two model specs: those that forbid a comparison, and those to report."""

import re
from typing import Any

from moezoo.core.config.differences import differing_fields, merged_over_layers, value_text
from moezoo.core.errors import SpecError
from moezoo.core.spec import ModelSpec

# Fields without an effect on the forward pass of given weights at inference.
_WITHOUT_EFFECT = {"initializer", "precision", "adapter", "losses", "dropout", "jitter", "dispatch", "rate"}


def check_comparable(a: ModelSpec, b: ModelSpec) -> None:
    """Check that one model can use the routing of the other, and that both predict the same tokens.

    Raises SpecError: another vocabulary, other MoE layers, or another number of experts, or of experts per token.
    """
    if a.vocab != b.vocab:
        raise SpecError(
            f"the models have different vocabularies; got vocab_size {a.vocab} and {b.vocab}; expected the same. "
            "Compare models of the same tokens."
        )
    if a.moe_layers != b.moe_layers:
        raise SpecError(
            f"the models have different MoE layers; got {_shown(a.moe_layers)} and {_shown(b.moe_layers)}; expected "
            "the same. Compare models of the same depth."
        )
    for (layer, moe_a), (_, moe_b) in zip(a.moes, b.moes, strict=True):
        for what, one, other in (
            ("experts", moe_a.num_choices, moe_b.num_choices),
            ("experts per token", moe_a.num_slots, moe_b.num_slots),
        ):
            if one != other:
                raise SpecError(
                    f"the models have different numbers of {what}; got {one} and {other} in layer {layer}; expected "
                    "the same. Compare models whose routing can be exchanged."
                )


def spec_differences(a: ModelSpec, b: ModelSpec) -> tuple[str, ...]:
    """Return a line for each field that differs and has an effect at inference, precision and adapter aside."""
    found = merged_over_layers(list(differing_fields([_dump(a), _dump(b)])))
    return tuple(
        f"{path}: {value_text(one)} and {value_text(other)}"
        for path, (one, other) in found
        if not _WITHOUT_EFFECT & set(re.split(r"[.\[]", path))
    )


def _dump(spec: ModelSpec) -> dict[str, Any]:
    """Return a spec as data, with every layer on its own."""
    layers = [layer.model_dump(mode="json", exclude={"repeat"}) for layer in spec.all_layers]
    return {**spec.model_dump(mode="json"), "layers": layers}


def _shown(layers: tuple[int, ...]) -> str:
    numbers = ", ".join(map(str, layers[:8])) + (", ..." if len(layers) > 8 else "")
    return f"{len(layers)} ({numbers})" if layers else "none"
