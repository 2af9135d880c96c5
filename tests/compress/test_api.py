"""The package from Python: a run and its models, files without torch, and the same errors as on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch import Tensor

import compress
from compress import api
from compress.data.batch import Batch
from compress.detectors.base import Capability
from compress.distill.method import Method, Outputs
from deploy.core.errors import UserError
from deploy.core.image_folder import image_files
from tests.helpers import tiny_recipe

pytestmark = pytest.mark.usefixtures("few_rounds")

ROOT = Path(__file__).parents[2]
IMPORTED = "print(*sorted({'torch', 'numpy', 'onnxruntime'} & set(sys.modules)))"


class FeatureGap(Method):
    """A method of a user's own: mean square of the difference of the coarsest maps' means."""

    needs = frozenset({Capability.FEATURES})

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.calls = 0

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        gap = student.features[-1].float().mean((1, 2, 3)) - teacher.features[-1].float().mean((1, 2, 3))
        return {"gap": self.weight * gap.square().mean()}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny recipe as a dict, whose student learns by nothing that the recipe names."""
    text = tiny_recipe.TEXT.format(runs=tmp_path_factory.mktemp("api") / "runs")
    content = yaml.safe_load(text.replace("2e-3", "0.002"))  # which PyYAML alone takes for text
    return {**content, "methods": {}, "baseline": True}


@pytest.fixture(scope="module")
def run(content: dict[str, Any]) -> api.Run:
    return compress.distill(content, methods={"mine": FeatureGap(0.5)})


@pytest.fixture(scope="module")
def exported(run: api.Run) -> Any:
    return run.student.export(run.folder / "ship.onnx")


def images(run: api.Run) -> list[Path]:
    """The validation images of the run."""
    return image_files(next(run.folder.parent.rglob("val_000000.png")).parent)[-8:]


def test_a_run_trains_with_a_method_that_is_an_object(run: api.Run) -> None:
    assert (run.folder / "student.safetensors").is_file() and repr(run) == f"<run in {run.folder}>"
    header = (run.folder / "student" / "metrics.csv").read_text().splitlines()[0]
    assert "mine" in header and "gap" in header
    with pytest.raises(UserError, match=r"report.json: not found; compress.run writes it"):
        run.report  # noqa: B018


def test_every_model_of_a_run_detects(run: api.Run) -> None:
    files = images(run)
    for name in ("student", "baseline", "teacher"):
        model = getattr(run, name)
        assert model.runner.backend == "torch cpu" and model.card.input_size == (64, 64)
        found = model.detect(files)
        assert [one.path for one in found] == files and sum(map(len, found)) > 0
        assert len(found[0].class_names) == 3 and all((one.boxes <= 64).all() for one in found)


def test_an_exported_student_finds_what_the_checkpoint_finds(run: api.Run, exported: Any) -> None:
    files = images(run)
    for ours, theirs in zip(exported.detect(files), run.student.detect(files), strict=True):
        assert len(ours) == len(theirs) and np.array_equal(ours.labels, theirs.labels)
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.01)
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)


def test_the_file_is_validated_and_measured(run: api.Run, exported: Any) -> None:
    annotations = next(run.folder.parent.rglob("val.json"))
    result = exported.validate(annotations, annotations.parent / "images", reference=run.student)
    assert (result.gate, result.images) == ("pass", 8)
    report = exported.benchmark(images(run), seconds=0.1, rounds=2, warm_up_seconds=0.0, scopes=("end_to_end",))
    assert report.cells[0].latency_ms["p50"].value > 0


def test_a_checkpoint_is_pruned(run: api.Run) -> None:
    out = run.folder / "small.safetensors"
    small = run.student.prune({"params": 0.6}, out=out)
    assert small.path == out and small.card.input_size == (64, 64)
    assert small.card.class_names == run.student.card.class_names and small.card.val_map is None
    assert out.stat().st_size < 0.65 * run.student.path.stat().st_size
    assert len(small.detect(images(run)[0]).class_names) == 3
    for settings, says in (
        ({"params": 1}, r"prune.params: must be less than 1, got 1"),
        ({"params": 0.5, "importances": "taylor"}, r"prune.importances: unknown key; did you mean importance\?"),
    ):
        with pytest.raises(UserError, match=says):
            run.student.prune(settings, out=run.folder / "other.safetensors")
    val = next(run.folder.parent.rglob("val.json"))
    by_images = {"params": 0.6, "importance": "taylor"}
    with pytest.raises(UserError, match=r"val.json: is the run's validation set; prune.importance takes training imag"):
        run.student.prune(by_images, val, val.parent / "images", out=run.folder / "other.safetensors")
    assert run.student.prune(by_images, out=run.folder / "by_images.safetensors").path.is_file()
    with pytest.raises(UserError, match=r"small.safetensors: is there already"):
        run.student.prune({"params": 0.6}, out=out)


