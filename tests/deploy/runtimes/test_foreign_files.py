"""Files that are cut, of another network or beside another model's card: one line that names the file. And what a
runtime prints from C stays out of results."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from deploy.core.card import Form, Heads, ModelCard, card_beside, scanned_card, write_card_beside
from deploy.core.errors import UserError
from deploy.graph.form import write_graph
from deploy.runtimes.open import open_runner
from deploy.targets.make import make_for
from deploy.targets.table import place_for
from tests.helpers.tiny_onnx import SIZE, pictures

NEEDS = {"tract": "tract", "tvm": "tvm", "mnn": "MNN", "ncnn": "ncnn", "litert": "ai_edge_litert"}
LARGER = tuple(2 * side for side in SIZE)


def need(target: str) -> None:
    pytest.importorskip(NEEDS[target], reason=f"{NEEDS[target]} is not installed: the extra {target} has it")


def made(target: str, source: Path, folder: Path) -> Path:
    place = place_for(folder / "tiny.onnx", target)
    make_for(target, source, place)
    return place


@pytest.fixture(scope="module")
def mnn(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("mnn")
    return made("mnn", tiny_onnx, tmp_path_factory.mktemp("mnn"))


def rewritten(source: Path, place: Path, change: Callable[[Any, ModelCard], ModelCard]) -> Path:
    """The ONNX file with its graph and card changed."""
    model = onnx.load(str(source))
    write_graph(model, change(model.graph, scanned_card(source)), place)
    return place


def without_the_count(graph: Any, card: ModelCard) -> ModelCard:
    del graph.output[3]
    return card


def with_two_swapped(graph: Any, card: ModelCard) -> ModelCard:
    first, second, *_ = (graph.output[index] for index in range(2))
    kept = onnx.ValueInfoProto()
    kept.CopyFrom(first)
    first.CopyFrom(second)
    second.CopyFrom(kept)
    return card


def with_another_input(graph: Any, card: ModelCard) -> ModelCard:
    graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    return card


def with_a_larger_canvas(graph: Any, card: ModelCard) -> ModelCard:
    return card.model_copy(update={"input_size": LARGER})


SIZES = r"takes images of 1x3x64x96, and by its card of 1x3x128x192: the card is another model's, tiny"


@pytest.mark.parametrize(
    ("target", "change", "says"),
    [
        ("tract", without_the_count, "not a deployable file: it takes 1 inputs and gives 3 outputs"),
        ("tract", with_another_input, "not a deployable file: it takes 2 inputs and gives 4 outputs"),
        ("tract", with_a_larger_canvas, SIZES),
        (
            "tvm",
            without_the_count,
            r"not a deployable file: it takes \['images'\] and gives \['boxes', 'scores', 'labels",
        ),
        ("tvm", with_two_swapped, r"not a deployable file: it takes \['images'\] and gives \['scores', 'boxes', "),
        ("tvm", with_another_input, r"not a deployable file: it takes \['images', 'more'\] and gives"),
        ("tvm", with_a_larger_canvas, SIZES),
    ],
)
def test_a_graph_of_others_is_told_when_it_opens(
    target: str,
    change: Callable[[Any, ModelCard], ModelCard],
    says: str,
    tiny_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need(target)
    if target == "tvm":  # it compiles for seconds; nothing here may come so far
        monkeypatch.setattr("tvm.relax.frontend.onnx.from_onnx", lambda _: pytest.fail("compiles it"))
    form = Form(batch=1, labels="int32" if target == "tract" else "int64")
    from deploy.graph.form import reform

    reform(tiny_onnx, tmp_path / "formed.onnx", form)
    place = rewritten(tmp_path / "formed.onnx", place_for(tmp_path / "tiny.onnx", target), change)
    with pytest.raises(UserError, match=f"^{place}: {says}") as told:
        open_runner(place)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "content", [lambda whole: whole[: len(whole) // 2], lambda _: b"", lambda whole: bytes(len(whole))]
)
def test_a_damaged_file_of_mnn_is_one_line(mnn: Path, content: Callable[[bytes], bytes], tmp_path: Path) -> None:
    place = tmp_path / "harmed.mnn"
    place.write_bytes(content(mnn.read_bytes()))
    write_card_beside(card_beside(mnn), place)
    with pytest.raises(UserError, match=rf"^{place}: MNN cannot load it: [^\n]+$"):
        open_runner(place)


def test_the_card_of_another_form_is_told(mnn: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.mnn").write_bytes(mnn.read_bytes())
    heads = Heads(strides=[8, 16], bins=5)
    of_ncnn = card_beside(mnn).model_copy(update={"form": Form(batch=1, images="float32", heads=heads)})
    write_card_beside(of_ncnn, tmp_path / "tiny.mnn")
    with pytest.raises(UserError, match=r"tiny.mnn: the card beside it is another file's: it tells of a fixed batch"):
        open_runner(tmp_path / "tiny.mnn")


@pytest.mark.parametrize("size", [LARGER, (32, 32)])
def test_the_card_of_another_model_beside_a_file_of_mnn(mnn: Path, size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "tiny.mnn").write_bytes(mnn.read_bytes())
    write_card_beside(card_beside(mnn).model_copy(update={"input_size": size}), tmp_path / "tiny.mnn")
    with pytest.raises(UserError, match=r"tiny.mnn: takes images of 3x64x96, and by its card of 3x\d+x\d+: the"):
        open_runner(tmp_path / "tiny.mnn")


def test_the_card_of_another_model_beside_a_file_of_ncnn(tiny_onnx: Path, tmp_path: Path) -> None:
    need("ncnn")
    place = made("ncnn", tiny_onnx, tmp_path)
    more = {"class_names": ["a", "b", "c", "d"], "category_ids": [1, 2, 3, 4]}
    write_card_beside(card_beside(place).model_copy(update=more), place)
    with pytest.raises(UserError, match=r"cls_8 is 3x8x12 and by its card 4x8x12: the card beside it is another model"):
        open_runner(place)(pictures(1))


class FakeSignature:
    def get_input_details(self) -> dict[str, Any]:
        return {"images": {"shape": np.array([1, *SIZE, 3])}}

    def get_output_details(self) -> dict[str, Any]:
        return dict.fromkeys(("boxes", "count", "labels", "scores"))


class FakeInterpreter:
    """LiteRT's, with a file of ours open. Making one takes an environment of its own."""

    def __init__(self, **_: Any) -> None:
        pass

    def allocate_tensors(self) -> None:
        pass

    def get_signature_runner(self) -> FakeSignature:
        return FakeSignature()


