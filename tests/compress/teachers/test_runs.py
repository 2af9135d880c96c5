"""Every kind of teacher in a recipe from beginning to end, what is said about it, and what stops a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torchvision.models import detection

from compress import cli
from compress.config.model import Model
from compress.config.recipe import Recipe
from compress.data.synthetic import class_names
from compress.detectors.checkpoints import ModelRecord, mmdet_key
from compress.run import pipeline
from compress.run.teacher import checkpoint_to_show
from deploy.core.errors import UserError
from tests.helpers import tiny_recipe
from tests.helpers.random_teacher import teacher as random_teacher
from tests.helpers.teacher_files import CORNERS, PIXELS, constant, deployable, spot, transformers_model

pytestmark = pytest.mark.usefixtures("few_rounds")

NAMES = class_names(3)
LABELLED = ("labels.fraction=0.5", "pseudo_labels.tau=0.05", "pseudo_labels.tau_ignore=0.02",
            "pseudo_labels.fine_tune=null", "methods.bckd=null")  # fmt: skip
ANYTHING = """
  shape = Constant<value_ints=[1,4]>()
  boxes = Reshape(box, shape)
  scores = Constant<value_floats=[0.75]>()
  labels = Constant<value_ints=[2]>()
"""


def recipe(folder: Path, teacher: dict[str, Any], *more: str) -> Recipe:
    return tiny_recipe.recipe(folder, f"teacher={json.dumps(teacher)}", *more)


def truth(recipe: Recipe) -> dict[str, Any]:
    """The drawn boxes of all images as what a detector found: a document, its categories the other way round."""
    from compress.run.data import splits

    images: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for split in splits(recipe.data, recipe.runs):
        document = json.loads(split.annotations.read_text())
        names = {row["id"]: row["name"] for row in document["categories"]}
        shift = len(images)
        place = {row["id"]: shift + index for index, row in enumerate(document["images"])}
        images += [{"id": place[row["id"]], "file_name": row["file_name"]} for row in document["images"]]
        rows += [
            {
                "image_id": place[row["image_id"]],
                "category_id": 3 - NAMES.index(names[row["category_id"]]),
                "bbox": row["bbox"],
                "score": 0.9,
            }
            for row in document["annotations"]
        ]
    categories = [{"id": 3 - index, "name": name} for index, name in enumerate(NAMES)]
    return {"images": images, "annotations": rows, "categories": categories}


def results(folder: Path) -> dict[str, Any]:
    path = folder / "truth.json"
    path.write_text(json.dumps(truth(tiny_recipe.recipe(folder))))
    return {"results": str(path)}


def foreign(folder: Path) -> dict[str, Any]:
    outputs = "float[N,4] boxes, float[N] scores, int64[N] labels"
    path = spot(folder / "spot.onnx", rest=CORNERS + PIXELS + ANYTHING, outputs=outputs, limit=60.0)
    how = {"size": [64, 64], "resize": "stretch"}
    return {
        "onnx": {
            "file": str(path),
            "class_names": list(NAMES),
            "input": how,
            "output": {"boxes": "boxes", "scores": "scores", "labels": "labels"},
        }
    }


def transformers(folder: Path) -> dict[str, Any]:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[transformers]'")
    model = transformers_model(folder / "detr", "rt_detr_v2", dict(enumerate(NAMES)))
    return {"transformers": {"model": str(model)}}


def torchvision(model: str, **more: Any) -> dict[str, Any]:
    settings = {"model": model, "weights": "none", "class_names": list(NAMES), "short": 64, "long": 64}
    return {"torchvision": settings | more}


def retinanet(folder: Path) -> dict[str, Any]:
    """Scores all over 0..1 instead of 0.01 everywhere."""
    model = detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=len(NAMES) + 1)
    torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.2)
    torch.save(model.state_dict(), folder / "retinanet.pth")
    return torchvision("retinanet_resnet50_fpn", weights=str(folder / "retinanet.pth"))


def gfl_of_mmdet(folder: Path, names: list[str] | None = None) -> dict[str, Any]:
    """A file with mmdet's keys; and its class names, if given."""
    model = ModelRecord(model=Model(backbone="resnet18", head_depth=1), num_classes=len(NAMES)).build()
    torch.nn.init.normal_(model.head.gfl_cls.weight, std=0.2)  # type: ignore[union-attr, arg-type]
    state = {mmdet_key(key): value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "meta": {} if names is None else {"CLASSES": names}}, folder / "gfl.pth")
    return {"checkpoint": str(folder / "gfl.pth")}


