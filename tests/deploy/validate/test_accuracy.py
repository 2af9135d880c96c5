"""Validation: equal artifacts pass, spoiled ones fail, and figures come from the evaluator."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from compress.export.deployable import TorchRunner
from deploy.core.canvas import letterbox, to_original
from deploy.core.card import HalfPrecision, ModelCard
from deploy.core.detection_table import DetectionTable
from deploy.core.errors import UserError
from deploy.core.image import load_image
from deploy.runtimes import pictures
from deploy.runtimes.base import DetectionBatch, Runner
from deploy.runtimes.onnx import OnnxRunner
from deploy.validate.accuracy import results_table, validate, write_results
from deploy.validate.agreement import AGREEMENT_SCORE
from deploy.validate.coco import evaluate_coco
from deploy.validate.detect import detect_all
from deploy.validate.ground_truth import GroundTruth
from deploy.validate.operating_point import operating_point
from tests.helpers.fake_runners import TINY_CARD, FakeClock, FakeRunner, small_images
from tests.helpers.red_rectangle_model import CARD as RED
from tests.helpers.red_rectangle_model import picture as red_picture
from tests.helpers.red_rectangle_model import write_red_model
from tests.helpers.tiny_onnx import CARD, deployable

COUNT = 13  # not a multiple of the batch size


class Spoiled:
    """A runner whose detections pass through `change`."""

    def __init__(self, runner: Runner, change: Any) -> None:
        self.runner, self.change, self.card, self.backend = runner, change, runner.card, "spoiled"

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        return self.change(self.runner(images))


def coco_rows(runner: Runner, path: Path, image_id: int) -> list[dict[str, Any]]:
    """One image, the obvious way, for comparison with the batched one."""
    pixels = load_image(path)
    canvas, scale = letterbox(pixels, runner.card.input_size, runner.card.pad_color)
    out = runner(canvas[None])
    rows = []
    for k in range(int(out.count[0])):
        x1, y1, x2, y2 = to_original(out.boxes[0, k : k + 1], scale, pixels.shape[:2])[0].tolist()
        category = runner.card.category_ids[int(out.labels[0, k])]
        score = float(out.scores[0, k])
        rows.append(
            {
                "image_id": image_id,
                "category_id": category,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
        )
    return rows


@pytest.fixture(scope="module")
def torch_runner() -> TorchRunner:
    return TorchRunner(deployable(), CARD)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, torch_runner: TorchRunner) -> tuple[Path, Path]:
    """Pictures of many sizes; the ground truth is what the detector is sure of, a little moved."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    images, boxes = [], []
    for i in range(COUNT):
        height, width = (int(v) for v in rng.integers(50, 160, 2))
        coarse = rng.integers(0, 256, (8, 12, 3), np.uint8)
        name = f"{i:03}.png"
        Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST).save(folder / name)
        images.append({"id": 100 - i, "file_name": name, "width": width, "height": height})
        for row in coco_rows(torch_runner, folder / name, 100 - i):
            if row["score"] > 0.4 and rng.random() < 0.7:
                x, y, w, h = row["bbox"]
                moved = [x + 0.06 * w * rng.random(), y, w, h]
                category = row["category_id"]
                boxes.append(
                    {
                        "id": len(boxes) + 1,
                        "image_id": 100 - i,
                        "category_id": category,
                        "bbox": moved,
                        "area": w * h,
                        "iscrowd": 0,
                    }
                )
    categories = [{"id": i, "name": n} for i, n in zip(CARD.category_ids, CARD.class_names, strict=True)]
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return file, folder


