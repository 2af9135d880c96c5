"""Groups of options: a parameter that is a dataclass becomes an option for each of its fields.

    @dataclass(frozen=True)
    class Sizes:
        height: Annotated[int, typer.Option("--height")] = 32

    @commands.command()
    @with_groups
    def draw(out: Path, sizes: Sizes) -> None: ...     # compress draw OUT --height 64

Several commands can take one group, and a function is handed what belongs together in one piece.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

HIDDEN = "hidden"
"""`Annotated[Group, HIDDEN]`: the options are taken and stand in no help."""


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer understands it: each group replaced by its options, in its place."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}
    for parameter in inspect.signature(command).parameters.values():
        annotation = hints[parameter.name]
        hidden = HIDDEN in get_args(annotation)[1:]
        group = get_args(annotation)[0] if hidden else annotation
        if not is_dataclass(group):
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=annotation))
            continue
        options = _options(group, hidden)
        parameters += options
        groups[parameter.name] = (group, [option.name for option in options])

    def run(**values: Any) -> None:
        for name, (group, names) in groups.items():
            values[name] = group(**{key: values.pop(key) for key in names})
        command(**values)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options(group: Any, hidden: bool) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    options = []
    for field in fields(group):
        annotation = hints[field.name]
        if hidden:
            assert get_origin(annotation) is Annotated, field.name
            kind, option = get_args(annotation)
            option = copy.copy(option)
            option.hidden = True
            annotation = Annotated[kind, option]
        assert field.default is not MISSING, f"{field.name}: an option of a group has a default"
        options.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)
        )
    return options
