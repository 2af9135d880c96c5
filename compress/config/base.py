"""Ground of all settings of a recipe: the strict base class, the common ranges, rules between fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, PlainSerializer
from pydantic_core import PydanticCustomError

from deploy.core.import_path import PATTERN
from deploy.core.storage import place, shown, workplace

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # what every generator takes
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
ImportPath = Annotated[str, Field(pattern=f"^{PATTERN}$", json_schema_extra={"format": "import-path"})]
"""A user's own part, `package.module:Name`; what it names is imported where it is used, not while reading a recipe."""
Location = Annotated[Path, AfterValidator(place), PlainSerializer(shown, return_type=str, when_used="json")]
"""A file or folder, also one at an address such as s3://bucket/name; what is written of it says the address."""
OutputLocation = Annotated[Path, AfterValidator(workplace), PlainSerializer(shown, return_type=str, when_used="json")]
"""A folder to write into, also one at an address."""
Options = dict[str, JsonValue]
"""Arguments of a user's own part, by name."""


def added_later(default: Any = None) -> Any:
    """A field for a key that recipes of version 0.1 do not know: with its default it is in no dump. So the hash of an
    old recipe, what its run's manifest compares, and the recipe.yaml of a run without the key stay as they were."""
    return Field(default=default, exclude_if=lambda value: value == default)


class Settings(BaseModel):
    """Frozen; no unknown keys, no silent conversion."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


ZOO_PREFIX = "zoo:"
"""What the name of a published checkpoint begins with, in the place of a file's."""


def is_published(name: str | Path) -> bool:
    """Whether `name` is that of a published checkpoint, and not of a file."""
    return str(name).startswith(ZOO_PREFIX)


def is_checkpoint(name: str) -> bool:
    """Whether `name` can be a checkpoint: a `.safetensors` or `.pth` file, or `zoo:<name>`."""
    return (is_published(name) and name != ZOO_PREFIX) or Path(name).suffix in (".safetensors", ".pth")


def checkpoint_name(name: str) -> str:
    """Return `name` if it can be a checkpoint."""
    if not is_checkpoint(name):
        raise PydanticCustomError(
            "rule",
            "{problem}",
            {"problem": f"'{name}' is neither a .safetensors file, a .pth file, nor zoo:<name>"},
        )
    return name


def broken_rule(key: str | tuple[str, ...], problem: str) -> PydanticCustomError:
    """An error of a rule between fields, reported at `key` of the model that raises it: dotted, or in parts."""
    parts = tuple(key.split(".")) if isinstance(key, str) and key else tuple(key)
    return PydanticCustomError("rule", "{problem}", {"problem": problem, "key": parts})
