"""What is made of a checkpoint: names and formats of the files, engines of a run, runners of a user's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from compress.config import deploy as sections
from compress.config.deploy import Deploy
from compress.manifest import RunFolder, fingerprint
from compress.run import pipeline
from compress.run.artifacts import Checks, exported_settings, onnx_files
from deploy.core import cuda_driver
from deploy.core.card import card_from_file, network_precision
from deploy.core.precisions import PRECISIONS, PrecisionName, Target, file_for, sources
from deploy.runtimes.onnx import OnnxRunner
from deploy.runtimes.providers import PROVIDERS, openings
from deploy.tensorrt import card as engines
from tests.helpers import tiny_recipe
from tests.helpers.report_pages import Page

pytestmark = pytest.mark.usefixtures("few_rounds")

OUT = Path("runs/first/student.onnx")


class Mine(OnnxRunner):
    """A user's own runner."""

    @property
    def backend(self) -> str:
        return "mine"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run of these tests lies; each goes on with what the one before it made."""
    return tmp_path_factory.mktemp("artifacts")


def ship(folder: Path, *overrides: str) -> tuple[RunFolder, dict[str, dict[str, Any]]]:
    """The tiny run with these settings: its folder, and the rows of its report by file."""
    alone = ("teacher=null", "methods={}", "deploy.int8.images=8", "deploy.engines.optimization_level=0")
    kept = [text for text in alone if not text.startswith("deploy.engines") or any("engines" in o for o in overrides)]
    run = RunFolder(pipeline.run(tiny_recipe.recipe(folder, *overrides, *kept)))
    report = json.loads(run.report.read_text())
    return run, {row["file"]: row for row in report["artifacts"]}


# ------------------------------------------------------------------------------------------- names and formats


def test_one_list_of_precisions() -> None:
    assert get_args(PrecisionName) == tuple(PRECISIONS)
    assert {target for kind in PRECISIONS.values() for target in kind.targets} == set(get_args(Target))
    for name, kind in PRECISIONS.items():
        assert PRECISIONS[kind.source].source == kind.source, name
        assert (kind.quantized or kind.computed is not None) == (kind.source != name)
        assert set(kind.providers) <= set(PROVIDERS)
        assert engines.claimed_precision(file_for(OUT, name).name) == (None if name == "fp32" else name)


@pytest.mark.parametrize(
    ("precisions", "target", "wanted", "expected"),
    [
        (["fp32"], None, [], [("student.onnx", None, None)]),
        (["int8"], None, [], [("student.int8.onnx", "cpu", None)]),
        (["int8", "mixed"], "cpu", [], [("student.int8.onnx", "cpu", None), ("student.mixed.onnx", "tensorrt", None)]),
        (["fp16"], None, ["fp16"], [("student.fp16.onnx", None, "student.fp16.engine")]),
        (["bf16"], None, ["bf16"], [("student.bf16.onnx", None, None)]),
        (["int8"], "tensorrt", ["int8"], [("student.int8.onnx", "tensorrt", "student.int8.engine")]),
        (
            ["int8"],
            "cpu",
            ["int8"],
            [("student.int8.onnx", "cpu", None), ("student.int8.tensorrt.onnx", "tensorrt", "student.int8.engine")],
        ),
    ],
)
def test_an_engine_is_built_of_a_file_in_its_format(
    precisions: list[str], target: Target | None, wanted: list[str], expected: list[tuple[str, str | None, str | None]]
) -> None:
    files = onnx_files(OUT, precisions, target, wanted)
    assert [(f.path.name, f.target, f.engine.name if f.engine else None) for f in files] == expected
    assert len({file.stage for file in files}) == len(files)


def test_what_is_opened_together() -> None:
    assert openings(["cuda", "openvino", "cpu"]) == [("cuda", "cpu"), ("openvino",)]
    assert openings(["openvino", "openvino-gpu"]) == [("openvino",), ("openvino-gpu",)]
    assert openings(["cpu"]) == [("cpu",)]


def test_float_files_that_quantized_ones_need() -> None:
    assert sources(["mixed", "int8"]) == ["fp32", "fp16"]
    assert sources(["mixed"]) == ["fp16"]


def test_files_of_the_version_before_are_recognised() -> None:
    """What the manifest compares: keys that came later do not count, and neither do other files."""
    checks = Checks([], (64, 64), (64, 64))
    described = exported_settings(Deploy(), checks)
    assert fingerprint(described) == "31f37453eda5a04313159aaa30234d81d7b450d1d1f1290856db317dfde540a0"
    more = Deploy(precisions=("fp32", "int8"), engines=sections.Engines(), runners=("a.b:C",))
    assert exported_settings(more, checks) == described


# ---------------------------------------------------------------------------------------------------- a run


def test_a_run_without_tensorrt_says_why_there_is_no_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    run, rows = ship(folder, "deploy.engines={}")
    assert rows["student.onnx"]["gate"] == "pass"
    row = rows["student.engine"]
    assert row["gate"].startswith("not run: tensorrt is not installed: pip install")
    assert "map" not in row and "latency_ms" not in row
    assert row["gate"] in Page(run.page.read_text()).text


def test_a_run_builds_engines_and_reports_their_cards(folder: Path) -> None:
    pytest.importorskip("tensorrt", reason="tensorrt is not installed: python tests/trt_rig/install.py")
    settings = ("deploy.precisions=[fp32,fp16,int8]", "deploy.engines={batch: [1, 2, 4]}")
    run, rows = ship(folder, *settings)
    page = Page(run.page.read_text()).text
    assert {"student.int8.onnx", "student.int8.tensorrt.onnx"} < set(rows)
    assert card_from_file(run.path / "student.int8.tensorrt.onnx").quantization.target == "tensorrt"  # type: ignore[union-attr]
    for precision in ("fp32", "fp16", "int8"):
        engine = run.engine(precision)
        row, card = rows[engine.name], engines.read_engine_card(engine)
        assert (row["engine"]["engine_sha256"], row["engine"]["precision"]) == (card.engine_sha256, card.precision)
        assert row["engine"]["options"]["batches"] == [1, 2, 4] and row["size_mb"] > 0
        if cuda_driver.gpu() is None:
            assert row["gate"] == "not run: no GPU" and "map" not in row and "latency_ms" not in row
        assert engine.name in page and card.machine.version in page
    assert cuda_driver.gpu() is not None or "not run: no GPU" in page
    before = run.manifest.read_text()
    ship(folder, *settings)
    assert run.manifest.read_text() == before, "a second run builds nothing"


def test_a_run_measures_in_onnx_runtime_and_in_openvino(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row a runtime; a bf16 file has one in OpenVINO alone. What cannot run says why, and the rest goes on."""
    settings = ("deploy.precisions=[fp32,bf16]", "deploy.providers=[cpu,openvino]")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "openvino", None)
        _, rows = ship(folder, *settings)
    missing = "not run: openvino is not installed: pip install 'compress-detectors[openvino]'"
    assert [rows[name]["gate"] for name in ("student.onnx (openvino)", "student.bf16.onnx")] == [missing] * 2
    assert rows["student.onnx"]["gate"] == "pass" and rows["student.onnx"]["backend"] == "onnxruntime cpu"
    pytest.importorskip("openvino", reason="openvino is not installed: the extra openvino has it")
    run, rows = ship(folder, *settings)
    row, half = rows["student.onnx (openvino)"], rows["student.bf16.onnx"]
    assert (row["gate"], row["backend"], row["precision"]) == ("pass", "openvino cpu", "fp32")
    assert row["map"] == pytest.approx(rows["student.onnx"]["map"], abs=0.05) and row["latency_ms"]["p50"] > 0
    assert half["precision"] == "bf16" and "student.bf16.onnx (openvino)" not in rows
    assert "bfloat16, which the CPU here does not have" in half["gate"] or half["backend"] == "openvino cpu"
    assert network_precision(card_from_file(run.path / "student.bf16.onnx").precision) == "bf16"
    assert row["file"] in Page(run.page.read_text()).text


def test_a_runner_of_ones_own_is_a_row(folder: Path) -> None:
    path = f"{Mine.__module__}:{Mine.__qualname__}"
    _, rows = ship(folder, f"deploy.runners=['{path}']")
    ours, mine = rows["student.onnx"], rows["student.onnx (Mine)"]
    assert (mine["backend"], mine["gate"], mine["map"]) == ("mine", "pass", ours["map"])
    assert mine["latency_ms"]["p50"] > 0 and mine["size_mb"] == ours["size_mb"]
