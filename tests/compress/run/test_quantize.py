"""What a search for float layers is scored on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.config.data import Split
from compress.run.quantize import write_search_split
from deploy.core.errors import UserError
from deploy.quantize.calibrate import choose_images
from tests.helpers.coco_sets import A, truth

IMAGES = 6


def test_a_search_is_scored_on_images_that_calibrate_nothing(tmp_path: Path) -> None:
    document = truth(*({"bbox": A, "image_id": i} for i in range(IMAGES)), images=range(IMAGES))
    files = [tmp_path / row["file_name"] for row in document["images"]]
    for index, file in enumerate(files):
        file.write_bytes(bytes([index]))
    (tmp_path / "train.json").write_text(json.dumps(document))
    split, out = Split(annotations=tmp_path / "train.json", images=tmp_path), tmp_path / "search.json"
    calibration = choose_images(files, 4)
    write_search_split(split, calibration, 300, out)
    scored = {row["file_name"] for row in json.loads(out.read_text())["images"]}
    assert scored == {file.name for file in files} - {file.name for file in calibration.files}
    with pytest.raises(UserError, match=r"^deploy\.int8\.images: every labelled .*--calibration-images.*--data\)$"):
        write_search_split(split, choose_images(files, 128), 300, out)