def test_torch_and_onnx_agree_and_a_spoiled_file_fails(
    dataset: tuple[Path, Path], torch_runner: TorchRunner, tiny_onnx: Path, tmp_path: Path
) -> None:
    def shift(out: DetectionBatch) -> DetectionBatch:
        return replace(out, boxes=out.boxes + np.float32(3.0) * (out.scores > 0)[..., None])

    runners: dict[str, Runner] = {
        "torch": torch_runner,
        "onnx": OnnxRunner(tiny_onnx, threads=1),
        "shifted": Spoiled(torch_runner, shift),
        "empty": Spoiled(torch_runner, lambda out: replace(out, count=out.count * 0)),
    }
    steps: list[tuple[int, int]] = []
    results = validate(runners, *dataset, reference="torch", batch_size=4, progress=lambda *step: steps.append(step))
    assert steps == [(4, 13), (8, 13), (12, 13), (13, 13)]
    torch_result, onnx_result, shifted, empty = results
    annotations = json.loads(dataset[0].read_text())
    rows = [
        row
        for image in annotations["images"]
        for row in coco_rows(torch_runner, dataset[1] / image["file_name"], image["id"])
    ]
    expected = evaluate_coco(annotations, rows, backend="pycocotools")
    assert 20 < expected.map < 95
    assert torch_result.metrics.map == pytest.approx(expected.map, abs=1e-6)
    assert torch_result.metrics.per_class == pytest.approx(expected.per_class, abs=1e-6)

    point = torch_result.metrics.operating_point
    truth, table = GroundTruth.of(annotations), DetectionTable.from_rows(rows)
    assert point is not None and point == operating_point(truth, table, CARD.category_ids)
    assert len(rows) > sum(row["score"] >= point.score for row in rows) > 0
    assert point.images == len(annotations["images"])

    assert (torch_result.gate, torch_result.map_drop) == ("pass", 0.0)
    assert onnx_result.gate == "pass" and abs(onnx_result.map_drop or 0.0) < 0.1
    assert onnx_result.agreement is not None and onnx_result.agreement.share > 0.99
    assert onnx_result.agreement.detections > 2 * 30
    assert 0 < onnx_result.agreement.mean_score_difference < 1e-4
    assert 0 < onnx_result.agreement.mean_box_difference_px < 1e-2

    assert shifted.gate == "fail" and shifted.map_drop is not None and shifted.map_drop > 0.5
    assert shifted.agreement is not None and shifted.agreement.share < 0.6
    assert (empty.gate, empty.metrics.map) == ("fail", 0.0)
    confident = sum(row["score"] >= AGREEMENT_SCORE for row in rows)
    assert empty.agreement is not None
    assert (empty.agreement.share, empty.agreement.detections) == (0.0, confident)

    write_results(tmp_path / "results.json", results)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written[3]["agreement"]["mean_score_difference"] is None  # no pair to average
    assert written[1]["metrics"]["per_class"].keys() == {"a", "b", "c"}
    assert written[0]["metrics"]["operating_point"] == point.model_dump(mode="json")
    assert "operating_point" not in written[3]["metrics"] and written[3]["analysis"]["curve"] == []
    curve = written[0]["analysis"]["curve"]
    assert max(2 * p * r / (p + r) for _, p, r in curve if p) == pytest.approx(point.f1, abs=1e-3)
    console = Console(width=140, record=True, file=(tmp_path / "table.txt").open("w"))
    console.print(results_table(results))
    text = console.export_text()
    assert "fail" in text and "spoiled" in text and "mAP at" not in text


def test_a_file_that_gives_more_than_100_has_a_figure_for_that(
    dataset: tuple[Path, Path], torch_runner: TorchRunner
) -> None:
    more = Spoiled(torch_runner, lambda out: out)
    more.card = torch_runner.card.model_copy(update={"max_detections": 150})
    results = validate({"usual": torch_runner, "more": more}, *dataset, limit=2)
    assert [row.metrics.max_detections for row in results] == [None, 150]
    assert results[1].metrics.map_at_max == results[0].metrics.map  # no image has so many here
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(results_table(results))
    lines = console.export_text().splitlines()
    assert "mAP at 150" in lines[2] and lines[4].count(" - ") > lines[5].count(" - ")


def test_what_a_cpu_hides_of_half_precision_is_said(
    dataset: tuple[Path, Path], torch_runner: TorchRunner, tmp_path: Path
) -> None:
    class Half(Spoiled):
        """As if the runner had another card, here or on a GPU."""

        def __init__(self, half: HalfPrecision | None, *, on_cpu: bool = True) -> None:
            super().__init__(torch_runner, lambda found: found)
            self.card = CARD.model_copy(update={"precision": {"head": "fp16+fp32"}, "half": half})
            self.on_cpu = on_cpu

    known = HalfPrecision(images=7, largest=123.4, float32={"neck.x": "adds up 9e+04 inside"})
    runners = {"new": Half(known), "old": Half(None), "gpu": Half(known, on_cpu=False), "fp32": torch_runner}
    results = validate(runners, *dataset, limit=2)
    notes = {row.name: row.note for row in results}
    assert notes["gpu"] is None and notes["fp32"] is None
    assert (
        notes["new"] is not None
        and "measured at export, on 7 images: at most 123 of 65504; in float32: neck.x" in (notes["new"])
    )
    assert notes["old"] is not None and "were not measured" in notes["old"] and "export it again" in notes["old"]
    console = Console(width=400)
    with console.capture() as capture:
        console.print(results_table(results))
    shown = " ".join(capture.get().split())
    assert f"old: {notes['old']}" in shown and "gpu: " not in shown
    write_results(tmp_path / "results.json", results)
    rows = {row["name"]: row for row in json.loads((tmp_path / "results.json").read_text())}
    assert rows["new"]["note"] == notes["new"] and rows["gpu"]["half"] == known.model_dump(mode="json")
    assert rows["fp32"]["note"] is None and rows["old"]["half"] is None


