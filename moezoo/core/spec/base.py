"""What every part of a spec is made of."""

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError


class Part(BaseModel):
    """Base of every spec and config section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def impossible(path: str, problem: str, advice: str) -> PydanticCustomError:
    """A combination of values that cannot be; `path` is relative to the part whose validator raises it."""
    return PydanticCustomError(
        "impossible", "{problem}. {advice}", {"path": path, "problem": problem, "advice": advice}
    )


def default_kind(kind: str) -> BeforeValidator:
    """For a discriminated union: a config that leaves `kind` out means this member."""

    def fill(value: Any) -> Any:
        return {"kind": kind, **value} if isinstance(value, dict) and "kind" not in value else value

    return BeforeValidator(fill)
