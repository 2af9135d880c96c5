"""Writes the generated parts of the documents: the reference in docs/recipe.md from `compress/config/`, the figures in
docs/methods and the tables in benchmarks/README.md from `benchmarks/results/`.

`python docs/generate.py` writes them; with `--check` it only names the files that would change, and exits with 1.
"""

from __future__ import annotations

import json
import re
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
METHODS = ROOT / "docs" / "methods"
INDEX = METHODS / "README.md"
GAINS = ROOT / "benchmarks" / "results" / "distill_gain-cpu-methods.json"
MORE = {  # further tables of a page: name of the block, file beside GAINS
    INDEX: [("photographs", "distill_gain-bccd-methods.json"), ("families", "distill_gain-cpu-families.json")],
    METHODS / "uet.md": [("ablation", "distill_gain-cpu-uet.json")],
}

BENCHMARKS = ROOT / "benchmarks" / "README.md"
TABLES = [
    ("pseudo", "pseudo_gain-cpu.md"),
    ("pseudo-cells", "pseudo_gain-bccd.md"),
]  # name of the block, file beside GAINS
PAGES = sorted(METHODS.glob("*.md"))


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


def with_figures(page: Path, gains: Path = GAINS) -> str:
    """The text of a page of docs/methods, its figures (and the index's column "our gain") as in the benchmark."""
    text = page.read_text(encoding="utf-8")
    results = json.loads(gains.read_text(encoding="utf-8")) if gains.is_file() else None
    method = None if page == INDEX else page.stem
    text = filled(text, "figures", figures(results, method, gains.with_suffix(".svg")))
    for block, name in MORE.get(page, ()):
        path = gains.with_name(name)
        more = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        text = filled(text, block, figures(more, None, path.with_suffix(".svg")))
    if method is None:
        table = re.search(r"<!-- which -->\n(.*?)<!-- /which -->", text, re.DOTALL)
        if table is None:
            raise ValueError(f"{page} has no table of methods: <!-- which -->")
        row = re.compile(r"^(\| \[(\w+)\].*\|)[^|]*\|$", re.MULTILINE)
        cells = row.sub(lambda match: f"{match[1]} {gain_of(results, match[2])} |", table[1])
        text = filled(text, "which", cells)
    return text


def filled(text: str, name: str, block: str) -> str:
    """`text` with `block` between the comments of that name."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->\n)"
    text, count = re.subn(pattern, lambda match: f"{match[1]}{block}{match[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{count} blocks <!-- {name} -->, not one")
    return text


def figures(results: dict[str, Any] | None, method: str | None, picture: Path = GAINS.with_suffix(".svg")) -> str:
    """A Markdown table of the benchmark's arms: those with the method, or all, beside the baseline."""
    if results is None:
        return "Not measured yet: `python -m benchmarks distill_gain cpu`.\n"
    baseline, *others = results["arms"]
    arms = [row for row in others if method is None or method in parts(row["arm"])]
    if not arms:
        return f"Not among the arms of `{results['command']}` of {results['date']}.\n"
    if method is not None:  # a head start is no gain of a method
        arms = [row for row in others if row["arm"] == "inherit only" and row not in arms] + arms
    seeds = ", ".join(map(str, results["seeds"]))
    lines = [
        f"`{results['command']}`, {results['date']}; seeds {seeds}; {results['machine']['cpu']}, "
        f"{results['machine']['cores']} cores. Mean and standard deviation over the seeds; gains are paired with the "
        "baseline, with the 95 % interval of their mean.",
        "",
        "| arm | mAP | gain | 95 % interval | settings |",
        "|---|---:|---:|---|---|",
    ]
    for row in [baseline, *arms]:
        spread = f" ± {row['map_stdev']:.2f}" if "map_stdev" in row else ""
        first = row["arm"].endswith("baseline")  # of the table, or of a family in it
        gain = "" if first else f"{row['gain_mean']:+.2f}"
        interval = "" if first or "gain_low" not in row else f"{row['gain_low']:+.2f} to {row['gain_high']:+.2f}"
        settings = " ".join(f"`{setting}`" for setting in row.get("settings", ())).replace("|", "\\|")
        lines.append(f"| {row['arm']} | {row['map_mean']:.2f}{spread} | {gain} | {interval} | {settings} |")
    if method is None and picture.is_file():
        lines += ["", f"![gain of every arm](../../{picture.relative_to(ROOT).as_posix()})"]
    return "\n".join([*lines, ""])


def gain_of(results: dict[str, Any] | None, name: str) -> str:
    """The gain of the arm of that method alone, else of the first one with it, in a few words."""
    rows = [] if results is None else [row for row in results["arms"][1:] if name.lower() in parts(row["arm"])]
    if not rows:
        return "not measured"
    row = next((row for row in rows if row["arm"].lower() == name.lower()), rows[0])
    where = "" if row["arm"].lower() == name.lower() else f" ({row['arm']})"
    return f"{row['gain_mean']:+.2f}{where}"


def parts(arm: str) -> set[str]:
    """Names in the name of an arm: `UET+FGD, sum` → uet, fgd, sum."""
    return set(re.findall(r"[a-z]+", arm.lower()))


def with_tables(page: Path) -> str:
    """The text of a page with the tables that a benchmark wrote as Markdown."""
    text = page.read_text(encoding="utf-8")
    for block, name in TABLES:
        text = filled(text, block, f"{GAINS.with_name(name).read_text(encoding='utf-8').strip()}\n")
    return text


def with_reference(page: Path) -> str:
    """The text of docs/recipe.md with the reference as the settings have it."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{reference()}{END}{rest.partition(END)[2]}"


def generated() -> dict[Path, str]:
    """Every document with generated parts, and its text as it should be."""
    pages = {REFERENCE: with_reference(REFERENCE)}
    pages |= {page: with_figures(page) for page in PAGES}
    return pages | {BENCHMARKS: with_tables(BENCHMARKS)}


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
