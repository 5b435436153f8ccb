"""Spellings of config.json that mlx-lm reads, beside those of transformers 5."""

from typing import Any

from moezoo.core.huggingface.family import Family
from moezoo.core.huggingface.fields import INNER, Fields
from moezoo.core.huggingface.parts import older_spellings
from moezoo.core.spec import ModelSpec

QUANTIZATION = ("quantization", "quantization_config")
"""Fields that declare a quantization: mlx-lm's, and its copy."""


def mlx_lm_has(family: Family, fields: Fields) -> bool:
    """Return True if mlx-lm has the model as config.json names it, so that it shall open what is written."""
    own = family.mlx_lm
    return bool(family.mlx) and fields.model_type not in own.without and not lacks_wrapper(family, fields)


def lacks_wrapper(family: Family, fields: Fields) -> bool:
    """Return True if mlx-lm has the text model alone, but neither the wrapper nor the text model's type in it."""
    return not {fields.model_type, fields.raw.get("model_type")}.isdisjoint(family.mlx_lm.lacks)


def with_mlx_spellings(family: Family, fields: Fields, spec: ModelSpec) -> dict[str, Any]:
    """Return a config.json with the fields that mlx-lm reads added, to its `text_config` in a wrapper.

    No field is removed, none changed but those that mean something else to mlx-lm, and transformers reads the same
    model from it. If mlx-lm does not have the family, nothing is added.
    """
    if not mlx_lm_has(family, fields):
        return dict(fields.raw)
    inner = fields.raw.get("text_config")
    text = inner if isinstance(inner, dict) else fields.raw
    required = {} if family.mlx_lm.config is None else family.mlx_lm.config(spec)
    added = text | older_spellings(text)
    added |= {key: value for key, value in required.items() if key not in added or key in family.mlx_lm.replaces}
    if text is fields.raw:
        return added
    return fields.raw | {"text_config": added} | ({} if "vocab_size" in fields.raw else {"vocab_size": spec.vocab})


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json, and those in it that lead to its `text_config`, without a quantization."""
    kept = {key: value for key, value in config.items() if key not in QUANTIZATION}
    for name in INNER:
        if isinstance(kept.get(name), dict):
            kept[name] = without_quantization(kept[name])
    return kept
