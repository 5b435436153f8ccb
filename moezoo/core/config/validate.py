"""Validation of raw config data, with errors that name the config path."""

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, TypeVar

from pydantic import (
    BaseModel,
    ValidationError,
)
from pydantic_core import ErrorDetails

from moezoo.core.config.renamed_keys import RENAMED_KEYS
from moezoo.core.errors import SpecError, nearest, shown
from moezoo.core.spec import Part

_Part = TypeVar("_Part", bound=Part)
_MAX_PROBLEMS = 20
_MAX_CHARACTERS = 1_000  # of a problem; a config can have a text of a megabyte


def validate(part: type[_Part], raw: object, where: str) -> _Part:
    """Validate raw data as a config part. Raises one SpecError that lists every problem with its config path."""
    try:
        return part.model_validate(raw)
    except ValidationError as error:
        problems = error.errors()
        lines = [_explain(part, raw, problem, where)[:_MAX_CHARACTERS] for problem in problems[:_MAX_PROBLEMS]]
        if problems[_MAX_PROBLEMS:]:
            lines.append(f"{len(problems) - _MAX_PROBLEMS} more problems ({where}). Fix these first.")
        raise SpecError("\n".join(lines)) from None


def _explain(part: type[Part], raw: object, problem: ErrorDetails, where: str) -> str:
    path, owner = _locate(part, raw, problem["loc"])
    context = problem.get("ctx", {})
    match problem["type"]:
        case "impossible":
            path = ".".join(piece for piece in (path, context["path"]) if piece) or "config"
            return f"{path} {context['problem']} ({where}). {context['advice']}."
        case "boolean":
            path = ".".join(piece for piece in (path, context["path"]) if piece)
            return f"{path} is {context['value']}; expected a number, not true or false ({where})."
        case "extra_forbidden":
            key = str(problem["loc"][-1])
            known = sorted(owner.model_fields) if owner else []
            if RENAMED_KEYS.get(key) in known:
                return f"{path} is now called {RENAMED_KEYS[key]} ({where}). Rename the key."
            return f"{path} is not a known key{nearest(key, known)} ({where}). Known keys: {', '.join(known)}."
        case "missing":
            return f"{path} is missing ({where}). Add it."
        case "union_tag_invalid":
            tag, known_tags = str(context["tag"]), str(context["expected_tags"]).replace("'", "").split(", ")
            rule = f"expected one of {', '.join(known_tags)}"
            return f"{path}.kind is {shown(tag)}{nearest(tag, known_tags)}; {rule} ({where})."
        case "union_tag_not_found":
            return f"{path}.kind is missing; expected the kind of this part ({where}). Add it."
        case _:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            return f"{path or 'config'} is {shown(problem['input'])}; {message} ({where})."


def _locate(part: type[Part], raw: object, location: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None]:
    """Return the config path as users write it (without union tags), and the model class with its last key."""
    path, value = "", raw
    owner: type[BaseModel] | None = None
    candidates: list[type[BaseModel]] = [part]
    for key in location:
        if isinstance(key, int):
            path += f"[{key}]"
            value = value[key] if isinstance(value, Sequence) and key < len(value) else None
            continue
        tagged = [model for model in candidates if key in _tags(model)]
        is_tag = tagged and len(candidates) > 1 and not (isinstance(value, Mapping) and key in value)
        if is_tag:
            candidates = tagged
            continue
        path += f".{key:.80}" if path else f"{key:.80}"
        owner = candidates[0] if len(candidates) == 1 else None
        value = value.get(key) if isinstance(value, Mapping) else None
        field = owner.model_fields.get(key) if owner else None
        candidates = list(_models_in(field.annotation)) if field else []
    return path, owner


def _tags(model: type[BaseModel]) -> tuple[object, ...]:
    """Return the allowed values of `kind` in this member of a union."""
    kind = model.model_fields.get("kind")
    return typing.get_args(kind.annotation) if kind else ()


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    """Yield every model class inside `X`, `X | None`, `tuple[X, ...]` and `Annotated[X, ...]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Annotated:
        arguments = arguments[:1]
    for argument in arguments:
        yield from _models_in(argument)
