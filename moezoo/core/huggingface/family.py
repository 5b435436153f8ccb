"""Model families: how to parse config.json into a ModelSpec, and the tensor mapping."""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy.typing as npt

from moezoo.core.errors import SpecError, nearest
from moezoo.core.huggingface.fields import Fields
from moezoo.core.huggingface.nearest import nearest_family
from moezoo.core.huggingface.tensors import Fused
from moezoo.core.spec import ModelSpec

Array = npt.NDArray[Any]

ADDING = "writings/adding_a_part.md says how to add a family."


@dataclass(frozen=True)
class MlxLM:
    """Facts about mlx-lm's implementation of a family, for folders that it shall open.

    Fields:
        floats: patterns of modules that it cannot quantize: their matrix is a plain array there.
        eight_bits: patterns of modules, besides routers, that it quantizes with 8 bits unless asked for others.
        config: returns fields of config.json that it requires, beyond `parts.older_spellings`.
        replaces: those of them that replace a value that is there, which says something else to it.
        without: model types of the family that it does not have.
        wrapper: model type of the multimodal wrapper without which it does not have the model.
        lacks: model types of wrappers, and of text models in them, that it does not have: it has the text model alone,
            by the family's name.
        zero_centred: its norms are zero-centred too; otherwise their scales are one more there.
        refuses: returns why it cannot compute a model of the family, or None if it can.
        drops: a part of the spec, by its field's name, that it drops with the tensors whose names have this ending.
    """

    floats: tuple[str, ...] = ()
    eight_bits: tuple[str, ...] = ()
    config: Callable[[ModelSpec], dict[str, Any]] | None = None
    replaces: tuple[str, ...] = ()
    wrapper: str | None = None
    lacks: tuple[str, ...] = ()
    zero_centred: bool = False
    without: tuple[str, ...] = ()
    refuses: Callable[[ModelSpec], str | None] = lambda spec: None
    drops: tuple[str, str] | None = None


