"""What a family's file says: config.json -> ModelSpec, and where the tensors go."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from moezoo.core.errors import SpecError, nearest
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.tensors import Fused
from moezoo.core.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """One family of published checkpoints.

    Fields:
        model_types: what its config.json may say of itself; the first is the family's name.
        spec: the model that a config describes.
        tensors: the name table; the embedding first. Of rules for the same parameter, those count whose names are in
            the files; an export without a given layout takes the first.
        kept: patterns of tensors that the spec has no place for, kept verbatim (buffers, vision towers).
        later_layers_kept: layers beyond the model's own, kept verbatim (multi-token prediction).
        harmless: fields of config.json, beyond those of every family, that change no number.
        config: the way back: fields of a config.json for a model that was designed here, None where the family has no
            such model. Sizes that every family names alike are added; what `spec` reads from it must be the model.
    """

    model_types: tuple[str, ...]
    spec: Callable[[Fields], ModelSpec]
    tensors: tuple[Fused, ...]
    kept: tuple[str, ...] = ()
    later_layers_kept: bool = False
    harmless: tuple[str, ...] = ()
    config: Callable[[ModelSpec], dict[str, Any] | None] | None = None

    @property
    def name(self) -> str:
        """The family's name."""
        return self.model_types[0]

    def spec_of(self, fields: Fields) -> ModelSpec:
        """The model of a config, every field of it understood. Raises SpecError."""
        from pydantic import ValidationError

        try:
            spec = self.spec(fields)
        except ValidationError as error:
            problems = "; ".join(_problem(dict(problem)) for problem in error.errors())
            raise SpecError(f"{fields.where} describes a model that cannot be: {problems}.") from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # A list where a number belongs, or the like, in a field that nobody thought of checking.
            raise SpecError(
                f"{fields.where} has a field that cannot be ({type(error).__name__}: {error!s:.100}); the last one "
                f"read is {fields.last}. Use the config.json of these files."
            ) from error
        fields.expect("use_bidirectional_attention", False, "vision")  # the latter: between the tokens of an image
        fields.finish(("quantization_config", *self.harmless))
        return spec


def _problem(error: dict[str, Any]) -> str:
    context = error.get("ctx", {})
    if error["type"] == "impossible":
        return f"{context['path']} {context['problem']}".strip()
    return f"{'.'.join(str(part) for part in error['loc'])}: {error['msg'].lower()}, got {error['input']!r:.80}"


@cache
def families() -> dict[str, Family]:
    """Every family by each of its model types."""
    from moezoo.core.huggingface import families as package

    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(package.__path__):
        family: Family = importlib.import_module(f"{package.__name__}.{module.name}").FAMILY
        for model_type in family.model_types:
            assert model_type not in found, model_type
            found[model_type] = family
    return found


def family_of(fields: Fields) -> Family:
    """The family of a config.json. Raises SpecError where it is none of ours."""
    known = families()
    name = fields.model_type
    if name not in known:
        raise SpecError(
            f"model_type is {name!r}{nearest(name, known)}; expected a family that moezoo knows: "
            f"{', '.join(sorted(known))} ({fields.where})."
        )
    return known[name]
