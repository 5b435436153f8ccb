"""Base class and validation helpers of all spec parts."""

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError


class Part(BaseModel):
    """Base class of every spec and config section: frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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