def test_a_checkpoint_is_opened_by_its_suffix(run: api.Run, tmp_path: Path) -> None:
    path = run.folder / "student.safetensors"
    model = compress.open(path)
    assert isinstance(model, api.Checkpoint) and model.card.input_size == (64, 64)
    assert compress.open(path, input_size=(96, 128)).card.input_size == (96, 128)
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"input_size: there is no .*recipe.yaml to take it from"):
        compress.open(alone)
    without = compress.open(alone, input_size=(64, 64))
    with pytest.raises(UserError, match=r"fp32: there is no .*recipe.yaml to take images from"):
        without.export()
    with pytest.raises(UserError, match=r"int8: there is no .*recipe.yaml to take calibration images from"):
        without.export(precision="int8", images=images(run))
    with pytest.raises(UserError, match="precision: 'fp8' is none of fp32, fp16, bf16, int8, mixed"):
        without.export(precision="fp8")


def test_mistakes_read_as_on_the_command_line(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe: nothing to distill with; add a method under methods"):
        compress.distill({key: value for key, value in content.items() if key not in ("teacher", "baseline")})
    with pytest.raises(UserError, match=r"none.yaml: no such recipe file"):
        compress.train(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"recipe: needs a file's path or a dict, got a value of type NoneType"):
        compress.load_recipe(None)
    with pytest.raises(UserError, match=r"methods: needs a dict of objects by name, got a value of type list"):
        compress.distill(content, methods=[1])
    with pytest.raises(
        UserError, match=r"teacher: a value of type str is no Detector and no BoxTeacher: it has no sha"
    ):
        compress.distill(content, methods={"a": 1}, teacher="teacher.safetensors")
    with pytest.raises(UserError, match=r"student: needs a function of the number of classes, got a value of type int"):
        compress.train(content, student=3)
    with pytest.raises(UserError, match=r"student: .* gives a value of type NoneType, no Detector"):
        compress.distill(content, methods={"a": 1}, student=lambda classes: None)
    with pytest.raises(UserError, match=r"input_size: of checkpoints, and .*a.onnx is none"):
        compress.open(tmp_path / "a.onnx", input_size=(64, 64))
    with pytest.raises(UserError, match=r"threads: of exported files, and .*a.safetensors is a checkpoint"):
        compress.open(tmp_path / "a.safetensors", threads=1)
    with pytest.raises(UserError, match=r"a.txt: ends in none of .onnx, .xml, .engine"):
        compress.open(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"student.safetensors: not found: the student is not trained yet"):
        api.Run(tmp_path).student  # noqa: B018


def test_folders_of_the_package_are_functions_too() -> None:
    import compress.run.pipeline as pipeline
    from compress.export import nms

    assert callable(compress.run) and compress.run.pipeline is pipeline and compress.export.nms is nms
    assert {"distill", "export", "load_recipe", "open", "run", "train", "Detections"} <= set(dir(compress))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        compress.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("code", "loads"),
    [
        ("", ""),
        ("assert callable(compress.run) and callable(compress.distill) and callable(compress.export)", ""),
        ("assert compress.load_recipe(RECIPE, partial=True).name == 'tiny'", ""),
        ("assert len(compress.open(FILE).detect(PICTURE).class_names) == 3", "numpy onnxruntime"),
        ("compress.Detections", "numpy"),
    ],
)
def test_torch_is_loaded_by_what_needs_it(run: api.Run, exported: Any, code: str, loads: str) -> None:
    names = {"RECIPE": run.folder / "recipe.yaml", "FILE": run.folder / "ship.onnx", "PICTURE": images(run)[0]}
    given = "".join(f"{name} = {json.dumps(str(path))}\n" for name, path in names.items())
    program = f"import sys, compress\n{given}{code}\n{IMPORTED}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == (loads, 0), done.stderr