def test_the_card_of_another_model_beside_a_file_of_litert(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="the extra litert has it")
    monkeypatch.setattr(interpreter, "Interpreter", FakeInterpreter)
    place = tmp_path / "tiny.tflite"
    place.touch()
    card = scanned_card(tiny_onnx)
    write_card_beside(card.model_copy(update={"form": Form(labels="int32")}), place)
    with pytest.raises(UserError, match=r"tiny.tflite: the card beside it is another file's: it tells of int32 labels"):
        open_runner(place)
    card = card.model_copy(update={"form": Form(batch=1)})
    write_card_beside(card, place)
    open_runner(place)
    write_card_beside(card.model_copy(update={"input_size": LARGER}), place)
    with pytest.raises(UserError, match=r"tiny.tflite: takes images of 1x64x96x3, and by its card of 1x128x192x3"):
        open_runner(place)


@pytest.mark.parametrize("command", ["validate", "benchmark"])
def test_what_mnn_prints_stays_out_of_the_results(mnn: Path, command: str, tmp_path: Path) -> None:
    """In a process of its own: C prints past Python."""
    Image.fromarray(pictures(1)[0].transpose(1, 2, 0)).save(tmp_path / "0.png")
    card = card_beside(mnn)
    labels = {
        "images": [{"id": 1, "file_name": "0.png", "width": SIZE[1], "height": SIZE[0]}],
        "categories": [{"id": i, "name": n} for i, n in zip(card.category_ids, card.class_names, strict=True)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}],
    }
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    asked = {
        "validate": ["--data", str(tmp_path / "labels.json")],
        "benchmark": ["--seconds", "0.1", "--rounds", "2", "--warm-up", "0", "--scope", "compute"],
    }
    words = [sys.executable, "-m", "compress", command, str(mnn), "--images", str(tmp_path), "--json", "-"]
    done = subprocess.run([*words, *asked[command]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


_PRINTS = """
import ctypes
from deploy.runtimes.mnn import _stdout_as_stderr
c = ctypes.CDLL(None)
c.printf(b"before\\n")
try:
    with _stdout_as_stderr():
        c.printf(b"inside\\n")
        raise RuntimeError("a mistake")
except RuntimeError:
    print("after", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="asks for the C library as Unix has it")
def test_what_c_prints_meanwhile_goes_to_stderr() -> None:
    """C keeps it for the end of the process, where stdout is a pipe."""
    done = subprocess.run([sys.executable, "-c", _PRINTS], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("before\nafter\n", "inside\n")
