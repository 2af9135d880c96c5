"""Which runner a file gets, which options reach it, and a user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.core.errors import UserError
from deploy.runtimes import open as table
from deploy.runtimes.base import DetectionBatch
from deploy.runtimes.onnx import OnnxRunner
from deploy.runtimes.open import RUNNERS, open_runner, open_runners, readable_file, runner_options
from tests.helpers.fake_runners import TINY_CARD

ONNX, ENGINE = Path("a.onnx"), Path("b.engine")


class OwnRunner:
    """A user's runner; it finds nothing."""

    card, backend, on_cpu = TINY_CARD, "mine", True

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        n = len(images)
        return DetectionBatch(
            np.zeros((n, 1, 4), np.float32), np.zeros((n, 1), np.float32), np.zeros((n, 1), int), np.zeros(n, int)
        )


class Incomplete(OwnRunner):
    card = None  # type: ignore[assignment]


def test_each_file_gets_the_options_of_its_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {}
    for suffix, kind in RUNNERS.items():

        def note(path: Path, providers: tuple[str, ...], **options: Any) -> None:
            opened[path.name] = (providers, options)

        monkeypatch.setitem(RUNNERS, suffix, table.RunnerKind("", note, kind.has_providers, options=kind.options))
        (tmp_path / f"m{suffix}").touch()
    files = [tmp_path / "m.onnx", tmp_path / "m.engine"]
    runners = open_runners(files, ("cuda", "cpu"), threads=2, cuda_graph=True)
    assert list(runners) == [f"{files[0]} (cuda)", f"{files[0]} (cpu)", str(files[1])]
    onnx = {"allow_fallback": False, "threads": 2, "tensorrt": None, "openvino": None}
    assert opened == {"m.onnx": (("cpu",), onnx), "m.engine": (("cuda",), {"cuda_graph": True})}


@pytest.mark.parametrize(
    ("files", "providers", "options", "refusal"),
    [
        ([ONNX], ("cpu",), {"ep_context": True}, "--ep-context: is about .onnx files on the TensorRT provider"),
        ([ENGINE], ("tensorrt",), {"trt_cache": Path("c")}, "--trt-cache: is about .onnx files on the TensorRT"),
        ([ONNX], ("cpu",), {"openvino_streams": 2}, "--openvino-streams: is about files in OpenVINO"),
        ([ENGINE], ("openvino",), {"openvino_cache": Path("c")}, "--openvino-cache: is about files in OpenVINO"),
        ([ONNX], ("tensorrt",), {"cuda_graph": True}, "--cuda-graph: is about engines, and none is given"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    files: list[Path], providers: tuple[str, ...], options: dict[str, Any], refusal: str
) -> None:
    with pytest.raises(UserError, match=refusal):
        runner_options(files, providers, **options)
    assert runner_options([ONNX, ENGINE], ("tensorrt", "openvino-gpu"), **options) != {}


def test_files_that_cannot_be_opened(tmp_path: Path, tiny_onnx: Path) -> None:
    (tmp_path / "m.pt").touch()
    for files, message in (
        ([tmp_path / "none.onnx"], "no such file"),
        (
            [tmp_path / "m.pt"],
            r"m.pt: ends in none of .onnx, .xml, .engine, .mnn, .ncnn.param, .tflite; make one with compress export",
        ),
        ([tiny_onnx, tiny_onnx], "given twice"),
    ):
        with pytest.raises(UserError, match=message):
            open_runners(files)


def test_a_runner_of_ones_own(tiny_onnx: Path, tmp_path: Path) -> None:
    for runner in (OwnRunner, f"{__name__}:OwnRunner"):
        made = open_runner(tiny_onnx, runner=runner)
        assert made.backend == "mine" and made.path == tiny_onnx  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="runner: Incomplete: its attribute 'card' must be a ModelCard"):
        open_runner(tiny_onnx, runner=Incomplete)
    with pytest.raises(UserError, match=r"runner: cannot import nosuch: no such module"):
        open_runner(tiny_onnx, runner="nosuch:Runner")
    with pytest.raises(UserError, match="no such file"):
        open_runner(tmp_path / "none", runner=OwnRunner)
    with pytest.raises(UserError, match="runner: dict cannot be built: TypeError: 'PosixPath' object is not iterable"):
        open_runner(tiny_onnx, runner=dict)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"runner: .* is no class or function that opens a file"):
        open_runner(tiny_onnx, runner="os:name")


def test_only_onnx_files_are_read_value_by_value(tiny_onnx: Path) -> None:
    assert readable_file(OnnxRunner(tiny_onnx, threads=1)) == tiny_onnx
    assert readable_file(OwnRunner(ENGINE)) is None
    assert readable_file(OwnRunner("a.onnx")) is None  # type: ignore[arg-type]
