"""Files for other runtimes give ONNX Runtime's detections; what a runtime cannot take is refused in a line.

All of them together, with mAP of a trained student: `make test-runtimes`.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from deploy.core.card import PROCESSING, Form, Quantization, card_from_file
from deploy.core.errors import UserError
from deploy.graph.form import reform, write_graph
from deploy.graph.heads import cut_heads
from deploy.runtimes.open import open_runner
from deploy.targets import litert, ncnn, own_int8
from deploy.targets.make import make_for
from deploy.targets.table import TARGETS, Target, place_for
from tests.helpers.tiny_onnx import pictures

NEEDS = {"openvino": "openvino", "tract": "tract", "mnn": "MNN", "ncnn": "ncnn", "tvm": "tvm"}


@pytest.mark.parametrize("target", NEEDS)
def test_detections_are_onnx_runtimes(target: str, tiny_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS[target], reason=f"{NEEDS[target]} is not installed: the extra {target} has it")
    place = place_for(tmp_path / "tiny.onnx", target)
    assert " MB" in make_for(target, tiny_onnx, place)
    runner = open_runner(place)
    assert runner.backend.startswith(target) and runner.on_cpu
    wanted = open_runner(tiny_onnx)(pictures(3))
    found = runner(pictures(3))
    assert wanted.count.min() > 0
    for name, value in vars(wanted).items():
        assert getattr(found, name).dtype == value.dtype
        np.testing.assert_allclose(getattr(found, name), value, rtol=0, atol=0.05 if name == "boxes" else 1e-4)
    kept = [np.array(value) for value in vars(found).values()]
    runner(pictures(3)[::-1])
    assert all(np.array_equal(a, b) for a, b in zip(kept, vars(found).values(), strict=True)), "they are no views"


def test_what_lies_beside_a_file_is_missed(tiny_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("MNN", reason="MNN is not installed: the extra mnn has it")
    make_for("mnn", tiny_onnx, tmp_path / "tiny.mnn")
    (tmp_path / "tiny.mnn.json").unlink()
    with pytest.raises(UserError, match=r"tiny.mnn.json: no such file; it is the card of tiny.mnn"):
        open_runner(tmp_path / "tiny.mnn")


@pytest.mark.parametrize(
    ("target", "wants"), [("tract", "tract takes a fixed batch and int32 labels"), ("tvm", "TVM takes a fixed batch")]
)
def test_a_file_of_another_form_is_refused(target: str, wants: str, tiny_onnx: Path, tmp_path: Path) -> None:
    place = place_for(tmp_path / "tiny.onnx", target)
    shutil.copy(tiny_onnx, place)
    with pytest.raises(UserError, match=f"{place}: {wants}: compress export {place} --for {target}"):
        open_runner(place)


def test_the_converter_for_litert_is_named(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"onnx2tf is not on PATH; .*: {litert.INSTALL}"):
        make_for("litert", tiny_onnx, tmp_path / "tiny.tflite")


def test_what_ends_its_process_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ncnn does so with networks that it understands in part."""
    monkeypatch.setattr(ncnn, "_TRY", "import os; os.abort()")
    with pytest.raises(UserError, match=r"x.onnx: ncnn cannot run what pnnx makes of it: it ends the process"):
        ncnn._try(Path("x.onnx"), tmp_path / "x.ncnn.param")


