"""The documents say what the program does: the reference is generated, and shown commands exist.

`python docs/generate.py` writes the generated parts again. (Figures: tests/benchmarks/test_tables.py.)
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from compress import cli, config
from compress.config.base import Settings
from compress.config.methods import Adapted, Methods, Term
from compress.config.prune import Cut
from compress.config.recipe import Recipe, TeacherFile, load_recipe
from compress.config.teacher import BOXES_ALONE, Source
from deploy.core.errors import UserError

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def program(path: Path) -> Any:
    """A program of the repository as a module."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docs = program(ROOT / "docs" / "generate.py")


# ------------------------------------------------------------------------------------ what is generated


@pytest.fixture(scope="module")
def generated() -> dict[Path, str]:
    return docs.generated()


@pytest.mark.parametrize("page", [docs.REFERENCE], ids=lambda page: str(page.relative_to(ROOT)))
def test_generated_parts_are_up_to_date(page: Path, generated: dict[Path, str]) -> None:
    assert page.read_text(encoding="utf-8") == generated[page], (
        f"{page.relative_to(ROOT)} is old; run: python docs/generate.py"
    )


def test_every_setting_is_in_the_reference() -> None:
    """Against the generator's own mistakes: a settings class that is not reached, a field without a word."""
    modules = [import_module(found.name) for found in iter_modules(config.__path__, "compress.config.")]
    known = [value for module in modules for value in vars(module).values()]
    classes = [c for c in known if isinstance(c, type) and issubclass(c, Settings)]
    documented = {model for _, model in docs.sections(Recipe, "")}
    made_of = {Settings, Term, Adapted, Source, Cut}
    assert documented | made_of == {*classes} - {TeacherFile}
    text = docs.reference()
    for model in documented:
        for name, field in model.model_fields.items():
            assert f"| `{name}` |" in text and field.description, f"{model.__name__}.{name} says nothing"


def test_every_method_has_a_page_and_a_row() -> None:
    pages = ROOT / "docs" / "methods"
    assert {page.stem for page in pages.glob("*.md")} == {*Methods.model_fields, "README"}
    table = (
        (pages / "README.md").read_text(encoding="utf-8").partition("<!-- which -->")[2].partition("<!-- /which -->")[0]
    )
    assert {*re.findall(r"^\| \[[^]]+\]\((\w+)\.md\)", table, re.MULTILINE)} == {*Methods.model_fields}


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
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
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
        "train": {"epochs": 12},
    }
    shown = yaml.safe_load(block)
    rest = {} if "name" in shown else {key: value for key, value in whole.items() if key not in shown}
    if "teachers" in shown.get("pseudo_labels", {}):
        rest.pop("teacher", None)  # no student would learn from it
    if {*shown} == {"teacher"} and {*shown["teacher"]} & {*BOXES_ALONE}:
        rest |= {"pseudo_labels": {}, "labels": {"fraction": 0.5}}
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


def test_every_difference_has_its_word_and_its_test() -> None:
    """A row of docs/differences.md says equal, aligned or corrected, and names functions that are there."""
    rows = re.findall(
        r"^\| (?!what |---).*$", (ROOT / "docs" / "differences.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(rows) > 30
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 6 and cells[3] in ("equal", "aligned", "corrected"), row
        held_by = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", cells[5])
        assert held_by, f"no test: {row}"
        for file, name in held_by:
            assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {name}"
