"""What all settings of a recipe are made of: the strict base class, the common ranges, rules between fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # what every generator takes
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class Settings(BaseModel):
    """Frozen; no unknown keys, no silent conversion."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def broken_rule(key: str, problem: str) -> PydanticCustomError:
    """An error of a rule between fields, reported at `key` of the model that raises it."""
    return PydanticCustomError("rule", "{problem}", {"problem": problem, "key": key})
