"""Runtimes that people ship to, in an environment that has them: `make test-runtimes`. Elsewhere nothing is collected.

The run ends with the table that docs/runtimes.md shows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from deploy.core.errors import UserError
from deploy.core.files import ONNX_SUFFIX
from deploy.targets.make import make_for
from deploy.targets.table import place_for
from tests.runtimes.matrix import PRECISIONS, ROWS, RUNTIMES, table

PACKAGES = (
    "MNN",
    "ai_edge_litert",
    "ai_edge_quantizer",
    "coremltools",
    "ncnn",
    "openvino",
    "pnnx",
    "tract",
    "tvm",
    "websockets",
)
there = all(find_spec(name) for name in PACKAGES) and shutil.which("onnx2tf")
collect_ignore_glob = [] if there else ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if ROWS:
        terminalreporter.section("a file in each runtime")
        for line in table():
            terminalreporter.write_line(line)


def compress(*words: str | Path, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "compress", *map(str, words)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The exported files by precision. RUNTIMES_STUDENT: folder of a quickstart run that is there already."""
    folder = tmp_path_factory.mktemp("matrix")
    run = os.environ.get("RUNTIMES_STUDENT")
    if run is None:
        compress("quickstart", folder=folder)
    student = Path(run) / "student.safetensors" if run else folder / "runs/quickstart/student.safetensors"
    compress("export", student, "--precision", ",".join(PRECISIONS), "--out", folder / "student.onnx", folder=folder)
    return {name: folder / f"student{'' if name == 'fp32' else f'.{name}'}{ONNX_SUFFIX}" for name in PRECISIONS}


@pytest.fixture(scope="session")
def made(files: dict[str, Path]) -> dict[tuple[str, str], Path | str]:
    """(runtime, precision) → the file, or why there is none."""
    found: dict[tuple[str, str], Path | str] = {}
    for precision, source in files.items():
        for runtime in RUNTIMES:
            place = place_for(source, runtime)
            try:
                make_for(runtime, source, place)
                found[runtime, precision] = place
            except UserError as error:
                found[runtime, precision] = str(error).partition(f"{source}: ")[2] or str(error)
    return found


@pytest.fixture(scope="session")
def labels(files: dict[str, Path]) -> Path:
    """COCO labels of the 300 validation images, which lie in `images` beside them."""
    (found,) = next(iter(files.values())).parent.glob("runs/data/*/val.json")
    return found


@pytest.fixture(scope="session")
def measured(
    files: dict[str, Path], made: dict[tuple[str, str], Path | str], labels: Path
) -> dict[Path, dict[str, Any]]:
    """File → mAP, agreement with the same file in ONNX Runtime, p50 of an image."""
    folder = next(iter(files.values())).parent
    found: dict[Path, dict[str, Any]] = {}
    for precision, source in files.items():
        others = [path for (_, kind), path in made.items() if kind == precision and isinstance(path, Path)]
        given = ["--data", labels, "--images", labels.parent / "images", "--max-map-drop", "5"]
        compress("validate", source, *others, "--reference", source, *given, "--json", "v.json", folder=folder)
        compress("benchmark", source, *others, "--batch", "1", "--seconds", "3", "--json", "b.json", folder=folder)
        cells = json.loads((folder / "b.json").read_text())["cells"]
        p50 = {cell["runner"]: cell["latency_ms"]["p50"]["value"] for cell in cells if cell["scope"] == "end_to_end"}
        for path, row in zip([source, *others], json.loads((folder / "v.json").read_text()), strict=True):
            found[path] = {**row, "p50": p50[str(path)]}
    return found
