"""The laws of the house: imports go down only, nothing heavy where it is not needed, rooms and files of a size."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "deploy", "compress")

ROOMS = {
    "kernels": [("csrc",), ("common",), ("triton",), ("ops",)],
    "deploy": [
        ("core",),
        ("graph",),
        ("tensorrt",),
        ("runtimes",),
        ("validate", "latency"),
        ("quantize",),
        ("serve", "targets"),
        ("predict",),
        ("model",),
    ],
    "compress": [
        ("versions", "console", "manifest"),
        ("config", "data"),
        ("detectors",),
        ("distill",),
        ("teachers", "export", "prune"),
        ("training",),
        ("pseudo", "report"),
        ("run",),
        ("api", "doctor"),
        ("cli",),
    ],
}
"""Folders and loose modules of each package from the ground up: an import leads to the same line or to one above it."""

# The whole of a package may import of the others:
MAY_IMPORT = {"kernels": set(), "deploy": set(), "compress": {"kernels", "deploy"}}
HEAVY = {"torch", "torchvision", "lightning", "onnxscript", "safetensors", "triton"}


@dataclass(frozen=True)
class Import:
    line: int
    name: str
    """Full name of the module, or of what is taken from it."""
    at_top: bool
    """Executed when the importing module is."""


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    """Everything that a file imports: at the top, inside functions, and for type checkers only (not `at_top`)."""
    found: list[Import] = []

    def visit(node: ast.AST, at_top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(node.lineno, alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            found.extend(Import(node.lineno, f"{base}.{alias.name}", at_top) for alias in node.names)
        elif (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)) or isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        ):
            at_top = False
        for child in ast.iter_child_nodes(node):
            visit(child, at_top)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return tuple(found)


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in files(*PACKAGES)}


def imported_module(name: str) -> str | None:
    """The module of ours that an imported name is, or lies in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def edges(*, top: bool) -> Iterator[tuple[str, str, str]]:
    """(where, importing module, imported module) within our packages; of what is executed at the top, or of all."""
    for module, path in MODULES.items():
        for found in imports_of(path):
            target = imported_module(found.name)
            if target is not None and target != module and (found.at_top or not top):
                yield f"{path.relative_to(ROOT)}:{found.line}", module, target


def room_of(module: str) -> str | None:
    """`compress.data.coco` → `data`; None of the package itself and of `__main__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__main__" else None


def listed(found: Iterable[str]) -> str:
    return "\n" + "\n".join(found)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's strongly connected components of more than one node)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


# ------------------------------------------------------------------------------------------------- directions


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"d"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_those_below(package: str) -> None:
    found = [
        f"{where} imports {target}"
        for where, module, target in edges(top=False)
        if module.split(".")[0] == package and target.split(".")[0] not in {package, *MAY_IMPORT[package]}
    ]
    assert not found, listed(found)


def test_kernels_import_only_torch() -> None:
    allowed = {"torch", "triton", "kernels"} | set(sys.stdlib_module_names)
    assert breaches(files("kernels"), lambda name: name.split(".")[0] not in allowed) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_has_its_place(package: str) -> None:
    """A new folder or module must be put into ROOMS."""
    there = {room_of(module) for module in MODULES if module.split(".")[0] == package} - {None}
    assert there <= {room for level in ROOMS[package] for room in level}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_down(package: str) -> None:
    rank = {room: level for level, rooms in enumerate(ROOMS[package]) for room in rooms}
    found = []
    for where, module, target in edges(top=False):
        if module.split(".")[0] == target.split(".")[0] == package:
            low, high = room_of(target), room_of(module)
            if low is not None and high is not None and rank[low] > rank[high]:
                found.append(f"{where}: {high} imports {target}")
    assert not found, listed(found)


def test_no_circle_of_rooms() -> None:
    graph: dict[str, set[str]] = {}
    for _, module, target in edges(top=False):
        rooms = [f"{name.split('.')[0]}/{room_of(name)}" for name in (module, target)]
        if None not in (room_of(module), room_of(target)) and rooms[0] != rooms[1]:
            graph.setdefault(rooms[0], set()).add(rooms[1])
    assert len(graph) > 10 and circles(graph) == []


def test_no_circle_of_modules() -> None:
    graph: dict[str, set[str]] = {}
    for _, module, target in edges(top=True):
        graph.setdefault(module, set()).add(target)
    assert len(graph) > 100 and circles(graph) == []


def test_nothing_imports_the_command_line() -> None:
    inside = ("compress.cli", "compress.__main__")
    found = [
        f"{where} imports {target}"
        for where, module, target in edges(top=False)
        if target.startswith("compress.cli") and not module.startswith(inside)
    ]
    assert not found, listed(found)


HOLDERS = {f"compress/run/{name}.py" for name in ("pipeline", "plans", "dry_run", "starter")}


def test_only_run_and_cli_name_a_recipe() -> None:
    """`config/` defines it; the face takes one in."""
    allowed = {"config", "run", "cli", "api"}
    found = [
        f"{path.relative_to(ROOT)}"
        for path in files("compress")
        if room_of(module_of(path)) not in {*allowed, None} and names(path, "Recipe")
    ]
    assert not found, listed(found)


def test_only_pipeline_and_dry_run_hold_a_recipe() -> None:
    """Everything else in `run/` takes its sections."""
    found = [
        str(path.relative_to(ROOT))
        for path in files("compress/run")
        if str(path.relative_to(ROOT)) not in HOLDERS and names(path, "Recipe")
    ]
    assert not found, listed(found)


def names(path: Path, name: str) -> bool:
    """Whether the code of a file (not its texts) names something."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(
        (isinstance(node, ast.Name) and node.id == name)
        or (isinstance(node, ast.Attribute) and node.attr == name)
        or (isinstance(node, ast.alias) and node.name == name)
        for node in ast.walk(tree)
    )


