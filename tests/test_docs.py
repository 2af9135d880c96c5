"""The documents say what the program does: the reference of the recipe is generated, and shown commands exist.

After a change of `compress/recipe.py`, `python -m tests.test_docs` writes the reference in docs/recipe.md again.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from compress import cli, recipe
from compress.recipe import Recipe, load_recipe
from deploy.errors import UserError
from deploy.files import write_text

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
REFERENCE = ROOT / "docs" / "recipe.md"
BEGIN, END = "<!-- reference -->\n", "<!-- /reference -->\n"


# ------------------------------------------------------------------------------- the reference of the recipe


def reference() -> str:
    """Every setting of a recipe as Markdown tables, one for each section, from the models themselves."""
    parts = []
    for path, model in sections(Recipe, ""):
        schema = model.model_json_schema()
        title = f"`{path}`" if path else "Top level"
        parts.append(f"### {title}\n\n{' '.join((model.__doc__ or '').split())}\n\n")
        parts.append("| key | values | default | meaning |\n|---|---|---|---|\n")
        for name, field in model.model_fields.items():
            values = accepted(schema["properties"][name], schema.get("$defs", {}))
            if field.is_required():
                default = "required"
            elif isinstance(field.default, BaseModel):
                default = "its defaults"
            elif field.default_factory is not None:
                default = "see meaning"
            else:
                default = f"`{json.dumps(field.default, default=str)}`"
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            parts.append(f"| `{name}` | {values} | {default} | {meaning} |\n")
        parts.append("\n")
    return "".join(parts)


def sections(model: type[BaseModel], path: str) -> list[tuple[str, type[BaseModel]]]:
    """A settings model and those below it, each class once, at its shortest path, in the order of the recipe."""
    found: dict[type[BaseModel], str] = {}
    todo = [(path, model)]
    for path, model in todo:  # grows: breadth first
        if model not in found:
            found[model] = path
            for name, field in model.model_fields.items():
                classes = [field.annotation, *getattr(field.annotation, "__args__", ())]
                below = [c for c in classes if isinstance(c, type) and issubclass(c, BaseModel)]
                todo += [(f"{path}.{name}".lstrip("."), c) for c in below]
    order = ["", *Recipe.model_fields]
    return sorted(((path, m) for m, path in found.items()), key=lambda row: order.index(row[0].partition(".")[0]))


def accepted(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(accepted(part, definitions) for part in schema["anyOf"]))
    if "$ref" in schema:
        return accepted(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        items = schema.get("prefixItems")
        if items is None:
            return f"list of {accepted(schema['items'], definitions)}"
        return f"[{', '.join(accepted(item, definitions) for item in items)}]"
    words = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "string": "text"}
    text = "path" if schema.get("format") == "path" else {**words, "object": "section", "null": "`null`"}[kind]
    bounds = {"minimum": "≥ ", "exclusiveMinimum": "> ", "maximum": "≤ ", "exclusiveMaximum": "< "}
    limits = [f"{sign}{_plain(schema[key])}" for key, sign in bounds.items() if key in schema]
    if "multipleOf" in schema:
        limits.append(f"a multiple of {schema['multipleOf']}")
    return ", ".join([text, *limits])


def _plain(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"


def test_the_reference_is_that_of_the_recipe() -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    written = text.partition(BEGIN)[2].partition(END)[0]
    assert written.strip() == reference().strip(), "docs/recipe.md is old; run: python -m tests.test_docs"


def test_every_setting_is_in_the_reference() -> None:
    """Against the generator's own mistakes: a settings class that nobody reaches, a field without a word."""
    classes = [c for c in vars(recipe).values() if isinstance(c, type) and issubclass(c, recipe._Settings)]
    documented = {model for _, model in sections(Recipe, "")}
    assert documented == set(classes) - {recipe._Settings}
    text = reference()
    for model in documented:
        for name, field in model.model_fields.items():
            assert f"| `{name}` |" in text and field.description, f"{model.__name__}.{name} says nothing"


# ----------------------------------------------------------------------------------------- what is shown


