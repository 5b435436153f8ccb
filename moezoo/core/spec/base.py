"""Base class and validation helpers of all spec parts."""

import functools
import typing
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from moezoo.core.errors import shown


class Part(BaseModel):
    """Base class of every spec and config section: frozen; an unknown key, or a boolean as a number, is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_not_booleans(cls, raw: Any) -> Any:
        for name, value in raw.items() if isinstance(raw, dict) else ():
            items = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(item, bool) for item in items) and name in _fields_of_numbers(cls):
                raise PydanticCustomError("boolean", "{path} is {value}", {"path": name, "value": shown(value)})
        return raw


@functools.cache
def _fields_of_numbers(part: type[Part]) -> frozenset[str]:
    """Return the fields that take integers or floats and no boolean; pydantic alone would read true as 1."""
    kinds = {name: set(_kinds_in(field.annotation)) for name, field in part.model_fields.items()}
    return frozenset(name for name, found in kinds.items() if found & {int, float} and bool not in found)


def _kinds_in(annotation: Any) -> list[Any]:
    """Return the types inside of `X | None`, `tuple[X, ...]` and `Annotated[X, ...]`."""
    if typing.get_origin(annotation) is typing.Literal:
        return []
    if typing.get_origin(annotation) is typing.Annotated:
        return _kinds_in(annotation.__origin__)
    arguments = typing.get_args(annotation)
    return [kind for argument in arguments for kind in _kinds_in(argument)] if arguments else [annotation]


def impossible(path: str, problem: str, advice: str) -> PydanticCustomError:
    """Return the error for an impossible combination of values; `path` is relative to the part that raises it."""
    return PydanticCustomError(
        "impossible", "{problem}. {advice}", {"path": path, "problem": problem, "advice": advice}
    )


def default_kind(kind: str) -> BeforeValidator:
    """Return a validator for a discriminated union that fills in `kind` where a config leaves it out."""

    def fill(value: Any) -> Any:
        return {"kind": kind, **value} if isinstance(value, dict) and "kind" not in value else value

    return BeforeValidator(fill)
