"""RoPE as the fields of `rope_parameters`: the inverse of `parts.rope`."""

from typing import Any, assert_never

from moezoo.core.spec import (
    DynamicScalingSpec,
    LinearScalingSpec,
    Llama3ScalingSpec,
    LongRoPEScalingSpec,
    RoPEScalingSpec,
    RoPESpec,
    YaRNScalingSpec,
)


def rope_fields(position: RoPESpec) -> dict[str, Any]:
    """Return `rope_parameters` of a config.json in the spelling of transformers 5; how features pair is not in it."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": position.base}
    if position.scaling is not None:
        found |= _scaling(position.scaling)
    if position.fraction_of == "pairs":
        found["rope_type"] = "proportional"
    if position.fraction != 1:
        found["partial_rotary_factor"] = position.fraction
    return {name: value for name, value in found.items() if value is not None}


def _scaling(scaling: RoPEScalingSpec) -> dict[str, Any]:
    match scaling:
        case LinearScalingSpec(factor=factor):
            return {"rope_type": "linear", "factor": factor}
        case DynamicScalingSpec(factor=factor):
            return {"rope_type": "dynamic", "factor": factor}
        case Llama3ScalingSpec():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
            }
        case YaRNScalingSpec():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": scaling.attention_factor,
                "mscale": scaling.mscale,
                "mscale_all_dim": scaling.mscale_all_dim,
                "truncate": scaling.truncate,
            }
        case LongRoPEScalingSpec():
            return {
                "rope_type": "longrope",
                "short_factor": list(scaling.short_factors),
                "long_factor": list(scaling.long_factors),
                "original_max_position_embeddings": scaling.original_length,
                "attention_factor": scaling.attention_factor,
            }
        case _:
            assert_never(scaling)


def positions_of(layers: Any) -> list[RoPESpec]:
    """Return the different rotations of a model's layers."""
    found = [getattr(layer.attention, "position", None) for layer in layers]
    return list(dict.fromkeys(position for position in found if isinstance(position, RoPESpec)))