def test_a_score_at_the_border_is_no_disagreement_and_a_class_is(
    dataset: tuple[Path, Path], torch_runner: TorchRunner
) -> None:
    lower = Spoiled(torch_runner, lambda out: replace(out, scores=np.maximum(out.scores - 0.02, 0)))
    other = Spoiled(torch_runner, lambda out: replace(out, labels=(out.labels + 1) % 3))
    runners: dict[str, Runner] = {"torch": torch_runner, "lower": lower, "other": other}
    results = validate(runners, *dataset, reference="torch", limit=6)
    assert results[0].images == 6
    assert results[1].agreement is not None and results[1].agreement.share == 1.0
    assert results[1].agreement.mean_score_difference == pytest.approx(0.02, abs=1e-3)
    assert results[2].agreement is not None and results[2].agreement.share < 0.2


def test_the_gate_is_the_limit_given_and_needs_a_reference(
    dataset: tuple[Path, Path], torch_runner: TorchRunner
) -> None:
    shifted = Spoiled(torch_runner, lambda out: replace(out, boxes=out.boxes + np.float32(1.0)))
    runners: dict[str, Runner] = {"torch": torch_runner, "shifted": shifted}
    drop = validate(runners, *dataset, reference="torch", max_map_drop=100.0)[1].map_drop
    assert drop is not None and drop > 0
    for limit, gate in ((drop + 0.01, "pass"), (drop - 0.01, "fail")):
        assert validate(runners, *dataset, reference="torch", max_map_drop=limit)[1].gate == gate
    alone = validate(runners, *dataset)
    assert [row.gate for row in alone] == ["not run: no reference"] * 2
    assert alone[0].map_drop is None and alone[0].agreement is None


def test_the_gate_sees_what_training_measured(dataset: tuple[Path, Path], torch_runner: TorchRunner) -> None:
    runners: dict[str, Runner] = {"torch": torch_runner, "more": torch_runner, "unknown": torch_runner}
    reached = validate(runners, *dataset, reference="torch")[0].metrics.map
    expected = {"torch": reached + 0.4, "more": reached + 0.6}
    rows = validate(runners, *dataset, reference="torch", expected=expected)
    assert [row.gate for row in rows] == ["pass", "fail", "pass"]
    assert [row.training_drop for row in rows] == [pytest.approx(0.4), pytest.approx(0.6), None]
    assert rows[1].map_drop == 0 and f"training measured {reached + 0.6:.2f}" in str(rows[1].diagnosis)
    reference = validate(runners, *dataset, reference="torch", expected={"torch": reached + 0.6})[0]
    assert reference.gate == "fail", "the reference has a gate of its own"


def test_a_file_that_fails_names_the_pictures_that_differ_most(
    dataset: tuple[Path, Path], torch_runner: TorchRunner
) -> None:
    class BlindTo(Spoiled):
        """Finds nothing in the k-th image, and nearly what it should in the one before."""

        calls = 0

        def __call__(self, images: np.ndarray) -> DetectionBatch:
            found, self.calls = self.runner(images), self.calls + 1
            if self.calls == k:
                return replace(found, scores=np.maximum(found.scores - 0.01, 0))
            return replace(found, count=np.zeros_like(found.count)) if self.calls == k + 1 else found

    k = 4
    runners: dict[str, Runner] = {"torch": torch_runner, "blind": BlindTo(torch_runner, None)}
    row = validate(runners, *dataset, reference="torch", max_map_drop=0.0, batch_size=1)[1]
    ids = sorted(image["id"] for image in json.loads(dataset[0].read_text())["images"])
    names = {image["id"]: image["file_name"] for image in json.loads(dataset[0].read_text())["images"]}
    assert [(picture["id"], picture["file"]) for picture in row.pictures] == [
        (i, names[i]) for i in (ids[k], ids[k - 1])
    ]
    assert row.pictures[0]["difference"] > 10 * row.pictures[1]["difference"] > 0


def test_files_of_two_canvases_are_told_apart_by_them(tmp_path: Path) -> None:
    Image.fromarray(red_picture((96, 128), (13, 11, 90, 71))).save(tmp_path / "a.png")
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "width": 128, "height": 96}],
        "categories": [{"id": 7, "name": "red"}, {"id": 9, "name": "large red"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 9, "bbox": [13, 11, 77, 60], "iscrowd": 0}],
    }
    (tmp_path / "a.json").write_text(json.dumps(truth))
    write_red_model(tmp_path / "red.onnx")
    write_red_model(tmp_path / "small.onnx", card=RED.model_copy(update={"input_size": (32, 32)}))
    runners = {name: OnnxRunner(tmp_path / name) for name in ("red.onnx", "small.onnx")}
    row = validate(runners, tmp_path / "a.json", tmp_path, reference="red.onnx")[1]
    assert row.gate == "fail"
    assert row.diagnosis == "canvas: 32x32 (height x width), that of red.onnx is 96x128"