def test_a_failing_converter_is_one_line(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind, and what was there before stays."""
    program = tmp_path / "onnx2tf"
    program.write_text("#!/bin/sh\necho 'ERROR: no such operator'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    place = tmp_path / "tiny.tflite"
    place.write_text("before")
    with pytest.raises(UserError, match="onnx2tf fails: ERROR: no such operator"):
        make_for("litert", tiny_onnx, place)
    assert place.read_text() == "before" and sorted(path.name for path in tmp_path.iterdir()) == [
        "onnx2tf",
        "tiny.tflite",
    ]


def test_a_file_that_finds_other_things_is_not_written(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converter that says that it succeeded is not believed."""

    def spoil(source: Path, place: Path) -> str:
        model = onnx.load(str(source))
        for item in model.graph.initializer:
            if len(item.dims) == 4:
                values = onnx.numpy_helper.to_array(item)
                item.CopyFrom(onnx.numpy_helper.from_array(np.flip(values, 0).copy(), item.name))
        onnx.save(model, str(place))
        return "1 MB"

    place = tmp_path / "other.onnx"
    place.write_text("before")
    monkeypatch.setitem(TARGETS, "own", Target(spoil, ".onnx"))
    with pytest.raises(UserError, match=r"the file for own finds \d+% of what this one finds on pictures of noise"):
        make_for("own", tiny_onnx, place)
    assert place.read_text() == "before" and list(tmp_path.iterdir()) == [place]


def test_a_file_that_does_not_open_is_told_of_its_source(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own place is a folder that goes away."""
    monkeypatch.setitem(TARGETS, "own", Target(lambda _, place: str(place.write_text("nonsense")), ".onnx"))
    with pytest.raises(UserError, match=f"^{tiny_onnx}: the file for own does not run: ONNX Runtime cannot load it: "):
        make_for("own", tiny_onnx, tmp_path / "other.onnx")
    assert not list(tmp_path.iterdir())


def test_what_a_file_is_made_of_stays(tiny_onnx: Path, tmp_path: Path) -> None:
    source = tmp_path / "tiny.tract.onnx"
    shutil.copy(tiny_onnx, source)
    before = source.read_bytes()
    for make in (
        lambda out: reform(source, out, Form(batch=1)),
        lambda out: cut_heads(source, out),
        lambda out: make_for("tract", source, out),
    ):
        with pytest.raises(UserError, match=r"is what it is made of; give another name, or it would be lost"):
            make(tmp_path / "." / "tiny.tract.onnx")
        assert source.read_bytes() == before and list(tmp_path.iterdir()) == [source]


def test_own_int8_is_compared_with_what_it_is_made_of(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An int8 file that was calibrated badly says nothing of a converter that never saw it."""
    beside, source = tmp_path / "tiny.onnx", tmp_path / "tiny.int8.onnx"
    shutil.copy(tiny_onnx, beside)
    model = onnx.load(str(tiny_onnx))
    for item in model.graph.initializer:
        if len(item.dims) == 4:
            item.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(item), item.name))
    quantization = Quantization(target="cpu", layers=4, method="weights")
    write_graph(model, card_from_file(tiny_onnx).model_copy(update={"quantization": quantization}), source)
    monkeypatch.setitem(TARGETS, "own", Target(lambda _, place: str(shutil.copy(beside, place)), ".own.onnx"))
    place = place_for(source, "own")
    with pytest.raises(UserError, match="the file for own finds"):
        make_for("own", source, place)
    monkeypatch.setitem(TARGETS, "own", replace(TARGETS["own"], own_int8=True))
    make_for("own", source, place)
    assert place.read_bytes() == beside.read_bytes()


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--out: .*x.onnx does not end in .mnn"):
        place_for(tmp_path / "tiny.onnx", "mnn", tmp_path / "x.onnx")
    assert place_for(tmp_path / "tiny.int8.onnx", "mnn").name == "tiny.int8.mnn"


def test_own_int8_files_are_made_of_the_float_one(tiny_onnx: Path, tmp_path: Path) -> None:
    """MNN and LiteRT quantize it themselves; it lies beside ours."""
    beside, source = tmp_path / "tiny.onnx", tmp_path / "tiny.int8.onnx"
    card = card_from_file(tiny_onnx)
    with pytest.raises(UserError, match=r"tiny.onnx is not there; export both: --precision fp32,int8"):
        own_int8.float_beside(source, card, "MNN")
    shutil.copy(tiny_onnx, beside)
    assert own_int8.float_beside(source, card, "MNN") == beside
    with pytest.raises(UserError, match=r"MNN quantizes the fp32 file itself, and .*tiny.onnx is not that of"):
        own_int8.float_beside(source, card.model_copy(update={"checkpoint_sha256": "other"}), "MNN")
    half = card.model_copy(update={"precision": {"head": "fp16"}})
    write_graph(onnx.load(str(tiny_onnx)), half, beside)
    with pytest.raises(UserError, match=r"tiny.onnx is not that of its checkpoint"):
        own_int8.float_beside(source, card, "MNN")
    shutil.copy(tiny_onnx, beside)
    with pytest.raises(UserError, match=r"a.onnx: MNN quantizes .* not called x.int8.onnx"):
        own_int8.float_beside(tmp_path / "a.onnx", card, "MNN")
    made = own_int8.quantized_card(beside, "mnn", "weights")
    assert made.precision == {"stem": "int8", "down": "int8", "cls": "int8", "reg": "int8", PROCESSING: "fp32"}
    assert made.quantization == Quantization(target="mnn", layers=4, method="weights")
