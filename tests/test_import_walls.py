"""Imports go one way: compress → kernels, deploy; and only training needs torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {package: sorted((ROOT / package).rglob("*.py")) for package in ("kernels", "deploy", "compress")}
DEPLOY_MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in FILES["deploy"]
    if path.relative_to(ROOT) != Path("deploy/graph/export.py")
]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def breaches(package: str, forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in FILES[package]
        for line, name in imported(path)
        if name.split(".")[0] in forbidden
    ]


def test_kernels_import_only_torch() -> None:
    allowed = {"torch", "triton", "kernels"} | set(sys.stdlib_module_names)
    strangers = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in FILES["kernels"]
        for line, name in imported(path)
        if name.split(".")[0] not in allowed
    ]
    assert FILES["kernels"] and strangers == []


def test_deploy_knows_neither_compress_nor_kernels() -> None:
    assert FILES["deploy"] and breaches("deploy", {"compress", "kernels"}) == []


def test_only_the_export_imports_torch_in_deploy() -> None:
    found = breaches("deploy", {"torch", "torchvision", "lightning", "onnxscript"})
    assert [line for line in found if not line.startswith("deploy/graph/export.py:")] == []
    users = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in FILES["deploy"]
        for line, name in imported(path)
        if name.startswith("deploy.graph.export")
    ]
    assert users == []


def test_nothing_imports_the_command_line() -> None:
    users = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in FILES["compress"]
        for line, name in imported(path)
        if name.startswith("compress.cli") and path.name != "__main__.py" and path.parent.name != "cli"
    ]
    assert users == []


def test_only_the_pipeline_and_the_dry_run_hold_a_recipe() -> None:
    """Everything else takes its section, or a plan; the command line reads recipes and hands them on."""
    holders = {"compress/run/pipeline.py", "compress/run/dry_run.py"}
    naming = {
        file
        for path in FILES["compress"]
        if (file := path.relative_to(ROOT).as_posix()) and not file.startswith(("compress/config/", "compress/cli/"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if "Recipe" in (getattr(node, "id", ""), getattr(node, "attr", ""))
        or (isinstance(node, ast.ImportFrom) and any(alias.name in ("Recipe", "recipe") for alias in node.names))
        or (isinstance(node, ast.Import) and any(alias.name == "compress.config.recipe" for alias in node.names))
    }
    assert naming == holders


def loaded(code: str) -> set[str]:
    """Top-level packages in memory after running `code` in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return set(answer.stdout.splitlines()[-1].split())


def test_deploy_runs_without_torch() -> None:
    everything = loaded("\n".join(f"import {module}" for module in DEPLOY_MODULES))
    assert "deploy" in everything
    assert everything & {"torch", "torchvision", "lightning", "compress", "kernels"} == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["validate", "--help"], ["data", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"from compress.cli import main\ntry:\n    main({arguments!r})\nexcept SystemExit:\n    pass"
    heavy = {
        "torch",
        "torchvision",
        "lightning",
        "onnx",
        "onnxruntime",
        "numpy",
        "PIL",
        "yaml",
        "deploy.graph.export",
    }
    assert loaded(code) & heavy == set()


def test_the_recipe_loads_without_torch() -> None:
    assert "torch" not in loaded("import compress.config.recipe")


def test_no_test_imports_a_test() -> None:
    """What two tests share is in tests/helpers. Programs in strings are seen too."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    pattern = re.compile(
        r"^\s*(?:from tests[\w.]*\.test_\w+ import|from tests[\w.]* import .*\btest_\w+|import tests[\w.]*\.test_)"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.match(line)
    ]
    assert len(files) > 100 and found == []
