"""Commands on exported files: validate, benchmark, export."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import deploy
from deploy.core.card import METADATA_KEY
from tests.helpers.command_line import RECIPE, Run

# ------------------------------------------------------------------------------------- commands on real files


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a deployable file of the tiny detector, images and labels that fit it."""
    from tests.helpers.cheap_exports import tiny_file
    from tests.helpers.tiny_onnx import CARD

    folder = tmp_path_factory.mktemp("exported")
    shutil.copy(tiny_file(tmp_path_factory), folder / "tiny.onnx")
    (folder / "copy.onnx").write_bytes((folder / "tiny.onnx").read_bytes())
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(3):
        pixels = rng.integers(0, 256, (*CARD.input_size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        height, width = CARD.input_size
        rows.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
    names = zip(CARD.category_ids, CARD.class_names, strict=True)
    document = {
        "images": rows,
        "categories": [{"id": number, "name": name} for number, name in names],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 2, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}],
    }
    found = deploy.open(folder / "tiny.onnx").detect(folder / "images" / "0.png")[:1].to_coco(0)
    document["annotations"] += [{**row, "id": 2, "area": 400, "iscrowd": 0} for row in found]
    (folder / "labels.json").write_text(json.dumps(document))
    return folder


def test_validate(run: Run, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported)
    line = "validate copy.onnx --data labels.json --images images --reference tiny.onnx --json out.json"
    code, out, err = run(line)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "next: compress benchmark copy.onnx tiny.onnx --images images"
    rows = json.loads(Path("out.json").read_text())
    assert [row["gate"] for row in rows] == ["pass", "pass"]
    assert f"copy.onnx: best F1 {rows[0]['metrics']['operating_point']['f1']:.3f} at a score of " in out
    assert "copy.onnx: points of AP50 lost to errors (TIDE): " in out
    assert rows[0]["analysis"] == rows[1]["analysis"] and rows[0]["analysis"]["errors"] is not None