@dataclass(frozen=True)
class Family:
    """A family of published checkpoints.

    Fields:
        model_types: accepted values of `model_type` in config.json; the first is the family's name.
        spec: parses a config into a ModelSpec.
        tensors: the tensor mapping, embedding first. If several rules map the same parameter, those whose tensor names
            occur in the files apply; an export in the default layout uses the first.
        mlx: rules of mlx-lm's layout that differ from `tensors`; those for a tensor of the same name replace it there.
            A checkpoint has that layout if its files have a name that only these rules have.
        mlx_lm: what mlx-lm needs besides.
        kept: patterns of tensors without a counterpart in the spec, kept verbatim (buffers, vision towers).
        may_lack: a part of the spec, by its field's name, that published files lack if no name has this ending.
        later_layers_kept: keep layers beyond the model's last one verbatim (multi-token prediction).
        undeclared: the `quantization_config` of released files that do not declare it.
        harmless: fields of config.json, besides those of every family, that do not affect the computation.
        architecture: name of the class in transformers, if it is not the model type, without `_text`, in camel case.
        computed_tokens: special tokens of config.json on which the computation depends.
        config: of the inverse of `spec`, which is derived (`inverse.solve`), the part that cannot be: returns fields of
            a config.json for a model designed in moezoo.
        equivalent: returns, by name, the parameters of a model designed in moezoo that transformers computes only with
            other values, with which the model is the same.
    """

    model_types: tuple[str, ...]
    spec: Callable[[Fields], ModelSpec]
    tensors: tuple[Fused, ...]
    mlx: tuple[Fused, ...] = ()
    mlx_lm: MlxLM = MlxLM()
    kept: tuple[str, ...] = ()
    may_lack: tuple[str, str] | None = None
    later_layers_kept: bool = False
    undeclared: Mapping[str, Any] | None = field(default=None, hash=False)
    harmless: tuple[str, ...] = ()
    architecture: str | None = None
    computed_tokens: tuple[str, ...] = ()
    config: Callable[[ModelSpec], dict[str, Any]] | None = None
    equivalent: Callable[[Mapping[str, Array]], dict[str, Array]] | None = None

    @property
    def causal_class(self) -> str:
        """Name of the class in transformers that computes the model: `architectures` of a config.json."""
        camel = "".join(word[:1].upper() + word[1:] for word in self.name.removesuffix("_text").split("_"))
        return self.architecture or f"{camel}ForCausalLM"

    @property
    def name(self) -> str:
        """Name of the family, its first model type."""
        return self.model_types[0]

    @property
    def mlx_tensors(self) -> tuple[Fused, ...]:
        """All rules of mlx-lm's layout; an export in it uses the first for a parameter."""
        own = {rule.theirs for rule in self.mlx}
        return (*self.mlx, *(rule for rule in self.tensors if rule.theirs not in own))

    def has_mlx_names(self, names: Iterable[str]) -> bool:
        """Return whether these names of tensors are those of mlx-lm's layout."""
        shared = {rule.theirs for rule in self.tensors}
        own = [re.escape(rule.theirs) for rule in self.mlx if rule.theirs not in shared]
        if not own:
            return False
        pattern = re.sub(r"\\\{(layer|expert)\\\}", r"\\d+", "|".join(own))
        return any(re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) for name in names)

    def spec_of(self, fields: Fields) -> ModelSpec:
        """Parse a config into a ModelSpec. Raises SpecError if any field is not understood."""
        from pydantic import ValidationError

        try:
            spec = self.spec(fields)
        except ValidationError as error:
            problems = "; ".join(_problem(dict(problem)) for problem in error.errors())
            raise SpecError(
                f"{fields.where} describes an impossible model: {problems}. "
                "Use the config.json that belongs to these files."
            ) from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # For example a list in place of a number, in a field without a check of its own.
            raise SpecError(
                f"{fields.where} has an invalid field ({type(error).__name__}: {error!s:.100}); the last field "
                f"read is {fields.last}. Use the config.json that belongs to these files."
            ) from error
        fields.expect("use_bidirectional_attention", False, "vision")  # "vision": only between the tokens of an image
        fields.finish(("quantization", "quantization_config", *self.harmless))
        return spec


def _problem(error: dict[str, Any]) -> str:
    context = error.get("ctx", {})
    if error["type"] == "impossible":
        return f"{context['path']} {context['problem']}".strip()
    return f"{'.'.join(str(part) for part in error['loc'])}: {error['msg'].lower()}, got {error['input']!r:.80}"


@cache
def families() -> dict[str, Family]:
    """Return all families by model type."""
    from moezoo.core.huggingface import families as package

    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(package.__path__):
        family: Family = importlib.import_module(f"{package.__name__}.{module.name}").FAMILY
        for model_type in family.model_types:
            assert model_type not in found, model_type
            found[model_type] = family
    return found


def family_of(fields: Fields) -> Family:
    """Return the family of a config.json. Raises SpecError if its model type is not supported."""
    known = families()
    name = fields.model_type
    if name not in known:
        # Another number or word is another model (mistral4 and mixtral are not mistral), not a misspelling.
        same_numbers = [other for other in known if re.findall(r"\d+", other) == re.findall(r"\d+", name)]
        meant = nearest(name, same_numbers, cutoff=0.87)
        close = nearest_family(fields, {each.name: (each.spec, each.harmless) for each in known.values()})
        what = f": {ADDING}" if name else ". If it is one, set model_type to that."
        advice = "" if close is None else f" By its fields it is nearest to {close.words}{what}"
        got = f"is {name!r:.80}{meant}" if name else "is missing"
        raise SpecError(
            f"model_type {got}; expected one of the {len(known)} supported ones, which "
            f"`moezoo describe --help` lists ({fields.where}).{advice}"
        )
    return known[name]
