"""Writes the generated parts of the documents: the reference in docs/recipe.md from `compress/config/`.

`python docs/generate.py` writes them; with `--check` it only names the files that would change, and exits with 1.
Figures in docs/methods and benchmarks/README.md come from the benchmarks' results: `python -m benchmarks tables`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from compress.config.messages import own_parts_in
from compress.config.recipe import Recipe
from deploy.core.files import write_text

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "recipe.md"
BEGIN, END = "<!-- reference -->\n", "<!-- /reference -->\n"


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
            todo += [(f"{path}.package.module:Name", c) for c in own_parts_in(model)]
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
    formats = {"path": "path", "import-path": "import path"}
    text = formats.get(schema.get("format", "")) or {**words, "object": "section", "null": "`null`"}[kind]
    bounds = {"minimum": "≥ ", "exclusiveMinimum": "> ", "maximum": "≤ ", "exclusiveMaximum": "< "}
    limits = [f"{sign}{_plain(schema[key])}" for key, sign in bounds.items() if key in schema]
    if "multipleOf" in schema:
        limits.append(f"a multiple of {schema['multipleOf']}")
    return ", ".join([text, *limits])


def _plain(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"


def with_reference(page: Path) -> str:
    """The text of docs/recipe.md with the reference as the settings have it."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{reference()}{END}{rest.partition(END)[2]}"


def generated() -> dict[Path, str]:
    """Every document with generated parts, and its text as it should be."""
    return {REFERENCE: with_reference(REFERENCE)}


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    old = {path: text for path, text in generated().items() if path.read_text(encoding="utf-8") != text}
    for path, text in old.items():
        print(path.relative_to(ROOT))
        if not arguments:
            write_text(path, text)
    return int(bool(old and arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