def test_validate_says_what_the_training_of_a_file_measured(
    run: Run, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(exported)
    model = onnx.load("tiny.onnx")
    (row,) = (row for row in model.metadata_props if row.key == METADATA_KEY)
    row.value = json.dumps({**json.loads(row.value), "val_map": 40.0})
    onnx.save(model, "trained.onnx")
    code, out, err = run("validate trained.onnx tiny.onnx --data labels.json --images images")
    assert (code, err) == (0, "") and "trained.onnx: its training measured 40.00 mAP on its own validation" in out
    assert "tiny.onnx: its training" not in out, "its card does not say"


def test_values_that_are_not_finite_fail_the_gate(run: Run, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one box of the labels is found by neither file, so mAP alone would pass; the other file is judged as well."""
    from tests.helpers.harmed_graphs import harmed, log_of_negative

    monkeypatch.chdir(exported)
    harmed(Path("tiny.onnx"), Path("nan.onnx"), log_of_negative)
    line = "validate nan.onnx copy.onnx --data labels.json --images images --reference tiny.onnx --max-map-drop 100"
    code, out, err = run(f"{line} --json nan.json")
    assert (code, err) == (1, "failed: gate of 100 mAP points: nan.onnx\n")
    assert "COCO mAP on 3 images" in out
    assert "nan.onnx: 3 of 3 images have values that are not finite" in out
    assert "first diverging tensor: 'dense_boxes'" in out
    assert [row["gate"] for row in json.loads(Path("nan.json").read_text())] == ["fail", "pass", "pass"]


def test_one_file_is_validated_on_several_providers(run: Run, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first provider is the reference. Without a GPU the others are an error, or say what ran in their place."""
    from deploy.core import cuda_driver
    from deploy.runtimes import open as files
    from deploy.runtimes.base import DetectionBatch

    monkeypatch.chdir(exported)
    line = "validate tiny.onnx --data labels.json --images images --provider cpu,cuda --json out.json"
    if cuda_driver.gpu() is None:
        code, _, err = run(line)
        assert code == 2 and err.startswith("error: tiny.onnx: provider 'cuda' does not come up here, cpu would run it")
        assert err.count("\n") == 1
        assert run(f"{line} --allow-fallback")[0] == 0
        rows = json.loads(Path("out.json").read_text())
        assert [(row["name"], row["backend"]) for row in rows] == [
            ("tiny.onnx (cpu)", "onnxruntime cpu"),
            ("tiny.onnx (cuda)", "onnxruntime cpu"),
        ]
    real = files.open_runner
    asked: list[tuple[str, ...]] = []

    class Blind:
        """Finds nothing."""

        def __init__(self, runner: Any) -> None:
            self.runner, self.card, self.backend, self.on_cpu = runner, runner.card, "fake cuda", False

        def __call__(self, images: np.ndarray) -> DetectionBatch:
            found = self.runner(images)
            return DetectionBatch(found.boxes, found.scores, found.labels, found.count * 0)

    def open_runner(path: Path, providers: tuple[str, ...], **options: Any) -> Any:
        asked.append(providers)
        cpu = real(path, ("cpu",), threads=1)
        return cpu if providers != ("cuda",) else Blind(cpu)

    monkeypatch.setattr(files, "open_runner", open_runner)
    document = json.loads(Path("labels.json").read_text())
    found = real(Path("tiny.onnx"))(np.asarray(Image.open("images/0.png")).transpose(2, 0, 1)[None])
    x, y, right, bottom = map(float, found.boxes[0, 0])
    category = real(Path("tiny.onnx")).card.category_ids[int(found.labels[0, 0])]
    document["annotations"][0] |= {"bbox": [x, y, right - x, bottom - y], "category_id": category}
    document["annotations"][0]["area"] = (right - x) * (bottom - y)
    Path("seen.json").write_text(json.dumps(document))
    code, _, err = run(line.replace("labels", "seen").replace("cpu,cuda", "cpu,tensorrt,cuda"))
    assert asked == [("cpu",), ("tensorrt",), ("cuda",)]
    rows = json.loads(Path("out.json").read_text())
    assert [(row["name"], row["gate"], row["map_drop"] > 0.5) for row in rows] == [
        ("tiny.onnx (cpu)", "pass", False),
        ("tiny.onnx (tensorrt)", "pass", False),
        ("tiny.onnx (cuda)", "fail", True),
    ]
    assert (code, err) == (1, "failed: gate of 0.5 mAP points: tiny.onnx (cuda)\n")

    # the reference is the file that --reference names, on the first provider
    code, _, err = run(f"{line.replace('labels', 'seen').replace('cpu,cuda', 'cuda,cpu')} --reference copy.onnx")
    rows = json.loads(Path("out.json").read_text())
    assert [row["name"] for row in rows] == [
        "tiny.onnx (cuda)",
        "tiny.onnx (cpu)",
        "copy.onnx (cuda)",
        "copy.onnx (cpu)",
    ]
    assert code == 0 and rows[2]["map_drop"] == 0 and rows[1]["map_drop"] < 0


def test_validate_names_the_wrong_row(run: Run, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported)
    document = json.loads(Path("labels.json").read_text())
    del document["images"][2]["file_name"]
    Path("nameless.json").write_text(json.dumps(document))
    code, _, err = run("validate tiny.onnx --data nameless.json --images images")
    assert (code, err) == (2, "error: nameless.json: images[2]: file_name is missing\n")


def test_benchmark(exported: Path) -> None:
    """Run in a process of its own, which also shows that it runs without torch."""

    def benchmark(options: str) -> str:
        code = (
            "import sys; sys.modules['torch'] = None; from compress.cli import main; "
            f"main({['benchmark', 'tiny.onnx', *options.split(), '--seconds', '0.1', '--warm-up', '0']!r})"
        )
        outcome = subprocess.run(
            [sys.executable, "-c", code], cwd=exported, capture_output=True, text=True, timeout=600
        )
        assert (outcome.returncode, outcome.stderr) == (0, "")
        return outcome.stdout

    benchmark("--images images --batch 1,2 --json latency.json")
    cells = json.loads((exported / "latency.json").read_text())["cells"]
    assert {cell["batch_size"] for cell in cells} == {1, 2}
    assert benchmark("").startswith("no --images: measuring on eight drawn images of 96x96 pixels\n")


def test_benchmark_against_a_result_of_before(exported: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two results of one file are equal; one with all times three times as long fails the gate."""
    monkeypatch.chdir(exported)
    options = "tiny.onnx --images images --scope h2d+compute+d2h --seconds 0.5 --warm-up 1 --threads 1"
    assert run(f"benchmark {options} --json old.json --markdown old.md")[0] == 0
    assert "](old.svg)" in Path("old.md").read_text() and Path("old.svg").read_text().startswith("<svg")
    code, out, _ = run("benchmark --compare old.json old.json")
    assert code == 0 and "no difference seen" in out and "measured at different times" in out
    content = json.loads(Path("old.json").read_text())
    for cell in content["cells"]:
        cell["samples_ms"] = [[3 * ms for ms in part] for part in cell["samples_ms"]]
    Path("slow.json").write_text(json.dumps(content))
    code, out, err = run("benchmark --compare old.json slow.json --tolerance 5")
    assert (
        code == 1 and err.startswith("failed: tiny.onnx is more than 5 % slower than tiny.onnx: p") and "+200.0%" in err
    )
    assert run("benchmark --compare slow.json old.json")[0] == 0
    assert run("benchmark --compare old.json slow.json --tolerance 1000")[0] == 0


def test_benchmark_under_load(exported: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported)
    code, out, _ = run(
        "benchmark tiny.onnx --images images --scenario server --rate 400 --seconds 0.1 --warm-up 0.2 --threads 1"
    )
    assert code == 0 and "requests/s" in out and " 400 " in out
    code, out, _ = run(
        "benchmark tiny.onnx --images images --scenario multi-stream --streams 2 --seconds 0.2 --warm-up 0.2"
    )
    assert code == 0 and "multi-stream" in out and "for each of 2 sessions" in out
    code, out, _ = run(
        "benchmark tiny.onnx --images images --scenario offline --batch 1,2 --scope compute --seconds 0.2 --warm-up 0.2"
    )
    assert code == 0 and "most images a second at batch" in out and "nothing is copied" in out


def test_a_published_checkpoint_is_exported_by_its_name(run: Run) -> None:
    from tests.helpers.cheap_exports import rounds

    code, _, err = run("export zoo:quickstart --images images --input-size 64x64")
    assert (code, err) == (2, "error: --out: say where the file goes; zoo:quickstart lies in no folder here\n")
    with rounds(4):
        code, out, err = run("export zoo:quickstart --images images --input-size 64x64 --out teacher.onnx --for tract")
    assert (code, err) == (0, "") and Path("teacher.onnx").is_file()
    assert out.splitlines()[-1] == "next: compress benchmark teacher.onnx teacher.tract.onnx --images images"
    given = "export zoo:quickstart --images images --input-size 64x64 --out new.onnx"
    code, out, err = run(f"{given} --precision fp32,bf16 --for openvino,tract")
    refused = (
        "error: new.bf16.onnx: is bf16, and only OpenVINO computes in it: give the fp32 file, whose numbers it has\n"
    )
    assert (code, out, err) == (2, "", refused) and not Path("new.onnx").exists()
    with rounds(4):
        code, out, _ = run(f"{given} --precision fp32,bf16")
    assert out.splitlines()[-1] == "next: compress benchmark new.onnx new.bf16.onnx --images images --provider openvino"
    code, _, err = run("export teacher.onnx --static-batch 1 --out teacher.onnx")
    assert (code, err.count("is what it is made of")) == (2, 1)
    code, _, err = run("export images --for tract")
    assert (code, err) == (2, "error: images: is a folder; name the file in it\n")


def test_export_takes_its_settings_from_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe beside the checkpoint says the thresholds, the input size and where images are."""
    from compress.config.model import Model
    from compress.detectors.build import build_detector
    from compress.detectors.checkpoints import ModelRecord, save_detector
    from deploy.runtimes.onnx import OnnxRunner
    from tests.helpers.cheap_exports import rounds

    model = Model(detector="examples.own_detector.centers:Centers", options={"width": 16})  # the quickest to export
    record = ModelRecord(model=model, num_classes=3, class_names=("a", "b", "c"), category_ids=(1, 2, 3))
    detector = build_detector(model, 3, 0)
    folder = Path("runs/example")
    folder.mkdir(parents=True)
    save_detector(folder / "student.safetensors", detector, metadata=record)
    text = RECIPE.replace("size: 64}", "size: 64, classes: 3}")
    (folder / "recipe.yaml").write_text(text + "deploy: {max_detections: 7, candidates: 50, max_batch: 2}\n")
    with rounds(4):
        code, out, err = run("export runs/example/student.safetensors --nms-threshold 0.5")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("next: compress validate runs/example/student.onnx --data runs/data/")
    card = OnnxRunner(folder / "student.onnx").card
    assert (card.input_size, card.max_detections, card.candidates, card.nms_threshold) == (
        (64, 64),
        7,
        50,
        0.5,
    )

    # With images and a size given, the recipe's own images may lie on another machine.
    shutil.rmtree("runs/data")
    monkeypatch.setattr("compress.data.synthetic.generate", None)
    line = "export runs/example/student.safetensors --images images --input-size 32x64 --out other.onnx"
    with rounds(4):
        code, out, err = run(line)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "next: compress benchmark other.onnx --images images"
    card = OnnxRunner(Path("other.onnx")).card
    assert (card.input_size, card.max_detections, card.short, card.long) == ((32, 64), 7, 64, 64)


def test_the_float_file_is_made_for_those_that_quantize_it() -> None:
    from compress.cli.export import _precisions

    assert _precisions("int8", ["mnn"]) == ["fp32", "int8"] == _precisions("fp32,int8", ["litert", "tract"])
    assert _precisions("int8", ["openvino", "tract"]) == ["int8"] == _precisions("int8", [])
    assert _precisions("fp16", ["mnn"]) == ["fp16"] and _precisions(None, ["mnn"]) == ["fp32"]


def test_a_missed_budget_leaves_no_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or it would ship as if it had met the budget."""
    import typer

    from compress.cli import student
    from compress.config.deploy import Deploy
    from compress.run import artifacts
    from compress.run.quantize import BudgetError, Quantizing
    from deploy.quantize.guided import GuidedResult

    def missed(*_: object, **__: object) -> None:
        raise BudgetError("student.int8.onnx: no choice", GuidedResult(0.5, 40.0, 3))

    monkeypatch.setattr(artifacts, "quantize_file", missed)
    out, settings = tmp_path / "student.int8.onnx", Deploy()
    plan = artifacts.ArtifactPlan(
        tmp_path / "student.onnx",
        artifacts.onnx_files(tmp_path / "student.onnx", ["int8"]),
        settings,
        quantizing=Quantizing(settings.int8),
        given={"fp32": tmp_path / "student.onnx"},
    )
    for older in (True, False):
        if older:
            out.write_bytes(b"of an earlier export")
        with pytest.raises(typer.Exit) as stop:
            student.make_files(plan)
        captured = capsys.readouterr()
        assert stop.value.exit_code == 1 and captured.err == "failed: student.int8.onnx: no choice\n"
        assert (f"{out}: removed; it was made by an earlier export" in captured.out) is older
        assert not out.exists()


def test_a_lost_map_fails_the_gate(run: Run, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels are what the reference detects, so another detector must be worse."""
    from deploy.core.canvas import letterbox
    from deploy.core.image import load_image
    from deploy.runtimes.onnx import OnnxRunner
    from tests.helpers.harmed_graphs import harmed, wrong_weight

    monkeypatch.chdir(exported)
    runner = OnnxRunner(Path("tiny.onnx"))
    document = json.loads(Path("labels.json").read_text())
    document["annotations"] = []
    for image in document["images"]:
        pixels = load_image(Path("images") / image["file_name"])
        found = runner(letterbox(pixels, runner.card.input_size, runner.card.pad_color)[0][None])
        for box, label in list(zip(found.boxes[0].tolist(), found.labels[0].tolist(), strict=True))[:5]:
            x, y, right, bottom = box
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": runner.card.category_ids[label],
                    "bbox": [x, y, right - x, bottom - y],
                    "area": (right - x) * (bottom - y),
                    "iscrowd": 0,
                }
            )
    Path("detected.json").write_text(json.dumps(document))
    harmed(Path("tiny.onnx"), Path("other.onnx"), wrong_weight)
    code, _, err = run(
        "validate other.onnx --data detected.json --images images --reference tiny.onnx --json lost.json"
    )
    assert code == 1
    assert err == "failed: gate of 0.5 mAP points: other.onnx\n"
    assert [row["gate"] for row in json.loads(Path("lost.json").read_text())] == ["fail", "pass"]