def test_runners_of_one_canvas_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture is resized once for each kind of canvas, whatever the number of runners, and each gets its own kind."""
    fitted: list[tuple[int, int]] = []
    fit = pictures.fit_canvas
    monkeypatch.setattr(
        pictures, "fit_canvas", lambda pixels, card: (fitted.append(card.input_size), fit(pixels, card))[1]
    )
    runners: dict[str, Runner] = {}
    for name, size in (("a", (32, 32)), ("b", (32, 32)), ("c", (32, 64))):
        runners[name] = FakeRunner(FakeClock(), lambda images: 1.0)
        runners[name].card = TINY_CARD.model_copy(update={"input_size": size})
    files = dict(enumerate(small_images(tmp_path)))
    outcomes = detect_all(runners, files, 3)
    assert sorted(fitted) == [(32, 32)] * len(files) + [(32, 64)] * len(files)
    assert all(len(outcome.detections.table().scores) == len(files) for outcome in outcomes.values())


def test_wrong_inputs_are_one_line_errors(dataset: tuple[Path, Path], tmp_path: Path) -> None:
    file, folder = dataset

    def with_card(**change: Any) -> dict[str, Runner]:
        card = ModelCard.model_validate({**CARD.model_dump(), **change})
        return {"m": TorchRunner(deployable(card=card), card)}

    with pytest.raises(UserError, match="reference 'x' is not among the artifacts: m"):
        validate(with_card(), file, folder, reference="x")
    with pytest.raises(UserError, match="class 'b' is category 5, which"):
        validate(with_card(category_ids=[2, 5, 9]), file, folder)
    with pytest.raises(UserError, match="category 4 is 'z' to the model, 'b' in"):
        validate(with_card(class_names=["a", "z", "c"]), file, folder)
    with pytest.raises(UserError, match=r"\d+\.png: the file is missing"):
        validate(with_card(), file, tmp_path)
    content = json.loads(file.read_text())
    sized = [{**row, "width": 7, "height": 9} for row in content["images"]]
    (tmp_path / "sized.json").write_text(json.dumps({**content, "images": sized}))
    with pytest.raises(UserError, match=r"\.png: the file is \d+x\d+ pixels, the annotations say 7x9; their boxes"):
        validate(with_card(), tmp_path / "sized.json", folder)
    (tmp_path / "empty.json").write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(UserError, match="no boxes to validate against"):
        validate(with_card(), tmp_path / "empty.json", folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("output", ["boxes", "scores"])
def test_what_is_not_finite_is_no_detection_and_fails_the_gate(
    dataset: tuple[Path, Path], torch_runner: TorchRunner, output: str, value: float
) -> None:
    """The best detection of every image is spoiled: the rest counts, and the other runners keep their results."""

    def spoil(out: DetectionBatch) -> DetectionBatch:
        values = getattr(out, output).copy()
        values[:, 0] = value
        return replace(out, **{output: values})

    def without_best(out: DetectionBatch) -> DetectionBatch:
        moved = {name: np.roll(getattr(out, name), -1, axis=1) for name in ("boxes", "scores", "labels")}
        return replace(out, **moved, count=np.maximum(out.count - 1, 0))

    runners: dict[str, Runner] = {
        "torch": torch_runner,
        "bad": Spoiled(torch_runner, spoil),
        "fewer": Spoiled(torch_runner, without_best),
    }
    good, bad, fewer = validate(runners, *dataset, reference="torch", max_map_drop=100.0, limit=4)
    assert (good.gate, bad.gate, fewer.gate) == ("pass", "fail", "pass")
    assert bad.metrics.to_dict() == fewer.metrics.to_dict() and 0 < bad.metrics.map < good.metrics.map
    assert bad.agreement == fewer.agreement
    assert bad.diagnosis is not None and bad.diagnosis.startswith("4 of 4 images have values that are not finite")
    assert bad.diagnosis.endswith("not run: only ONNX files in ONNX Runtime can be compared value by value")

    against_bad = validate(runners, *dataset, reference="bad", max_map_drop=100.0, limit=4)
    assert [row.gate for row in against_bad] == [
        "not run: the reference gives values that are not finite",
        "fail",
        "not run: the reference gives values that are not finite",
    ]
    assert validate({"bad": runners["bad"]}, *dataset, limit=4)[0].gate == "fail"
