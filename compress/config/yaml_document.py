"""YAML that remembers where each key was written, read with the scalar rules of YAML 1.2: `1e-4` is a number and
`no` is a word, not false."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from deploy.core.errors import UserError, one_line

_SCALARS = (  # YAML 1.2 core schema, in the form PyYAML wants: tag, pattern, possible first characters
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own way to declare them


class Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


Key = tuple[str | int, ...]


class Document:
    """Plain data of a YAML file, or of a Python program (`name` None), remembering where each key was written."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.origins: dict[Key, str] = {(): "" if name is None else f"{name}:1"}
        self.problems: list[str] = []

    def read(self, text: str) -> dict[str, Any]:
        try:
            node = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{self.name}:{mark.line + 1}" if mark else self.name
            raise UserError(
                f"{where}: not valid YAML: {one_line(error.problem or error.context or 'unreadable')}"
            ) from None
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML lets "\\UFFFFFFFF" become a ValueError
            raise UserError(f"{self.name}: not valid YAML: {one_line(error)}") from None
        if node is None:
            raise UserError(f"{self.name}: the recipe is empty")
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{self.name}:{node.start_mark.line + 1}: a recipe is a list of `key: value`")
        return self._value(node, (), None, ())

    def take(self, value: Any, key: Key = ()) -> Any:
        """Plain data of what a Python program gives: paths become text, and tuples lists."""
        if isinstance(value, Mapping):
            if odd := [name for name in value if not isinstance(name, str)]:
                self.problems.append(self.report(key, f"a key must be a word, got {odd[0]!r}"))
            return {name: self.take(child, (*key, name)) for name, child in value.items() if isinstance(name, str)}
        if isinstance(value, (list, tuple)):
            return [self.take(child, (*key, index)) for index, child in enumerate(value)]
        if isinstance(value, PurePath):
            return str(value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        self.problems.append(self.report(key, f"needs text, a number, a list or a section, got {value!r}"))
        return None

    def override(self, data: dict[str, Any], text: str) -> None:
        dotted, equals, written = text.partition("=")
        keys = _keys(data, dotted.strip())
        place = f"--set {dotted.strip()}"
        if not equals or not all(keys):
            self.problems.append(f"--set {text}: write it as key=value, for example train.epochs=3")
            return
        try:
            node = yaml.compose(written, Loader=_Loader)
        except (yaml.YAMLError, ValueError, OverflowError):
            self.problems.append(f"{place}: '{written}' is not valid YAML")
            return
        if node is None:
            self.problems.append(f"{place}: no value; write null to unset it")
            return
        section: Any = data
        for depth, key in enumerate(keys[:-1]):
            child = section.get(key)
            if child is None:
                child = section[key] = {}
                self.origins[keys[: depth + 1]] = place
            if not isinstance(child, dict):
                parent = ".".join(keys[: depth + 1])
                self.problems.append(f"{place}: {parent} is a value, not a section; set {parent} as a whole")
                return
            section = child
        for known in [k for k in self.origins if k[: len(keys)] == keys]:
            del self.origins[known]
        self.origins[keys] = place
        section[keys[-1]] = self._value(node, keys, place, ())

    def where(self, key: Key) -> str:
        """Place of the key, or of the nearest section around it."""
        while key not in self.origins:
            key = key[:-1]
        return self.origins[key]

    def report(self, key: Key, problem: str) -> str:
        place, dotted = self.where(key), ".".join(map(str, key))
        return ": ".join([*filter(None, (place, "" if place == f"--set {dotted}" else dotted)), problem])

    def _value(self, node: yaml.Node, key: Key, place: str | None, around: tuple[yaml.Node, ...]) -> Any:
        """Data of a node. `place` stands in for line numbers below a --set."""
        if node in around:
            self.problems.append(self.report(key, "an alias may not contain itself"))
            return None
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for name_node, value_node in node.value:
                here = place or f"{self.name}:{name_node.start_mark.line + 1}"
                if not isinstance(name_node, yaml.ScalarNode):
                    self.problems.append(f"{here}: a key must be a word")
                    continue
                child = (*key, name_node.value)
                if name_node.value in mapping:
                    first = "" if place else f" (line {self.origins[child].rpartition(':')[2]})"
                    self.problems.append(f"{here}: {'.'.join(map(str, child))}: given twice{first}")
                    continue
                self.origins[child] = here
                mapping[name_node.value] = self._value(value_node, child, place, (*around, node))
            return mapping
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.origins[(*key, index)] = place or f"{self.name}:{item.start_mark.line + 1}"
                items.append(self._value(item, (*key, index), place, (*around, node)))
            return items
        assert isinstance(node, yaml.ScalarNode)
        if node.value == "" and node.style is None:  # `bckd:` looks like "on" and would mean "off"
            self.problems.append(self.report(key, "no value; write {} for a section of defaults, null for none"))
            return None
        match node.tag.rpartition(":")[2]:
            case "null":
                return None
            case "bool":
                return node.value.lower() == "true"
            case "int":
                return int(node.value)
            case "float":
                return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))
            case "str":
                return node.value
        self.problems.append(self.report(key, f"the tag {node.tag} has no meaning here"))
        return None


def _keys(data: Any, dotted: str) -> tuple[str, ...]:
    """The keys that a dotted key goes through. An import path that is a key of `data` is one, dots and all."""
    keys: list[str] = []
    rest = f"{dotted}."
    while rest:
        section = data if isinstance(data, dict) else {}
        own = (key for key in section if ":" in key and rest.startswith(f"{key}."))
        key = next(own, rest.partition(".")[0])
        rest = rest[len(key) + 1 :]
        keys.append(key.strip())
        data = section.get(key.strip())
    return tuple(keys)