def blocks(language: str) -> list[Any]:
    """Fenced code blocks of that language in all documents, as (document:line, text)."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            where = f"{path.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}"
            found.append(pytest.param(match[1], id=where))
    return found


def commands(block: str) -> Iterator[list[str]]:
    """The words of every command after a `$ `; a backslash continues the line, `&&` separates commands."""
    for line in re.sub(r"\\\n>?\s*", "", block).splitlines():
        if line.startswith("$ "):
            for command in line[2:].split("&&"):
                yield shlex.split(command, comments=True)


@pytest.mark.parametrize("block", blocks("console"))
def test_commands_exist(block: str) -> None:
    shown = list(commands(block))
    assert shown, "a console block shows a command after `$ `"
    for words in shown:
        if words[:3] == ["torchrun", "--nproc-per-node", "2"]:
            words = words[words.index("-m") + 1 :]
        while "=" in words[0] and words[0].partition("=")[0].isupper():
            words = words[1:]
        if Path(words[0]).name == "compress":
            understood(words[1:])
        elif words[0] == "make":
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            wanted = [word for word in words[1:] if "=" not in word]
            assert set(wanted) <= set(targets), f"no such make target: {wanted}"


def understood(words: list[str]) -> None:
    """Parse a command line as `compress` would, without running it; and look up the keys of --set."""
    group = typer.main.get_command(cli.app)
    name, command, rest = group.resolve_command(group.make_context("compress", [], resilient_parsing=True), words)
    while hasattr(command, "commands") and rest:
        name, command, rest = command.resolve_command(command.make_context(name, [], resilient_parsing=True), rest)
    context = command.make_context(name, rest)
    for setting in context.params.get("settings") or ():
        model: Any = Recipe
        for key in setting.partition("=")[0].split("."):
            assert key in model.model_fields, f"--set {setting}: no such setting"
            classes = [model.model_fields[key].annotation, *getattr(model.model_fields[key].annotation, "__args__", ())]
            model = next((c for c in classes if isinstance(c, type) and issubclass(c, BaseModel)), model)
    shown = context.params.get("recipe")
    if shown is not None and (ROOT / shown).is_file():
        load_recipe(ROOT / shown, context.params["settings"] or ())


@pytest.mark.parametrize("block", blocks("yaml"))
def test_recipes_load(block: str, tmp_path: Path) -> None:
    """A whole recipe as it is; a part of one inside the smallest recipe that there is."""
    shown = yaml.safe_load(block)
    if "name" not in shown:
        whole = {
            "name": "shown",
            "data": {"synthetic": {"train": 8, "val": 8}, "short": 160},
            "student": {"backbone": "nano"},
            "teacher": {"checkpoint": "teacher.safetensors"},
            "train": {"epochs": 1},
        }
        shown = {**whole, **shown}
    path = tmp_path / "recipe.yaml"
    path.write_text(block if "name" in yaml.safe_load(block) else json.dumps(shown))
    try:
        load_recipe(path)
    except UserError as error:
        pytest.fail(str(error))


@pytest.mark.parametrize("block", blocks("python"))
def test_python_names_exist(block: str) -> None:
    """Shown programs compile, and what they import from us is there. (Running them needs a trained student.)"""
    compile(block, "shown", "exec")
    for line in block.splitlines():
        if match := re.match(r"from ((?:compress|deploy|kernels)[\w.]*) import (.+)", line):
            module = __import__(match[1], fromlist=["_"])
            for name in match[2].split(","):
                assert hasattr(module, name.strip()), f"{match[1]} has no {name.strip()}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"link to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(path: Path) -> None:
    """`compress/train.py` in running text is a file of this repository."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    pattern = r"`((?:compress|deploy|kernels|tests|benchmarks|recipes|docs)/[\w/.-]*\.(?:py|yaml|json|md|j2))`"
    for name in re.findall(pattern, text):
        assert (ROOT / name).is_file(), f"{name} is not there"


if __name__ == "__main__":
    before, _, rest = REFERENCE.read_text(encoding="utf-8").partition(BEGIN)
    write_text(REFERENCE, f"{before}{BEGIN}\n{reference()}{END}{rest.partition(END)[2]}")
