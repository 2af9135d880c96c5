"""The documents say what the program does: references and figures are generated, and shown commands exist.

`python -m tests.test_docs` writes the generated parts again: the reference in docs/recipe.md after a change of
`compress/config/`, and the figures in docs/methods after a run of the benchmark.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from compress import cli, config
from compress.config.base import Settings
from compress.config.messages import own_parts_in
from compress.config.methods import Adapted, Methods, Term
from compress.config.recipe import Recipe, TeacherFile, load_recipe
from compress.config.teacher import Source
from deploy.core.errors import UserError
from deploy.core.files import write_text

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
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


def test_the_reference_is_that_of_the_recipe() -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    written = text.partition(BEGIN)[2].partition(END)[0]
    assert written.strip() == reference().strip(), "docs/recipe.md is old; run: python -m tests.test_docs"


def test_every_setting_is_in_the_reference() -> None:
    """Against the generator's own mistakes: a settings class that nobody reaches, a field without a word."""
    modules = [import_module(found.name) for found in iter_modules(config.__path__, "compress.config.")]
    known = [value for module in modules for value in vars(module).values()]
    classes = [c for c in known if isinstance(c, type) and issubclass(c, Settings)]
    documented = {model for _, model in sections(Recipe, "")}
    made_of = {Settings, Term, Adapted, Source}
    assert documented | made_of == {*classes} - {TeacherFile}
    text = reference()
    for model in documented:
        for name, field in model.model_fields.items():
            assert f"| `{name}` |" in text and field.description, f"{model.__name__}.{name} says nothing"


# ---------------------------------------------------------------------------------- the figures of the methods


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
        assert table, f"{page} has no table of methods"
        row = re.compile(r"^(\| \[(\w+)\].*\|)[^|]*\|$", re.MULTILINE)
        cells = row.sub(lambda match: f"{match[1]} {gain_of(results, match[2])} |", table[1])
        text = filled(text, "which", cells)
    return text


def filled(text: str, name: str, block: str) -> str:
    """`text` with `block` between the comments of that name."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->\n)"
    text, count = re.subn(pattern, lambda match: f"{match[1]}{block}{match[2]}", text, flags=re.DOTALL)
    assert count == 1, f"one block of {name}, not {count}"
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


PAGES = sorted(METHODS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_figures_are_those_of_the_benchmark(page: Path) -> None:
    old = f"{page.relative_to(ROOT)} has other figures than the benchmark; run: python -m tests.test_docs"
    assert page.read_text(encoding="utf-8") == with_figures(page), old


def with_tables(page: Path) -> str:
    """The text of a page with the tables that a benchmark wrote as Markdown."""
    text = page.read_text(encoding="utf-8")
    for block, name in TABLES:
        text = filled(text, block, f"{GAINS.with_name(name).read_text(encoding='utf-8').strip()}\n")
    return text


def test_the_tables_are_those_of_the_benchmark() -> None:
    old = "benchmarks/README.md has other tables than the results; run: python -m tests.test_docs"
    assert BENCHMARKS.read_text(encoding="utf-8") == with_tables(BENCHMARKS), old


def test_every_method_has_a_page_and_a_row() -> None:
    assert {page.stem for page in PAGES} == {*Methods.model_fields, "README"}
    table = INDEX.read_text(encoding="utf-8").partition("<!-- which -->")[2].partition("<!-- /which -->")[0]
    assert {name.lower() for name in re.findall(r"^\| \[(\w+)\]", table, re.MULTILINE)} == {*Methods.model_fields}


def test_figures_of_made_up_results(tmp_path: Path) -> None:
    def row(arm: str, mean: float, gain: float, seconds: float, **more: float) -> dict[str, Any]:
        return {"arm": arm, "settings": [], "map_mean": mean, "gain_mean": gain, "seconds_mean": seconds, **more}

    spread = {"map_stdev": 0.5, "gain_stdev": 0.6, "gain_low": 1.25, "gain_high": 3.75}
    results = {
        "date": "2030-01-02",
        "command": "python -m benchmarks distill_gain cpu",
        "machine": {"cpu": "a processor", "cores": 2},
        "seeds": [0, 1, 2],
        "arms": [
            row("baseline", 20, 0, 50, map_stdev=0.4, gain_low=0, gain_high=0),
            row("inherit only", 21, 1, 50),
            row("BCKD+FGD", 24, 4, 75),
            row("FGD", 22.5, 2.5, 60, **spread) | {"settings": ["methods.fgd.weight=3"]},
            row("LD", 19, -1, 55),
        ],
    }
    shown = figures(results, "fgd")
    assert "| FGD | 22.50 ± 0.50 | +2.50 | +1.25 to +3.75 | `methods.fgd.weight=3` |" in shown
    assert "| baseline | 20.00 ± 0.40 |  |  |" in shown and "| BCKD+FGD | 24.00 | +4.00 |  |" in shown
    assert "| inherit only | 21.00 | +1.00 |" in shown and "| LD |" not in shown and "seeds 0, 1, 2" in shown
    assert figures(results, "dkd") == "Not among the arms of `python -m benchmarks distill_gain cpu` of 2030-01-02.\n"
    assert all(arm["arm"] in figures(results, None) for arm in results["arms"])
    assert figures(None, "fgd") == "Not measured yet: `python -m benchmarks distill_gain cpu`.\n"
    assert [gain_of(results, name) for name in ("FGD", "BCKD", "LD", "DKD")] == [
        "+2.50", "+4.00 (BCKD+FGD)", "-1.00", "not measured"
    ]  # fmt: skip
    assert gain_of(None, "FGD") == "not measured"
    path = tmp_path / "gains.json"
    path.write_text(json.dumps(results))
    index = with_figures(INDEX, path)
    assert re.search(r"^\| \[FGD\]\(fgd\.md\) \|.*\| \+2\.50 \|$", index, re.MULTILINE)
    assert re.search(r"^\| \[DKD\].*\| not measured \|$", index, re.MULTILINE)


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
    whole = {
        "name": "shown",
        "data": {"synthetic": {"train": 8, "val": 8}, "short": 160},
        "student": {"backbone": "nano"},
        "teacher": {"checkpoint": "teacher.safetensors"},
        "train": {"epochs": 1},
    }
    shown = yaml.safe_load(block)
    rest = {} if "name" in shown else {key: value for key, value in whole.items() if key not in shown}
    if "teachers" in shown.get("pseudo_labels", {}):
        rest.pop("teacher", None)  # nobody would learn from it
    path = tmp_path / "recipe.yaml"
    path.write_text(block + "".join(f"{key}: {json.dumps(value)}\n" for key, value in rest.items()))
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
    """`compress/training/loop.py` in running text is a file of this repository."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    pattern = r"`((?:compress|deploy|kernels|tests|benchmarks|recipes|docs)/[\w/.-]*\.(?:py|yaml|json|md|j2))`"
    for name in re.findall(pattern, text):
        assert (ROOT / name).is_file(), f"{name} is not there"


if __name__ == "__main__":
    before, _, rest = REFERENCE.read_text(encoding="utf-8").partition(BEGIN)
    write_text(REFERENCE, f"{before}{BEGIN}\n{reference()}{END}{rest.partition(END)[2]}")
    for page in PAGES:
        write_text(page, with_figures(page))
    write_text(BENCHMARKS, with_tables(BENCHMARKS))
