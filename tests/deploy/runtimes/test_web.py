"""Files in ONNX Runtime Web, in Node: ONNX Runtime's detections, and one line for what cannot be run."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from deploy.core.card import Form, card_from_file
from deploy.core.errors import UserError
from deploy.graph.form import reform, write_graph
from deploy.graph.precision import compute_in
from deploy.runtimes.open import open_runner
from deploy.runtimes.providers import openings
from deploy.runtimes.web import WebRunner
from tests.helpers.tiny_onnx import pictures
from tests.helpers.web_site import need_runtime

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed: its runtime is not tried")


@pytest.fixture(scope="module", autouse=True)
def runtime() -> None:
    need_runtime()


@pytest.fixture(scope="module")
def runner(tiny_onnx: Path) -> WebRunner:
    runner = open_runner(tiny_onnx, ("web",))
    assert isinstance(runner, WebRunner) and runner.on_cpu
    return runner


def same(onnx_file: Path, runner: WebRunner, count: int) -> None:
    wanted, found = open_runner(onnx_file, threads=1)(pictures(count)), runner(pictures(count))
    assert wanted.count.min() > 0
    for name, value in vars(wanted).items():
        assert getattr(found, name).dtype == value.dtype
        np.testing.assert_allclose(getattr(found, name), value, rtol=0, atol=2e-3 if name == "boxes" else 2e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_detections_are_onnx_runtimes(tiny_onnx: Path, runner: WebRunner, count: int) -> None:
    same(tiny_onnx, runner, count)


def test_other_forms(tiny_onnx: Path, tmp_path: Path) -> None:
    """Float pixels, int32 labels, and more images than the batch."""
    reform(tiny_onnx, tmp_path / "other.onnx", Form(batch=2, labels="int32", images="float32"))
    same(tiny_onnx, WebRunner(tmp_path / "other.onnx"), 3)


def test_what_cannot_be_run_is_one_line(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, card = onnx.load(str(tiny_onnx)), card_from_file(tiny_onnx)
    del model.graph.output[3:]
    write_graph(model, card, tmp_path / "three.onnx")
    with pytest.raises(UserError, match=r"three.onnx: not a deployable file: it gives no count"):
        WebRunner(tmp_path / "three.onnx")(pictures(1))
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, str(tmp_path / "odd.onnx"))
    with pytest.raises(UserError, match=r"odd.onnx: ONNX Runtime Web cannot run it: .*NoSuchOperator"):
        WebRunner(tmp_path / "odd.onnx")
    compute_in("bf16", tiny_onnx, tmp_path / "tiny.bf16.onnx")
    with pytest.raises(UserError, match=r"is bf16, which ONNX Runtime Web does not compute"):
        WebRunner(tmp_path / "tiny.bf16.onnx")
    with pytest.raises(UserError, match=r"provider 'web': is a runtime of its own"):
        open_runner(tiny_onnx, ("web", "cpu"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"provider web: there is no node on PATH"):
        WebRunner(tiny_onnx)


def test_a_process_that_ended_is_one_line(tiny_onnx: Path) -> None:
    runner = WebRunner(tiny_onnx)
    runner._process.kill()
    runner._process.wait()
    for _ in range(2):
        with pytest.raises(UserError, match=r"node ended, in the middle of its work"):
            runner(pictures(1))


def test_the_process_ends_with_the_runner(tiny_onnx: Path) -> None:
    runner = WebRunner(tiny_onnx)
    process = runner._process
    assert process.poll() is None
    del runner
    gc.collect()
    assert process.poll() is not None


def test_it_is_opened_alone() -> None:
    assert openings(["cpu", "web", "cuda"]) == [("cpu", "cuda"), ("web",)]
