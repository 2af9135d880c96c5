"""Wording of what pydantic finds wrong with a recipe: one plain line for each problem."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from compress.config.yaml_document import Document, Key
from deploy.core.import_path import PATTERN


def problems(error: ValidationError, data: dict[str, Any], document: Document, root: type[BaseModel]) -> list[str]:
    """One line for each problem, in the order of the file's sections."""
    found: dict[Key, list[tuple[str, str]]] = {}
    alternatives: set[Key] = set()
    unknown: set[Key] = set()
    for item in error.errors(include_url=False):
        kind = item["type"]
        key, is_alternative = _data_key(item, data)
        if kind == "default_factory_not_called":  # follows from another field's error
            continue
        if kind == "string_pattern_mismatch" and PATTERN in item["ctx"]["pattern"]:
            is_key = item["loc"] == key and item["input"] == key[-1]  # then it is no setting of ours either
            kind = "extra_forbidden" if is_key and _is_unknown(key, root) else "import_path"
            item = {**item, "type": kind}
        if any(key[:length] in unknown for length in range(1, len(key) + 1)):
            continue  # what stands below an unknown key is no second problem
        if kind == "missing" and isinstance(key[-1], int):  # too few elements
            key, kind = key[:-1], "rule"
        if is_alternative or kind == "too_short":  # an item that is wrong does not count
            alternatives.add(key)
        if kind == "rule" and item.get("ctx", {}).get("key"):
            key = (*key, *item["ctx"]["key"])
        found.setdefault(key, []).append((kind, _message(item, key, root)))
        if kind == "extra_forbidden":
            unknown.add(key)
            meant = _closest(key, root)
            if meant and found.get((*key[:-1], meant), [("", "")])[0][0] == "missing":
                del found[*key[:-1], meant]  # a typing error is one problem, not two
    # Of a value that may have several forms, speak of the form that fitted best: the one that failed deepest.
    for key in alternatives:
        if any(other != key and other[: len(key)] == key for other in found):
            found.pop(key, None)
    return [document.report(key, _joined(messages)) for key, messages in found.items()]


def _joined(messages: list[tuple[str, str]]) -> str:
    """One message about one key: the rule that the value broke, else the forms that it may have."""
    rules = [text for kind, text in messages if kind == "rule"]
    if rules:
        return rules[-1]
    kinds = dict(messages)
    if {"literal_error", "import_path"} <= kinds.keys():  # a built-in part, or a user's own
        if ":" in kinds["import_path"].partition(";")[0]:
            return kinds["import_path"]
        hinted = "; did you mean" in kinds["literal_error"]
        return kinds["literal_error"] + ("" if hinted else ", and no import path (package.module:Name)")
    needs = [text.removeprefix("needs ") for kind, text in messages if kind in _NEEDED]
    if len(needs) > 1:
        return "needs " + " or ".join([*(text.partition(", got ")[0] for text in needs[:-1]), needs[-1]])
    return f"needs {needs[0]}" if needs else messages[0][1]


def _data_key(item: Any, data: Any) -> tuple[Key, bool]:
    """The error's key in the data: pydantic's location without the names it gives to a union's members."""
    key: list[str | int] = []
    dropped = False
    for place, part in enumerate(item["loc"], start=1):
        missing = item["type"] == "missing" and place == len(item["loc"])
        here = isinstance(data, dict) and (part in data or missing)
        here = here or (isinstance(data, list) and isinstance(part, int))
        if not here:
            dropped = True
            continue
        key.append(part)
        data = data.get(part) if isinstance(data, dict) else data[part] if part < len(data) else None
    return tuple(key), dropped


_NEEDED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "finite_number": "a finite number",
}


_BOUNDS = {
    "greater_than": "more than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
    "multiple_of": "a multiple of",
}


def _message(item: Any, key: Key, root: type[BaseModel]) -> str:
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "json_invalid":
        return "not a recipe: nested too deeply, or text that is not Unicode"
    if kind == "missing":
        return f"needs {item['loc'][-1] + 1} numbers" if isinstance(item["loc"][-1], int) else "missing"
    if kind == "extra_forbidden":
        meant = _closest(key, root)
        known = ", ".join(_model_at(key[:-1], root).model_fields)
        hint = f"did you mean {meant}?" if meant else f"known here: {known}"
        return f"unknown key; {hint}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"]) or re.findall(r"\d+", context["expected"])
        hint = did_you_mean(str(value), choices) or ""
        return f"{value!r} is not one of {', '.join(choices)}{hint}"
    if kind in _NEEDED:
        return f"needs {_NEEDED[kind]}, got {value!r}"
    if kind == "rule":
        return context.get("problem") or item["msg"]
    if kind == "import_path":
        return f"{value!r} is not an import path; write package.module:Name"
    if kind == "string_pattern_mismatch":
        return f"{value!r} is not a plain name (letters, digits, . _ -)"
    if kind == "too_long":
        return f"needs at most {context['max_length']} items, got {value!r}"
    if kind == "too_short":
        return f"needs at least {context['min_length']} items, got {value!r}"
    if kind in _BOUNDS:
        bound = next(iter(context.values()))
        return f"must be {_BOUNDS[kind]} {bound if isinstance(bound, int) else f'{bound:g}'}, got {value!r}"
    return f"{item['msg'].removeprefix('Input ')}, got {value!r}"


def _model_at(key: Key, root: type[BaseModel]) -> type[BaseModel]:
    """The settings class of the section at `key`; a number in the key is a place in a list of sections."""
    model = root
    for part in key:
        if isinstance(part, str):
            field = model.model_fields.get(part)
            model = next(own_parts_in(model) if field is None else models_in(field.annotation))
    return model


def _is_unknown(key: Key, root: type[BaseModel]) -> bool:
    """Whether the section at `key` has no such setting."""
    return key[-1] not in _model_at(key[:-1], root).model_fields


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings classes that an annotation names, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)


def own_parts_in(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The settings class of keys that are import paths, where a section takes such keys."""
    return models_in(inspect.get_annotations(model, eval_str=True).get("__pydantic_extra__"))


def _closest(key: Key, root: type[BaseModel]) -> str | None:
    """The setting that a misspelt key probably means."""
    fields = list(_model_at(key[:-1], root).model_fields)
    return next(iter(difflib.get_close_matches(str(key[-1]).lower(), fields, n=1, cutoff=0.5)), None)


def did_you_mean(word: str, choices: Sequence[str]) -> str | None:
    close = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else None
