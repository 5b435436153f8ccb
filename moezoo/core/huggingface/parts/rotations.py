"""Rotations in a config.json, in the spelling of transformers 5 and of 4."""

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
    """The rotation: `rope_parameters` (transformers 5; by `layer_type` where it has such), or `rope_theta` (or what
    `theta` names), `rope_scaling` and `partial_rotary_factor` (transformers 4). `base` and `fraction` where neither
    says; a family without `fraction` rotates whole heads and knows no other. `harmless`: fields of the former that
    change nothing."""
    base = fields.number(theta, base)
    part = _fraction(fields, fraction)
    where = "rope_parameters" if "rope_parameters" in fields else "rope_scaling"
    inner = fields.inside(where)
    if inner is not None and layer_type is not None and layer_type in inner:
        inner = inner.inside(layer_type)
    if inner is None:
        return RoPESpec(base=base, fraction=part, layout=layout)
    base, part = inner.number("rope_theta", base), _fraction(inner, None if fraction is None else part)
    proportional = part < 1 and inner.get("rope_type") == "proportional"
    of: Literal["features", "pairs"] = "pairs" if proportional else "features"
    scaling = _scaling(fields, inner, harmless)
    return RoPESpec(base=base, fraction=part, fraction_of=of, layout=layout, scaling=scaling)


def _fraction(fields: Fields, default: float | None) -> float:
    """The share of a head that is rotated."""
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
    old = "type" in inner  # transformers 4 called it so
    kind = inner.choice("rope_type" if "rope_type" in inner or not old else "type", makers, "default")
    scaling: RoPEScalingSpec | None = kind(fields, inner)
    inner.finish(("type", "rope_type", "max_position_embeddings", "original_max_position_embeddings", *harmless))
    return scaling


def _linear(inner: Fields) -> LinearScalingSpec:
    return LinearScalingSpec(factor=inner.number("factor"))


def _dynamic(fields: Fields, inner: Fields) -> DynamicScalingSpec:
    original = fields.count("max_position_embeddings")
    return DynamicScalingSpec(factor=inner.number("factor"), original_length=original, length=_length(fields, original))


def _length(fields: Fields, original: int) -> int:
    """Of texts that the rotation is made for.

    Transformers goes by the text at hand, and so turns a growing text's earlier tokens otherwise than its later ones;
    here it is a number of the spec.
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
    stretched = fields.count("max_position_embeddings", original) / original
    # Trap: 0 and null both mean "not given" to transformers.
    return YaRNScalingSpec(
        factor=inner.number("factor", stretched),
        original_length=original,
        beta_fast=inner.get("beta_fast") or 32.0,
        beta_slow=inner.get("beta_slow") or 1.0,
        attention_factor=inner.get("attention_factor"),
        mscale=inner.get("mscale") or None,
        mscale_all_dim=inner.get("mscale_all_dim") or None,
        truncate=inner.flag("truncate", True),
    )


def _longrope(fields: Fields, inner: Fields) -> LongRoPEScalingSpec:
    # Trap: the attention factor is that of the longest text, whatever the text at hand.
    original = _original_length(fields, inner)
    length = _length(fields, original)
    stretched = inner.number("factor", fields.count("max_position_embeddings", original) / original)
    attention_factor = math.sqrt(1 + math.log(stretched) / math.log(original)) if stretched > 1 else 1.0
    if "long_mscale" in inner:  # of texts beyond; phimoe gives the factors themselves
        short, long = inner.number("short_mscale"), inner.number("long_mscale")
        attention_factor = short if length == original else long
    if fields.count("max_position_embeddings") > length:
        fields.notes.append(
            f"texts of more than {length} tokens are refused; load with a larger max_length to read them by long_factor"
        )
    return LongRoPEScalingSpec(
        short_factors=tuple(inner.get("short_factor", ())),
        long_factors=tuple(inner.get("long_factor", ())),
        original_length=original,
        length=length,
        attention_factor=inner.number("attention_factor", attention_factor),
    )
