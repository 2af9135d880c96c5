"""The trained quickstart student in every runtime: its mAP on 300 images, or the refusal that the documents give."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.core.card import Form, network_precision, scanned_card
from deploy.core.errors import UserError
from deploy.graph.form import reform
from deploy.targets import litert, own_int8
from deploy.targets.make import make_for
from deploy.targets.table import REFUSED, TARGETS, check_refusals
from tests.runtimes.matrix import MOST, PRECISIONS, ROWS, RUNTIMES, Row


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
        with pytest.raises(UserError) as refused:
            check_refusals(runtime, files[precision], precision)
        assert str(refused.value) == f"{files[precision]}: {path}", "made says it for another reason"
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
    monkeypatch.setitem(TARGETS, "ncnn", replace(TARGETS["ncnn"], refusals=()))
    with pytest.raises(UserError, match="ncnn cannot run what pnnx makes of it: ncnn cannot load it"):
        make_for("ncnn", files["int8"], tmp_path / "student.ncnn.param")
    assert not list(tmp_path.iterdir())


def test_ncnn_would_compute_half_in_float(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal of an fp16 file: with fixed shapes, as the network alone has them, its layers take float32."""
    monkeypatch.setitem(TARGETS, "ncnn", replace(TARGETS["ncnn"], refusals=()))
    with pytest.raises(UserError, match="its network alone would compute in fp32"):
        make_for("ncnn", files["fp16"], tmp_path / "student.ncnn.param")
    assert "16" not in network_precision(reform(files["fp16"], tmp_path / "fixed.onnx", Form(batch=1)).precision)


def test_coremltools_reads_no_onnx(files: dict[str, Path]) -> None:
    """The refusal of --for coreml."""
    import coremltools

    with pytest.raises(ValueError, match="source"):
        coremltools.convert(str(files["fp32"]), source="onnx")
    assert "no ONNX file" in REFUSED["coreml"]


def test_mnn_answers_with_nothing(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why an int8 file is made of the float one: of ours one is made, and then not written, since it finds nothing."""
    monkeypatch.setattr(own_int8, "float_beside", lambda source, *_: source)
    monkeypatch.setattr(own_int8, "quantized_card", lambda source, *_: scanned_card(source))
    with pytest.raises(UserError, match="MNN gave 0 outputs, not 4"):
        make_for("mnn", files["int8"], tmp_path / "student.mnn")
    assert not list(tmp_path.iterdir())


def test_mnn_installs_nothing(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapper of its converter would call pip, and then report to a server."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pip").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    (tmp_path / "bin" / "pip").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    make_for("mnn", files["fp32"], tmp_path / "student.mnn")
    assert (tmp_path / "student.mnn").is_file() and not (tmp_path / "called").exists()


def test_litert_gains_nothing_by_half(
    files: dict[str, Path], made: dict[tuple[str, str], Path | str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal of fp16. Without it a file is made that is as large as that of the fp32 file, or one that is not
    written, since it finds nothing: both were seen of onnx2tf 1.29."""
    monkeypatch.setitem(TARGETS, "litert", replace(TARGETS["litert"], refusals=()))
    place, full = tmp_path / "student.tflite", made["litert", "fp32"]
    assert isinstance(full, Path)
    try:
        make_for("litert", files["fp16"], place)
    except UserError as error:
        assert "the file for litert finds 0% of what this one finds" in str(error) and not list(tmp_path.iterdir())
    else:
        assert place.stat().st_size > 0.95 * full.stat().st_size


def test_litert_takes_no_quantized_nodes(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why an int8 file is made of the float one: of ours onnx2tf makes one, and it is then not written, since it finds
    nothing (1.29) or LiteRT cannot load it (2.6)."""
    monkeypatch.setattr(own_int8, "float_beside", lambda source, *_: source)
    monkeypatch.setattr(own_int8, "quantized_card", lambda source, *_: scanned_card(source))
    monkeypatch.setattr(litert, "_quantize", shutil.move)
    with pytest.raises(UserError, match=r"the file for litert finds 0%|LiteRT cannot load it"):
        make_for("litert", files["int8"], tmp_path / "student.tflite")
    assert not list(tmp_path.iterdir())