KINDS = {
    "results": results,
    "a file of this project": lambda folder: {"onnx": {"file": str(deployable(folder / "ours.onnx", tuple(NAMES)))}},
    "a foreign file": foreign,
    "transformers": transformers,
    "torchvision": lambda folder: {
        "torchvision": {"model": "ssdlite320_mobilenet_v3_large", "weights": "none", "class_names": list(NAMES)}
    },
    "torchvision's RetinaNet": retinanet,
    "torchvision's Faster R-CNN": lambda folder: torchvision("fasterrcnn_resnet50_fpn"),
    "mmdet's GFL": lambda folder: gfl_of_mmdet(folder, list(NAMES)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_teach_by_pseudo_labels(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = KINDS[kind](tmp_path)
    run_dir = pipeline.distill(recipe(tmp_path, teacher, *LABELLED))
    assert (run_dir / "student.safetensors").is_file()
    said = capsys.readouterr().out
    assert "on the validation images" in said
    (file,) = (run_dir / "pseudo").glob("*.json")
    document = json.loads(file.read_text())
    assert len(document["annotations"]) > 5
    assert [row["name"] for row in document["categories"]] == list(NAMES)
    if kind == "results":  # other order of classes, other ids: still the drawn boxes
        assert "mAP 100.00" in said and "3 classes matched by name" in said
        drawn = truth(tiny_recipe.recipe(tmp_path))
        boxes = {(row["file_name"], row["id"]): [] for row in document["images"]}
        own = {row["id"]: row["file_name"] for row in drawn["images"]}
        for row in drawn["annotations"]:
            name = NAMES[3 - row["category_id"]]
            for (file_name, image), listed in boxes.items():
                if file_name == own[row["image_id"]]:
                    listed.append((image, name, [round(side, 1) for side in row["bbox"]]))
        ids = {row["id"]: row["name"] for row in document["categories"]}
        found = sorted(
            (row["image_id"], ids[row["category_id"]], [round(side, 1) for side in row["bbox"]])
            for row in document["annotations"]
        )
        assert len(found) > 10
        assert all(any(_near(row, other) for other in boxes_of(boxes, row[0])) for row in found)


def boxes_of(boxes: dict[tuple[str, int], list[Any]], image: int) -> list[Any]:
    return [row for (_, number), rows in boxes.items() if number == image for row in rows]


def _near(row: Any, other: Any) -> bool:
    return row[1] == other[1] and max(abs(a - b) for a, b in zip(row[2], other[2], strict=True)) < 0.2


def test_features_and_logits_of_torchvision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a report would show of it is what was measured here: there is no checkpoint to time or to draw."""
    teacher = {
        "torchvision": {
            "model": "fcos_resnet50_fpn", "weights": "none", "class_names": list(NAMES), "short": 64, "long": 64,
        }
    }  # fmt: skip
    settings = recipe(tmp_path, teacher, "methods={fgd: {}}", "train.steps=3")
    run_dir = pipeline.distill(settings)
    assert settings.teacher is not None
    assert checkpoint_to_show(settings.teacher, None, None) is None  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert "all 3 classes, in the same order" in said
    assert "teacher torchvision fcos_resnet50_fpn sees images: short side 64, long side 64, RGB, mean 123.7" in said
    rows = (run_dir / "student" / "metrics.csv").read_text().splitlines()
    assert "fgd" in rows[0]


# --------------------------------------------------------------------------------------- what stops a run


def test_a_weak_teacher_stops_the_run(tmp_path: Path) -> None:
    teacher = KINDS["torchvision"](tmp_path)
    teacher["torchvision"] |= {"model": "fcos_resnet50_fpn", "short": 64, "long": 64}
    wanted = r"min_map is 50 and the teacher torchvision fcos_resnet50_fpn reaches 0\.\d+ mAP on .*val.json:"
    with pytest.raises(UserError, match=wanted):
        pipeline.distill(recipe(tmp_path, teacher | {"min_map": 50}, "methods={fgd: {}}"))


def test_a_file_of_nonsense_stops_the_run(tmp_path: Path) -> None:
    """Shares of the sides, described as pixels."""
    rows = np.tile(np.array([[0.1, 0.2, 0.4, 0.5, 0.9, 0]], np.float32), (12, 1))
    path = constant(tmp_path / "a.onnx", {"output": rows}, (1, 3, 64, 64))
    teacher = {"onnx": {"file": str(path), "class_names": list(NAMES), "output": {"combined": "output"}}}
    with pytest.raises(UserError, match=r"a.onnx: of the first 12 boxes, in 1 image, 12 are smaller than a pixel"):
        pipeline.distill(recipe(tmp_path, teacher, *LABELLED))
    teacher["onnx"]["output"]["box_units"] = "normalised"  # type: ignore[index]
    pipeline.distill(recipe(tmp_path, teacher, *LABELLED, "train.steps=3"))


def test_a_weak_teacher_stops_the_labelling(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"min_map is 99 and the teacher ours.onnx reaches .* mAP on "):
        pipeline.distill(recipe(tmp_path, KINDS["a file of this project"](tmp_path) | {"min_map": 99}, *LABELLED))


def test_results_of_other_images_are_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results for the training images alone: they can teach, but their mAP is unknown."""
    document = truth(tiny_recipe.recipe(tmp_path))
    names = {row["file_name"] for row in document["images"] if "train" in row["file_name"]}
    assert 0 < len(names) < len(document["images"])
    document["images"] = [row for row in document["images"] if row["file_name"] in names]
    ids = {row["id"] for row in document["images"]}
    document["annotations"] = [row for row in document["annotations"] if row["image_id"] in ids]
    (tmp_path / "train.json").write_text(json.dumps(document))
    teacher: dict[str, Any] = {"results": str(tmp_path / "train.json")}
    pipeline.distill(recipe(tmp_path, teacher, *LABELLED))
    assert "teacher train.json: not measured: " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"min_map is 1 and the teacher cannot be measured: .*train.json"):
        pipeline.distill(recipe(tmp_path, teacher | {"min_map": 1}, *LABELLED, "name=other"))


def test_results_by_id_are_for_images_with_ids_of_their_own(tmp_path: Path) -> None:
    """Generated training and validation images both count from 1: a list of results cannot mean both."""
    from compress.run.data import splits

    plain = tiny_recipe.recipe(tmp_path)
    drawn = json.loads(splits(plain.data, plain.runs)[1].annotations.read_text())["annotations"]
    rows = [{key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for row in drawn]
    (tmp_path / "val.json").write_text(json.dumps(rows))
    wanted = r"val.json: image_id \d+ stands for two images, .*val.*\.\w+ and .*train.*\.\w+; give a COCO document"
    with pytest.raises(UserError, match=wanted):
        pipeline.distill(recipe(tmp_path, {"results": str(tmp_path / "val.json")}, *LABELLED))


def test_boxes_alone_cannot_teach_methods(tmp_path: Path) -> None:
    ssd = KINDS["torchvision"](tmp_path)
    with pytest.raises(UserError, match=r"teacher.torchvision: .* gives boxes alone, and methods.bckd learns from"):
        pipeline.distill(recipe(tmp_path, ssd))
    wanted = r"tiny.yaml:15: methods.bckd: learns from features or logits, and teacher.onnx gives boxes alone"
    with pytest.raises(UserError, match=wanted):
        recipe(tmp_path, KINDS["a file of this project"](tmp_path))


def test_logits_need_the_datas_classes(tmp_path: Path) -> None:
    teacher = {"torchvision": {"model": "fcos_resnet50_fpn", "weights": "none", "class_names": list(NAMES)[::-1]}}
    with pytest.raises(UserError, match=r"the teacher calls label 0 .*; methods on logits need the same classes"):
        pipeline.distill(recipe(tmp_path, teacher))
    teacher["torchvision"]["class_names"] = ["person"]
    with pytest.raises(UserError, match="the teacher knows 1 classes, the data has 3"):
        pipeline.distill(recipe(tmp_path, teacher))


def test_features_may_come_from_other_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = {
        "torchvision": {"model": "fcos_resnet50_fpn", "weights": "none", "class_names": ["person", NAMES[1]],
                        "short": 64, "long": 64}
    }  # fmt: skip
    pipeline.distill(recipe(tmp_path, teacher, "methods={fgd: {}}", "train.steps=3"))
    said = capsys.readouterr().out
    assert f"1 classes matched by name: {NAMES[1]}" in said and "left out: person" in said
    assert f"it does not look for: {NAMES[0]}, {NAMES[2]}" in said and "over the 1 classes that it looks for" in said


def test_a_checkpoint_of_other_classes_teaches_by_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The teacher is measured over what it shares with the data, and is not among the files that the report
    compares."""
    path = random_teacher(tmp_path / "other.safetensors", ("person", NAMES[1]), 1)
    run_dir = pipeline.run(recipe(tmp_path, {"checkpoint": path}, "methods={fgd: {}}", "train.steps=3"))
    said = capsys.readouterr().out
    assert f"teacher other.safetensors: 1 classes matched by name: {NAMES[1]}" in said and "left out: person" in said
    assert "teacher other.safetensors sees images: short side 64, long side 64, RGB, mean 123.7" in said
    report = json.loads((run_dir / "report.json").read_text())
    check = json.loads((run_dir / "manifest.json").read_text())["stages"]["teacher_check"]["result"]["metrics"]
    assert report["models"]["teacher"] == check
    assert [row["file"] for row in report["artifacts"]] == ["student.safetensors", "student.onnx"]


def test_a_checkpoint_must_fit_what_is_learned_from_it(tmp_path: Path) -> None:
    turned = {"checkpoint": random_teacher(tmp_path / "turned.safetensors", tuple(NAMES)[::-1], 1)}
    same_order = r"need(s)? the same classes in the same order"
    with pytest.raises(
        UserError, match=rf"teacher.checkpoint: the teacher calls label 0 .*; methods on logits {same_order}"
    ):
        pipeline.distill(recipe(tmp_path, turned))
    with pytest.raises(UserError, match=rf"teacher.checkpoint: .*; teacher.inherit {same_order}"):
        pipeline.distill(recipe(tmp_path, turned | {"inherit": True}, "methods={fgd: {}}"))


def test_a_checkpoint_without_names_has_the_datas_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = pipeline.distill(recipe(tmp_path, gfl_of_mmdet(tmp_path), "train.steps=3"))
    assert "teacher gfl.pth: does not name its classes; they are taken for the data's" in capsys.readouterr().out
    assert "teacher_check" in json.loads((run_dir / "manifest.json").read_text())["stages"]


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"onnx": {"fil": "a"}}, "--set teacher: teacher.onnx.fil: unknown key; did you mean file?"),
        ({"onnx": {"file": "a", "class_names": ["a"]}}, "class_names: needs output as well"),
        ({"onnx": {"file": "a", "output": {"combined": "x"}}}, "class_names: missing; a foreign file does not name"),
        ({"onnx": {"file": "a", "class_names": ["a"], "output": {}}}, "output: needs combined, or boxes and scores"),
        (
            {"onnx": {"file": "a", "class_names": ["a"], "output": {"combined": "x", "boxes": "y"}}},
            "output.boxes: excludes combined",
        ),
        (
            {"onnx": {"file": "a", "class_names": ["a"], "output": {"boxes": "y", "transposed": True}}},
            "output.transposed: belongs to combined",
        ),
        ({"onnx": {"file": "a", "class_names": ["a", "a"]}}, "'a' is listed twice"),
        ({"results": "a.json", "checkpoint": "b.pth"}, "excludes teacher.checkpoint; keep one of the two"),
        ({"torchvision": {"model": "ssd300_vgg16", "weights": "coco", "short": 9}}, "sees images of one size only"),
        ({"torchvision": {"model": "ssd", "weights": "coco"}}, "'ssd' is not one of retinanet_resnet50_fpn"),
        ({"results": "a.json", "inherit": True}, "inherit: needs a teacher of this project, not teacher.results"),
    ],
)
def test_a_wrong_section_is_one_line(tmp_path: Path, teacher: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(tmp_path, teacher, "methods.bckd=null")
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- command line


def test_the_command_takes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results by their path, a foreign file by a description of it."""
    found = results(tmp_path)
    data = next((tmp_path / "runs" / "data").iterdir())
    (tmp_path / "spot.yaml").write_text(yaml.dump({"teacher": foreign(tmp_path)}))
    sizes = ["--short", "64", "--long", "64", "--workers", "0"]
    for teacher in (found["results"], str(tmp_path / "spot.yaml")):
        out = tmp_path / f"{Path(teacher).stem}-labels.json"
        arguments = ["pseudo-label", teacher, "--images", str(data / "val.json"), "--root", str(data / "images")]
        assert command([*arguments, "--out", str(out), *sizes]) == 0
        document = json.loads(out.read_text())
        assert len(document["images"]) == 8 and document["annotations"]
        (provenance,) = document["info"]["pseudo_labels"]["teachers"]
        assert provenance["file"] == ("truth.json" if teacher.endswith("json") else "spot.onnx")
        assert ("settings" in provenance) == teacher.endswith("yaml")
    capsys.readouterr()
    wrong = ["pseudo-label", str(tmp_path / "none.yaml"), "--images", str(data / "images"), "--out", "x.json"]
    assert command(wrong) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none.yaml'}: no such teacher file\n"


def command(words: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert isinstance(caught.value.code, int)
    return caught.value.code
