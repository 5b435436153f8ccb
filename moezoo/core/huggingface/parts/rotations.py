"""Parsing of RoPE fields, in the format of transformers 5 and of transformers 4."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from moezoo.core.huggingface.fields import Fields
from moezoo.core.spec import (
    DynamicScalingSpec,
    LinearScalingSpec,
    Llama3ScalingSpec,
    LongRoPEScalingSpec,
    RoPEScalingSpec,
    RoPESpec,
    YaRNScalingSpec,
)


def rope(
    fields: Fields,
    *,
    base: float = 10_000.0,
    fraction: float | None = None,
    layout: Literal["half_split", "interleaved"] = "half_split",
    layer_type: str | None = None,
    theta: str = "rope_theta",
    harmless: Sequence[str] = (),
) -> RoPESpec:
    """Return RoPE from `rope_parameters` (transformers 5) or from the fields of transformers 4.

    `rope_parameters` may have an object per `layer_type`. The fields of transformers 4 are `rope_theta` (or the field
    named by `theta`), `rope_scaling` and `partial_rotary_factor`; both formats in one file must agree. `base` and
    `fraction` are defaults; a family without `fraction` only supports full rotary. `harmless`: fields of
    `rope_parameters` or `rope_scaling` without effect.
    """
    base = fields.number(theta, base)
    part = _fraction(fields, fraction)
    inner, older = fields.inside("rope_parameters"), fields.inside("rope_scaling")
    if inner is None:
        inner, older = older, None
    per_type = False
    if inner is not None and layer_type is not None and layer_type in inner:
        inner, per_type = inner.inside(layer_type), True
    if inner is None:
        return RoPESpec(base=base, fraction=part, layout=layout)
    if not per_type or theta != "rope_theta":  # otherwise rope_theta is that of another layer type
        fields.agree(theta, inner.get("rope_theta", base), {"rope_parameters": None, "rope_scaling": None})
    if not per_type:
        fields.agree("partial_rotary_factor", inner.get("partial_rotary_factor", part), {"rope_parameters": None})
    base, part = inner.number("rope_theta", base), _fraction(inner, None if fraction is None else part)
    proportional = part < 1 and inner.get("rope_type") == "proportional"
    of: Literal["features", "pairs"] = "pairs" if proportional else "features"
    scaling = _scaling(fields, inner, harmless)
    if older is not None:
        same = (older.number("rope_theta", base), _fraction(older, part)) == (base, part)
        if not same or _scaling(fields, older, harmless) != scaling:
            raise fields.refuse("rope_scaling", "the same as in rope_parameters")
    return RoPESpec(base=base, fraction=part, fraction_of=of, layout=layout, scaling=scaling)


def _fraction(fields: Fields, default: float | None) -> float:
    """Return the share of a head that is rotated (partial rotary)."""
    if default is None:
        fields.expect("partial_rotary_factor", 1.0)
        return 1.0
    return fields.number("partial_rotary_factor", default)


def _scaling(fields: Fields, inner: Fields, harmless: Sequence[str]) -> RoPEScalingSpec | None:
    makers: Mapping[str, Callable[[Fields, Fields], RoPEScalingSpec | None]] = {
        "default": lambda outer, inside: None,
        "proportional": lambda outer, inside: _linear(inside) if "factor" in inside else None,
        "linear": lambda outer, inside: _linear(inside),
        "dynamic": _dynamic,
        "llama3": _llama3,
        "yarn": _yarn,
        "longrope": _longrope,
    }
    kind = inner.choice(inner.either("rope_type", "type"), makers, "default")  # `type` is the name in transformers 4
    scaling: RoPEScalingSpec | None = kind(fields, inner)
    inner.finish(("type", "rope_type", "max_position_embeddings", "original_max_position_embeddings", *harmless))
    return scaling


def _linear(inner: Fields) -> LinearScalingSpec:
    return LinearScalingSpec(factor=inner.number("factor"))


def _dynamic(fields: Fields, inner: Fields) -> DynamicScalingSpec:
    original = fields.count("max_position_embeddings")
    return DynamicScalingSpec(factor=inner.number("factor"), original_length=original, length=_length(fields, original))


def _length(fields: Fields, original: int) -> int:
    """Return the sequence length that the RoPE scaling is computed for.

    Transformers uses the current sequence length, so in a growing sequence earlier tokens are rotated differently from
    later ones; here it is a constant of the spec.
    """
    return max(original, fields.max_length or 0)


def _original_length(fields: Fields, inner: Fields) -> int:
    longest = fields.get("original_max_position_embeddings", fields.get("max_position_embeddings"))
    return inner.count("original_max_position_embeddings", longest)


def _llama3(fields: Fields, inner: Fields) -> Llama3ScalingSpec:
    return Llama3ScalingSpec(
        factor=inner.number("factor"),
        original_length=_original_length(fields, inner),
        low_frequency_factor=inner.number("low_freq_factor"),
        high_frequency_factor=inner.number("high_freq_factor"),
    )


def _yarn(fields: Fields, inner: Fields) -> YaRNScalingSpec:
    original = _original_length(fields, inner)
    ratio = fields.count("max_position_embeddings", original) / original
    # Trap: transformers treats both 0 and null as absent.
    return YaRNScalingSpec(
        factor=inner.number("factor", ratio),
        original_length=original,
        beta_fast=inner.get("beta_fast") or 32.0,
        beta_slow=inner.get("beta_slow") or 1.0,
        attention_factor=inner.get("attention_factor"),
        mscale=inner.get("mscale") or None,
        mscale_all_dim=inner.get("mscale_all_dim") or None,
        truncate=inner.flag("truncate", True),
    )


def _longrope(fields: Fields, inner: Fields) -> LongRoPEScalingSpec:
    # Trap: the attention factor is that of the maximum length, regardless of the current length.
    original = _original_length(fields, inner)
    length = _length(fields, original)
    factor = inner.number("factor", fields.count("max_position_embeddings", original) / original)
    attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    if "long_mscale" in inner:  # phimoe specifies the attention factors directly
        short, long = inner.number("short_mscale"), inner.number("long_mscale")
        attention_factor = short if length == original else long
    if fields.count("max_position_embeddings") > length:
        fields.notes.append(
            f"sequences of more than {length} tokens are rejected; load with a larger max_length to use long_factor"
        )
    return LongRoPEScalingSpec(
        short_factors=tuple(inner.get("short_factor", ())),
        long_factors=tuple(inner.get("long_factor", ())),
        original_length=original,
        length=length,
        attention_factor=inner.number("attention_factor", attention_factor),
    )
