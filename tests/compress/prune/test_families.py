"""Every family that trains here, cut in half: it trains, is saved and loaded, goes on exactly, and is exported."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compress.config.deploy import Deploy
from compress.config.prune import Cut
from compress.config.recipe import Recipe
from compress.detectors.base import Detector, ImageSize
from compress.detectors.build import model_of, model_size
from compress.detectors.checkpoints import ModelRecord, check_described, load_detector, save_detector
from compress.export.onnx import export_checkpoint, torch_runner
from compress.prune.search import Means, prune
from compress.run import plans
from compress.run.data import open_data
from compress.run.pruned import PrunedStudent
from compress.run.trainings import train
from deploy.quantize.calibrate import choose_images, list_images
from deploy.quantize.file import Quantizer
from deploy.runtimes.onnx import OnnxRunner
from tests.helpers import tiny_recipe
from tests.helpers.pruned import CLASSES, SIZE, batch, detector, outputs, pictures
from tests.helpers.training_runs import fabric

pytestmark = pytest.mark.usefixtures("few_rounds")

NAMES = ("red", "green", "blue")
FAMILIES = ("gfl", "fcos", "retinanet", "faster_rcnn")


@functools.cache
def cut_once(family: str, backbone: str) -> Detector:
    found = prune(detector(family, backbone=backbone), Cut(gflops=0.5), Means((SIZE, SIZE)))
    assert 0.3 * found.whole < found.found <= 0.5 * found.whole
    assert found.found == model_size(found.detector, (SIZE, SIZE))["gflops"]
    return found.detector


def cut_in_half(family: str, backbone: str = "nano") -> Detector:
    """What is left of a detector at half its operations."""
    return copy.deepcopy(cut_once(family, backbone))


def saved(path: Path, smaller: Detector) -> ModelRecord:
    record = ModelRecord(
        model=model_of(smaller), num_classes=CLASSES, class_names=NAMES, category_ids=(2, 5, 7), val_map=12.5
    )
    check_described(path, smaller, record)
    save_detector(path, smaller, metadata=record)
    return record


@pytest.mark.parametrize(
    ("family", "backbone"),
    [
        *((family, "nano") for family in FAMILIES),
        *(
            pytest.param(family, backbone, marks=pytest.mark.exhaustive)
            for family in FAMILIES
            for backbone in ("resnet18", "mobilenet_v3_small", "nano2x")
        ),
    ],
)
def test_half_a_detector_trains_and_comes_back_from_its_file(family: str, backbone: str, tmp_path: Path) -> None:
    smaller = cut_in_half(family, backbone)
    data = batch()
    smaller.train()
    optimizer = torch.optim.SGD(smaller.parameters(), lr=1e-3)
    before = {key: value.clone() for key, value in smaller.named_parameters()}
    prediction = smaller(data.images)
    torch.stack(list(smaller.loss(prediction, smaller.assign(prediction, data.targets)).values())).sum().backward()
    optimizer.step()
    assert all(value.isfinite().all() for value in smaller.parameters())
    unmoved = [key for key, value in smaller.named_parameters() if torch.equal(value, before[key])]
    assert len(unmoved) < 0.1 * len(before), unmoved

    record = saved(tmp_path / "half.safetensors", smaller.eval())
    loaded, again = load_detector(tmp_path / "half.safetensors")
    assert again == record and again.model.widths == model_of(smaller).widths and again.class_names == NAMES
    assert loaded.feature_channels == smaller.feature_channels < 32
    weights = smaller.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())
    # Of the same weights in another order in memory, PyTorch's convolutions round otherwise.
    torch.testing.assert_close(outputs(loaded, pictures(2)), outputs(smaller, pictures(2)), rtol=1e-5, atol=1e-6)
    sizes = [ImageSize((SIZE, SIZE), (SIZE, SIZE))] * 2
    with torch.no_grad():
        for a, b in zip(*(x.decode(x(pictures(2)), sizes) for x in (loaded, smaller)), strict=True):
            torch.testing.assert_close((a.boxes, a.scores), (b.boxes, b.scores), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family", ["gfl", *(pytest.param(family, marks=pytest.mark.exhaustive) for family in FAMILIES[1:])]
)
def test_a_training_of_a_pruned_student_goes_on_exactly(family: str, tmp_path: Path) -> None:
    """Stopped after three of six steps."""
    smaller = cut_in_half(family)
    saved(tmp_path / "pruned.safetensors", smaller)
    start = PrunedStudent(model_of(smaller), tmp_path / "pruned.safetensors")

    def trained(recipe: Recipe, stops: list[int | None]) -> Detector:
        f = fabric()
        data = open_data(plans.data_plan(recipe), f)
        for stop in stops:
            train(f, plans.student_plan(recipe, pruned=start), data, resume=True, max_steps=stop)
        found, record = load_detector(recipe.run_dir / "student.safetensors")
        assert record.model.widths == model_of(smaller).widths and record.class_names is not None
        return found

    whole, resumed = (
        trained(tiny_recipe.recipe(tmp_path / name), stops) for name, stops in (("a", [None]), ("b", [3, None]))
    )
    states = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    assert not torch.equal(states[0]["backbone.stem.0.weight"], smaller.state_dict()["backbone.stem.0.weight"])


@pytest.mark.exhaustive  # tests/compress/cli/test_prune.py exports one
@pytest.mark.parametrize("family", ["gfl", "fcos", "retinanet"])
def test_files_of_a_pruned_detector_give_what_torch_gives(family: str, tmp_path: Path) -> None:
    """At batch 1, 2 and the largest; its int8 file nearly so."""
    smaller = cut_in_half(family)
    checkpoint = tmp_path / "half.safetensors"
    saved(checkpoint, smaller)
    folder = tmp_path / "images"
    folder.mkdir()
    images = pictures(8, seed=3).numpy()
    for index, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{index}.png")
    settings = Deploy(max_batch=4, candidates=100, score_threshold=0.3)
    files = list_images(folder)
    report = export_checkpoint(checkpoint, tmp_path / "half.onnx", settings, input_size=(SIZE, SIZE), images=files)
    assert report.batches == (1, 2, 4) and report.matched == 1.0
    wanted = torch_runner(str(checkpoint), settings, (SIZE, SIZE))
    runner = OnnxRunner(tmp_path / "half.onnx", threads=1)
    for count in (1, 2, 4):
        found, expected = runner(images[:count]), wanted(images[:count])
        assert expected.count.min() >= 2
        np.testing.assert_array_equal(found.count, expected.count)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-2)
    int8 = Quantizer(tmp_path / "half.onnx", choose_images(files, 8), "cpu").save(tmp_path / "half.int8.onnx")
    assert int8.layers > 10 and 0 < int8.score_error < 0.3
    whole_bytes = sum(value.numel() for value in detector(family).state_dict().values()) * 4
    assert (tmp_path / "half.onnx").stat().st_size < whole_bytes
