"""The detections of a picture: what they hold, how they are chosen from, and what they become."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deploy.core.detections import Detection, Detections
from deploy.core.draw import COLORS
from deploy.core.errors import UserError

BOXES = np.array([[10, 20, 40, 60], [0, 0, 7, 8.5], [5, 5, 6, 6]], np.float32)


def found(**changes: Any) -> Detections:
    fields: dict[str, Any] = {
        "boxes": BOXES,
        "scores": np.array([0.9, 0.5, 0.25], np.float32),
        "labels": np.array([1, 0, 1]),
        "class_names": ("cat", "dog"),
        "category_ids": (3, 7),
    }
    return Detections(**{**fields, **changes})


def test_one_by_one() -> None:
    first = Detection((10.0, 20.0, 40.0, 60.0), np.float32(0.9).item(), 1, "dog", 7)
    detections = found()
    assert len(detections) == 3 and next(iter(detections)) == detections[0] == first
    assert [one.class_name for one in detections] == ["dog", "cat", "dog"] and detections[-1].score == 0.25
    assert found(category_ids=None)[0].category_id is None
    with pytest.raises(IndexError):
        detections[3]


def test_chosen_ones_keep_what_they_belong_to() -> None:
    detections = found(path=Path("a.jpg"))
    for chosen in (detections[detections.scores >= 0.5], detections[:2], detections[[0, 1]]):
        assert chosen.boxes.tolist() == BOXES[:2].tolist() and chosen.labels.tolist() == [1, 0]
        assert chosen.class_names == ("cat", "dog") and chosen.path == Path("a.jpg")
    assert len(detections[[]]) == 0 and detections[[]].boxes.shape == (0, 4)
    assert repr(detections) == "<3 detections in a.jpg: dog 0.90, cat 0.50, dog 0.25>"
    assert repr(found()[[]]) == "<0 detections>"


def test_equal_means_every_bit() -> None:
    assert found() == found(path=Path("elsewhere.png")) and found() != found()[:2]
    assert found() != found(boxes=BOXES + np.float32(1e-5)) and found() != found(class_names=("cat", "cow"))
    with pytest.raises(ValueError, match=r"boxes \[3, 4\], scores \[2\]"):
        found(scores=np.zeros(2, np.float32))


def test_coco_rows() -> None:
    rows = found().to_coco(42)
    assert rows[0] == {"image_id": 42, "category_id": 7, "bbox": [10.0, 20.0, 30.0, 40.0], "score": found()[0].score}
    assert [row["category_id"] for row in found().to_coco(42, (1, 2))] == [2, 1, 2]
    assert found(category_ids=None).to_coco(1, (1, 2))[1]["bbox"] == [0.0, 0.0, 7.0, 8.5]
    with pytest.raises(UserError, match="give category_ids"):
        found(category_ids=None).to_coco(1)
    with pytest.raises(UserError, match="to_coco: 1 category_ids for 2 classes"):
        found().to_coco(1, (1,))


def test_supervision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments have the names and the shapes of supervision 0.31."""
    library = ModuleType("supervision")
    library.Detections = lambda **fields: SimpleNamespace(**fields)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "supervision", library)
    theirs = found().to_supervision()
    assert theirs.xyxy.tolist() == BOXES.tolist() and theirs.confidence.tolist() == [found()[i].score for i in range(3)]
    assert theirs.class_id.tolist() == [1, 0, 1] and theirs.data["class_name"].tolist() == ["dog", "cat", "dog"]
    assert len(found()[[]].to_supervision().data["class_name"]) == 0
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        found().to_supervision()


def test_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    frame = found().to_pandas()
    assert list(frame.columns) == ["class_name", "category_id", "score", "x1", "y1", "x2", "y2", "path"]
    assert frame[["x1", "y1", "x2", "y2"]].to_numpy().tolist() == BOXES.tolist()
    assert frame.class_name.tolist() == ["dog", "cat", "dog"] and frame.path.isna().all()
    assert len(pandas.concat([frame, found()[[]].to_pandas()])) == 3
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        found().to_pandas()


def test_fiftyone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments have the names and the shapes of fiftyone 1.17."""
    library = ModuleType("fiftyone")
    library.Detections = library.Detection = lambda **fields: SimpleNamespace(**fields)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fiftyone", library)
    first = found().to_fiftyone((100, 200)).detections[0]
    assert (first.label, first.confidence) == ("dog", found()[0].score)
    assert first.bounding_box == pytest.approx([0.05, 0.2, 0.15, 0.4])
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(UserError, match="pip install fiftyone"):
        found().to_fiftyone((100, 200))


def test_a_name_at_the_right_edge_is_drawn_inside(tmp_path: Path) -> None:
    grey = np.full((200, 200, 3), 90, np.uint8)
    boxes = np.array([[20, 50, 120, 150], [190, 150, 199, 190]], np.float32)
    detections = found(boxes=boxes, scores=np.array([0.9, 0.3], np.float32), labels=np.array([0, 1]))
    drawn = np.asarray(detections.plot(grey))
    color = np.array([int(COLORS[1][i : i + 2], 16) for i in (1, 3, 5)])
    name = (drawn[135:150] == color).all(2).any(0)
    assert name[160:199].all(), "the whole name, not the 9 pixels over the box"


def test_plot_draws_each_box_in_the_color_of_its_class(tmp_path: Path) -> None:
    grey = np.full((200, 200, 3), 90, np.uint8)
    boxes = np.array([[20, 50, 120, 150], [150, 150, 180, 190]], np.float32)
    detections = found(boxes=boxes, scores=np.array([0.9, 0.3], np.float32), labels=np.array([0, 1]))
    drawn = np.asarray(detections.plot(grey))
    color = [np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) for code in COLORS[:2]]
    assert (drawn[100, 20] == color[0]).all() and (drawn[180, 150] == color[1]).all()
    assert (drawn[100, 60] == 90).all() and (grey == 90).all()
    assert (np.asarray(detections.plot(grey, min_score=0.5))[180, 150] == 90).all()
    path = tmp_path / "grey.png"
    Image.fromarray(grey).save(path)
    assert (np.asarray(found(boxes=BOXES, path=path).plot()) == np.asarray(found().plot(path.read_bytes()))).all()
    with pytest.raises(UserError, match="give the picture"):
        detections.plot()
