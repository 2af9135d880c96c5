"""The trained quickstart student in every runtime: its mAP on 300 images, or the refusal that the documents give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.core.errors import UserError
from deploy.core.files import ONNX_SUFFIX
from deploy.targets import litert, mnn, ncnn
from deploy.targets.make import make_for
from deploy.targets.table import REFUSED, TARGETS, place_for
from tests.runtimes.matrix import ROWS, Row

PRECISIONS = ("fp32", "fp16", "int8")
MOST = {"fp32": 0.1, "fp16": 0.1, "int8": 0.5}
"""Points of mAP that a file may be away from the same file in ONNX Runtime."""
RUNTIMES = [name for name, target in TARGETS.items() if target.runs]


def compress(*words: str | Path, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "compress", *map(str, words)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The exported files by precision. RUNTIMES_STUDENT: folder of a quickstart run that is there already."""
    folder = tmp_path_factory.mktemp("matrix")
    run = os.environ.get("RUNTIMES_STUDENT")
    if run is None:
        compress("quickstart", folder=folder)
    student = Path(run) / "student.safetensors" if run else folder / "runs/quickstart/student.safetensors"
    compress("export", student, "--precision", ",".join(PRECISIONS), "--out", folder / "student.onnx", folder=folder)
    return {name: folder / f"student{'' if name == 'fp32' else f'.{name}'}{ONNX_SUFFIX}" for name in PRECISIONS}


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def measured(files: dict[str, Path], made: dict[tuple[str, str], Path | str]) -> Iterator[dict[Path, dict[str, Any]]]:
    """File → mAP, agreement with the same file in ONNX Runtime, p50 of an image."""
    folder = next(iter(files.values())).parent
    (labels,) = folder.glob("runs/data/*/val.json")
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
    yield found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_map_is_onnx_runtimes(
    runtime: str,
    precision: str,
    files: dict[str, Path],
    made: dict[tuple[str, str], Path | str],
    measured: dict[Path, dict[str, Any]],
) -> None:
    if isinstance(path := made[runtime, precision], str):
        ROWS.append(Row(runtime, precision, refused=path))
        assert precision != "fp32" and runtime in {"litert", "ncnn", "mnn" if precision == "int8" else ""}
        return
    here, there = measured[path], measured[files[precision]]
    assert here["images"] == 300
    drop = there["metrics"]["map"] - here["metrics"]["map"]
    agreement, times = here["agreement"]["share"], here["p50"] / there["p50"]
    ROWS.append(Row(runtime, precision, here["metrics"]["map"], drop, agreement, times))
    assert abs(drop) <= MOST[precision]


def test_ncnn_cannot_load_quantized_nodes(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal of an int8 file: without it, the file is made and then not written."""
    monkeypatch.setattr(ncnn, "_refuse_int8", lambda *_: None)
    with pytest.raises(UserError, match="ncnn cannot run what pnnx makes of it: ncnn cannot load it"):
        make_for("ncnn", files["int8"], tmp_path / "student.ncnn.param")
    assert not list(tmp_path.iterdir())


def test_coremltools_reads_no_onnx(files: dict[str, Path]) -> None:
    """The refusal of --for coreml."""
    import coremltools

    with pytest.raises(ValueError, match="source"):
        coremltools.convert(str(files["fp32"]), source="onnx")
    assert "no ONNX file" in REFUSED["coreml"]


def test_mnn_answers_with_nothing(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal of an int8 file: without it, the file is made and then not written, since it finds nothing."""
    monkeypatch.setattr(mnn, "_refuse_int8", lambda *_: None)
    with pytest.raises(UserError, match="MNN gave 0 outputs, not 4"):
        make_for("mnn", files["int8"], tmp_path / "student.mnn")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_litert_finds_nothing(
    precision: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal of what is not fp32: without it, the file is made and then not written."""
    monkeypatch.setattr(litert, "_refuse_others", lambda *_: None)
    with pytest.raises(UserError, match="the file for litert finds 0% of what this one finds"):
        make_for("litert", files[precision], tmp_path / "student.tflite")
    assert not list(tmp_path.iterdir())
