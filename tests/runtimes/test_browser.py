"""The trained quickstart student in ONNX Runtime Web, by the page of `--for web` in headless Chromium."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from deploy.core.card import ModelCard
from deploy.core.detections import Detections
from deploy.runtimes.onnx import OnnxRunner
from deploy.targets import web
from deploy.validate.accuracy import detect_all
from deploy.validate.agreement import agreement_of
from deploy.validate.coco import evaluate_coco
from deploy.validate.collected import Collected
from tests.helpers.browser import CHROMIUM, browser
from tests.helpers.web_site import answers, serving
from tests.runtimes.matrix import MOST, PRECISIONS, ROWS, Row

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: the page is not tried")
AT_ONCE = 30


@pytest.mark.parametrize("precision", PRECISIONS)
def test_map_is_onnx_runtimes(
    precision: str, files: dict[str, Path], labels: Path, measured: dict[Path, dict[str, Any]], tmp_path: Path
) -> None:
    source = files[precision]
    rows = json.loads(labels.read_text())["images"]
    pictures = {row["id"]: labels.parent / "images" / row["file_name"] for row in rows}
    runner = OnnxRunner(source)
    wanted = detect_all({"onnx": runner}, pictures, batch_size=8)["onnx"].detections
    web.make(source, tmp_path / "site")
    found, times = Collected(), []
    contents = [file.read_bytes() for file in pictures.values()]
    with serving(tmp_path) as address, browser() as page:
        page.open(f"{address}/site/")
        page.wait("document.querySelector('#server').textContent.startsWith('ready')")
        seen = [one for at in range(0, len(contents), AT_ONCE) for one in answers(page, contents[at : at + AT_ONCE])]
        assert page.complaints == []
    for image, answer in zip(pictures, seen, strict=True):
        found.add(image, _detections(answer, runner.card))
        times.append(answer["ms"])
    here, there = (evaluate_coco(labels, table.table()).map for table in (found, wanted))
    assert len(seen) == 300
    drop, times_as_long = there - here, median(times) / measured[source]["p50"]
    ROWS.append(Row("web", precision, here, drop, agreement_of(wanted, found).share, times_as_long))
    assert abs(drop) <= MOST[precision] and there == pytest.approx(measured[source]["metrics"]["map"], abs=0.05)


def _detections(answer: dict[str, Any], card: ModelCard) -> Detections:
    """What the page answers to a picture, in our type."""
    rows = answer["detections"]
    boxes = np.array([row["box"] for row in rows], np.float32).reshape(-1, 4)
    scores, classes = (np.array([row[key] for row in rows], kind) for key, kind in (("score", "f4"), ("label", "i8")))
    return Detections(boxes, scores, classes, tuple(card.class_names), tuple(card.category_ids))