# -------------------------------------------------------------------------------------------- what is loaded


def breaches(paths: list[Path], forbidden: object) -> list[str]:
    """Imports of `paths` whose name is `forbidden` (a set of top-level packages, or a predicate of the full name)."""
    test = forbidden if callable(forbidden) else lambda name: name.split(".")[0] in forbidden  # type: ignore[operator]
    assert paths
    return [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.name}"
        for path in paths
        for found in imports_of(path)
        if test(found.name)
    ]


def test_config_and_deploy_import_no_torch() -> None:
    plain = [path for path in files("deploy", "compress/config") if path.parent.name != "graph"]
    assert breaches(plain, HEAVY) == []
    exporter = [where for where in breaches(files("deploy/graph"), HEAVY) if "/export.py:" not in where]
    assert exporter == []
    assert breaches(plain, lambda name: name.startswith("deploy.graph.export")) == []


def loaded(code: str) -> set[str]:
    """Top-level packages in memory after running `code` in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(answer.stdout.splitlines()[-1].split())


def test_deploy_runs_without_torch() -> None:
    modules = [name for name in MODULES if name.startswith("deploy") and name != "deploy.graph.export"]
    everything = loaded("\n".join(f"import {module}" for module in modules))
    assert "deploy" in everything
    assert everything & {*HEAVY, "compress", "kernels"} == set()


LIGHT = {*HEAVY, "onnx", "onnxruntime", "numpy", "PIL", "yaml"}
"""What the first answer of the program does without."""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["validate", "--help"], ["data", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"from compress.cli import main\ntry:\n    main({arguments!r})\nexcept SystemExit:\n    pass"
    assert loaded(code) & LIGHT == set()


def test_the_face_loads_nothing_heavy() -> None:
    assert loaded("import compress, deploy\ndir(compress), compress.__version__") & LIGHT == set()


def test_the_recipe_loads_without_torch() -> None:
    assert loaded("import compress.config.recipe") & HEAVY == set()


# ------------------------------------------------------------------------------------------------------ sizes

MOST = {"compress": (13, 5), "deploy": (10, 2)}  # folders, loose modules (the package's own two files do not count)
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 500, 80
EVERYTHING = ("compress", "deploy", "kernels", "benchmarks", "examples", "docs", "tests")
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS = {
    "kernels/triton/feature_distance.py::_backward_kernel": "one kernel: what it calls is inlined, not separate",
    "kernels/triton/iou_loss.py::iou_and_gradients": "one derivation, with the formula's names",
}
"""Exceptions, each with its reason."""


@pytest.mark.parametrize("package", MOST)
def test_few_rooms_and_loose_modules(package: str) -> None:
    here = [path for path in (ROOT / package).iterdir() if path.name != "__pycache__"]
    folders = sorted(path.name for path in here if path.is_dir())
    loose = sorted(path.name for path in here if path.suffix == ".py" and not path.name.startswith("__"))
    most_folders, most_loose = MOST[package]
    assert len(folders) <= most_folders, folders
    assert len(loose) <= most_loose, loose


def test_no_long_file() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_bytes().splitlines()) for path in existing()}
    long = {name: lines for name, lines in lengths.items() if lines > MOST_LINES}
    assert set(long) <= set(LONG_FILES), listed(f"{name}: {lines} lines" for name, lines in long.items())
    assert set(LONG_FILES) <= set(long), "an exception that is not needed"


def test_no_long_function() -> None:
    """Lengths count from `def` to the last line."""
    long: dict[str, int] = {}
    for path in existing():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    long[f"{path.relative_to(ROOT)}::{node.name}"] = lines
    assert set(long) <= set(LONG_FUNCTIONS), listed(f"{name}: {lines} lines" for name, lines in long.items())
    assert set(LONG_FUNCTIONS) <= set(long), "an exception that is not needed"


def existing() -> list[Path]:
    return [path for folder in EVERYTHING if (ROOT / folder).is_dir() for path in files(folder)]


# ------------------------------------------------------------------------------------------------------ tests


def test_no_test_imports_a_test() -> None:
    """What two tests share is in tests/helpers. Programs in strings are seen too."""
    pattern = re.compile(
        r"^\s*(from tests[\w.]*\.test_\w+ import|from tests[\w.]* import .*\btest_\w+|import tests[\w.]*\.test_)"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files("tests")
        if path.parent.name != "samples"  # programs of older versions
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.match(line)
    ]
    assert len(files("tests")) > 100 and found == []


def test_no_example_has_a_deadline() -> None:
    """The profile of tests/conftest.py has none; a test that sets one fails on a slow machine."""
    from hypothesis import settings

    assert settings.default is not None and settings.default.deadline is None
    pattern = re.compile(r"@settings\([^)]*\bdeadline\b")
    assert [str(path) for path in files("tests") if pattern.search(path.read_text(encoding="utf-8"))] == []
