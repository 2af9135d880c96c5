"""The command line: every mistake is one line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress import __version__, cli
from deploy.core.errors import LocalUserError, UserError

RECIPE = """\
name: example
data: {synthetic: {train: 4, val: 2, size: 64}, short: 64, long: 64}
student: {backbone: nano}
train: {epochs: 1, batch_size: 2}
"""

Outcome = tuple[int, str, str]
Run = Callable[[str], Outcome]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in a folder that holds a few right and wrong files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    Path("good.yaml").write_text(RECIPE)
    Path("typo.yaml").write_text(RECIPE.replace("epochs", "epoch"))
    Path("twice.yaml").write_text(RECIPE + "name: again\n")
    Path("broken.yaml").write_text("name: [")
    Path("empty.yaml").write_text("")
    Path("latin.yaml").write_bytes(b"name: \xe9\n")
    Path("text.onnx").write_text("not a model")
    Path("model.pt").write_text("not a model")
    Path("text.safetensors").write_text("not a checkpoint")
    Path("broken.json").write_text("{")
    Path("list.json").write_text("[]")
    Path("date.yaml").write_text("names: 2020-99-99\n")
    Path("deep.yaml").write_text(f"names: {'[' * 3000}")
    Path("folder_xml/a.xml").mkdir(parents=True)
    Path("folder.json").mkdir()
    Path("folder.onnx").mkdir()
    Path("folder_report/report.html").mkdir(parents=True)
    Path("folder_report/report.json").write_text('{"name": "a", "models": {}}')
    Path("empty_report").mkdir()
    Path("empty_report/report.json").write_text("{}")
    Path("images").mkdir()
    Path("void").mkdir()
    Image.new("RGB", (64, 64)).save("images/a.png")
    Path("other").mkdir()
    Image.new("RGB", (64, 64), "red").save("other/b.png")
    boxless = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "a"}], "annotations": []}
    Path("boxless.json").write_text(json.dumps(boxless))
    Path("good.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
                "categories": [{"id": 1, "name": "thing"}],
                "annotations": [
                    {
                        "id": 1,
                        "image_id": 1,
                        "category_id": 1,
                        "bbox": [4, 4, 20, 20],
                        "area": 400,
                        "iscrowd": 0,
                    }
                ],
            }
        )
    )

    def run(line: str) -> Outcome:
        with pytest.raises(SystemExit) as stop:
            cli.main(shlex.split(line))
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("line", "says"),
    [
        # the command itself
        ("destill good.yaml", "No such command 'destill'"),
        ("--frobnicate", "No such option: --frobnicate"),
        ("data frobnicate", "No such command 'frobnicate'"),
        ("distill", "Missing argument 'RECIPE'"),
        ("distill good.yaml other.yaml", "unexpected extra argument"),
        ("run good.yaml --resum", "No such option: --resum"),
        ("run good.yaml --devices two", "--devices"),
        ("run good.yaml --devices 0", "--devices"),
        ("quickstart --set", "'--set' requires an argument"),
        ("validate", "Missing argument 'ARTIFACT...'"),
        ("validate a.onnx", "Missing option '--data'"),
        ("report", "Missing argument 'RUN'"),
        # recipes
        ("run none.yaml", "none.yaml: no such recipe file"),
        ("run images", "images: cannot read the recipe: Is a directory"),
        ("train latin.yaml", "latin.yaml: cannot read the recipe: not UTF-8 text"),
        ("train empty.yaml", "empty.yaml: the recipe is empty"),
        ("train broken.yaml", "broken.yaml:1: not valid YAML"),
        ("train twice.yaml", "twice.yaml:5: name: given twice (line 1)"),
        ("train typo.yaml", "typo.yaml:4: train.epoch: unknown key; did you mean epochs?"),
        ("train good.yaml --set train.epoch=3", "--set train.epoch: unknown key; did you mean epochs?"),
        ("train good.yaml --set train.epochs", "--set train.epochs: write it as key=value"),
        ("train good.yaml --set train.epochs=soon", "--set train.epochs: needs a whole number, got 'soon'"),
        ("train deep.yaml", "deep.yaml: not a recipe: nested too deeply"),
        (f"train good.yaml --set seed={'9' * 5000}", "--set seed: a number of more than 100 digits"),
        ("train good.yaml --set seed=4294967296", "--set seed: must be at most 4294967295"),
        ("train good.yaml --set train.steps=9", "--set train.steps: excludes epochs"),
        ("train good.yaml --devices 3", "2 is not a multiple of devices x accumulate = 3"),
        ("distill good.yaml", "good.yaml: nothing to distill with"),
        ("quickstart --set student.backbone=vgg", "'vgg' is not one of resnet18"),
        # data
        ("data synthetic out --classes 99", "classes is 99, must be from 2 to 24"),
        ("data synthetic out --train few", "--train"),
        ("data synthetic images", "images: exists and is not a synthetic dataset"),
        ("data convert coco images out.json", "'coco' is not one of 'yolo', 'voc'"),
        ("data convert yolo images out.json", "--names: yolo files only have class numbers"),
        ("data convert yolo none out.json --names a,b", "none"),
        ("data convert yolo void out.json --names a,b", "void: no images in it"),
        ("data convert yolo images out.json --names a,,b", "none empty"),
        ("data convert yolo images out.json --names none.yaml", "--names: none.yaml: No such file"),
        ("data convert yolo images out.json --names good.yaml", "--names: good.yaml: no key 'names'"),
        ("data convert yolo images out.txt --names a", "out.txt: OUT is a JSON file"),
        ("data convert voc images out.json --names a", "--names: voc files hold the class names themselves"),
        ("data convert voc images out.json", "images: no .xml files in it"),
        ("data convert voc folder_xml out.json", "a.xml: cannot be read: Is a directory"),
        ("data convert yolo images out.json --names date.yaml", "needs names numbered from 0"),
        ("data convert yolo images out.json --names deep.yaml", "--names: deep.yaml: not a YAML file"),
        ("data convert yolo images out.json --names latin.yaml", "--names: latin.yaml: not a YAML file"),
        ("data convert yolo images /proc/x.json --names a", "/proc/x.json: cannot be written: "),
        ("data convert yolo images images/a.png/x.json --names a", "images/a.png/x.json: cannot be written: Not a dir"),
        ("data convert yolo images folder.json --names a", "folder.json: is a folder"),
        ("data synthetic /proc/x", "/proc/x/train.json: cannot be written: "),
        ("data synthetic images/a.png/x", "images/a.png/x/train.json: cannot be written: Not a directory"),
        ("data check none.json --images images", "none.json"),
        ("data check broken.json --images images", "broken.json"),
        ("data check list.json --images images", "list.json"),
        ("data check good.json --images none", "--images: none: no such folder"),
        # checkpoints and exported files
        ("export none.safetensors", "none.safetensors: no such file"),
        ("export text.safetensors --out out.pb", "--out: out.pb does not end in .onnx"),
        ("export text.safetensors --images none", "--images: none: no such folder"),
        ("export text.safetensors --input-size 800", "--input-size: '800' is not HEIGHTxWIDTH"),
        ("export text.safetensors --input-size 100x100", "must be multiples of 32"),
        (
            "export text.safetensors --input-size 64x99999968",
            "--input-size: 99999968 should be less than or equal to 8",
        ),
        (f"export text.safetensors --input-size 64x{'9' * 5000}", "--input-size: at most 8192 pixels"),
        ("export text.safetensors --candidates 5000", "--candidates: 5000 should be less than or equal to 3840"),
        ("export text.safetensors --score-threshold nan", "--score-threshold"),
        ("export text.safetensors --out /proc/x.onnx", "/proc/x.onnx: cannot be written: "),
        ("export text.safetensors --out text.onnx/x.onnx", "text.onnx/x.onnx: cannot be written: Not a directory"),
        ("export text.safetensors --out folder.onnx", "folder.onnx: is a folder"),
        ("export text.safetensors --score-threshold 2", "--score-threshold"),
        ("export text.safetensors --max-detections 2000", "1000 is less than max_detections, 2000"),
        ("export text.safetensors", "--images: there is no recipe.yaml to take images from"),
        ("export text.safetensors --images images", "--input-size: there is no recipe.yaml to take it from"),
        ("export text.safetensors --images images --input-size 64x64", "text.safetensors"),
        ("export text.safetensors --images void --input-size 64x64", "--images: void: no images in it"),
        *(
            (f"export text.safetensors {option}", f"{option.split()[0]}: is about engines; add --trt")
            for option in (
                "--batch 1,8,32",
                "--workspace-gb 1",
                "--builder-optimization-level 0",
                "--version-compatible",
                "--hardware-compatible same",
                "--refit all",
                "--strip",
                "--timing-cache void",
            )
        ),
        *(
            (f"export text.onnx --trt {option}", f"{option.split()[0]}: is about making an ONNX file, and text.onnx is")
            for option in (
                "--images images",
                "--input-size 64x64",
                "--score-threshold 0",
                "--nms-threshold 0",
                "--max-detections 5",
                "--candidates 5",
                "--max-batch 5",
                "--precision int8",
                "--target cpu",
                "--calibration images",
                "--calibration-images 5",
                "--calibration-method minmax",
                "--max-map-drop 0",
                "--data good.json",
            )
        ),
        ("export text.onnx --triton-repo void --out x.engine", "--out: names the engine here; add --trt"),
        ("export text.onnx --triton-repo void --batch 1,8", "--batch: is about engines; add --trt"),
        ("export text.onnx --trt --strip --refit individual", "--refit: an engine without weights gets all of them"),
        ("export text.onnx --trt --strip --triton-repo void", "--strip: Triton cannot serve an engine without weights"),
        ("export text.safetensors --max-map-drop 0", "--max-map-drop: is about int8 files; add --precision fp32,int8"),
        ("export text.safetensors --target cpu", "--target: is about int8 files; add --precision fp32,int8"),
        # known before the export: text.safetensors is never opened
        *(
            (f"export text.safetensors --images images --input-size 64x64 --precision int8 --max-map-drop 1 {m}", says)
            for m, says in (
                ("--calibration other --data list.json", "list.json: COCO JSON is an object"),
                ("--calibration other --data boxless.json", "boxless.json: no boxes to measure mAP on"),
                ("--calibration images --data good.json", "1 of 1 calibration images are among the images that the"),
            )
        ),
        ("validate none.onnx --data good.json --images images", "none.onnx: no such file"),
        ("validate model.pt --data good.json --images images", "model.pt: neither .onnx nor .engine"),
        ("validate text.onnx --data good.json --images images", "text.onnx"),
        ("validate text.onnx text.onnx --data good.json --images images", "text.onnx: given twice"),
        ("validate text.onnx --data none.json --images images", "--data: none.json: no such file"),
        ("validate text.onnx --data good.json --images none", "--images: none: no such folder"),
        ("validate text.onnx --data good.json --images images --max-map-drop 1", "needs --reference"),
        ("validate text.onnx --data good.json --images images --max-map-drop -1", "--max-map-drop"),
        ("validate text.onnx --data good.json --images images --provider npu", "--provider: unknown provider 'npu'"),
        ("validate text.onnx --data good.json --images images --provider cpu,", "--provider: unknown provider ''"),
        ("validate text.onnx --data good.json --images images --provider cpu,cpu", "--provider: cpu is given twice"),
        ("validate text.onnx --data good.json --images images --json none/out.json", "folder does not exist"),
        ("validate text.onnx --data good.json --images images --json /proc/x.json", "/proc/x.json: cannot be written"),
        (
            "validate text.onnx --reference text.onnx --data good.json --images images --max-map-drop inf",
            "--max-map-drop: needs a finite number, got inf",
        ),
        *(
            (f"{command} {option}", f"{option.split()[0]}: is about {what}")
            for command in (
                "validate text.onnx --data good.json --images images",
                "benchmark text.onnx",
                "serve text.onnx",
            )
            for option, what in (
                ("--trt-cache void", ".onnx files on the TensorRT provider"),
                ("--ep-context --provider cuda", ".onnx files on the TensorRT provider"),
                ("--cuda-graph --provider tensorrt", "engines, and none is given"),
            )
        ),
        ("benchmark none.onnx", "none.onnx: no such file"),
        ("benchmark text.onnx", "text.onnx"),
        ("benchmark text.onnx --batch 1,two", "--batch: '1,two' is not a list of batch sizes"),
        ("benchmark text.onnx --batch 0", "--batch: '0' is not a list of batch sizes"),
        ("benchmark text.onnx --seconds 0", "--seconds"),
        ("benchmark text.onnx --seconds inf", "--seconds: needs a finite number, got inf"),
        ("benchmark text.onnx --seconds nan", "--seconds"),
        ("benchmark text.onnx --warm-up inf", "--warm-up: needs a finite number, got inf"),
        (f"benchmark text.onnx --batch {'9' * 5000}", "is not a list of batch sizes"),
        ("benchmark text.onnx --json /proc/x.json", "/proc/x.json: cannot be written"),
        ("benchmark text.onnx --json text.onnx/x.json", "text.onnx/x.json: cannot be written: Not a directory"),
        ("benchmark text.onnx --images none", "--images: none: no such folder"),
        ("benchmark text.onnx --json images", "images: is a folder"),
        ("benchmark", "ARTIFACT: name exported files to measure, or two results with --compare"),
        ("benchmark text.onnx --markdown latency.txt", "--markdown: latency.txt does not end in .md"),
        ("benchmark text.onnx --markdown none/latency.md", "--markdown: none/latency.md: its folder does not exist"),
        ("benchmark text.onnx --scope gpu", "--scope: unknown scope 'gpu': choose from preprocess, compute"),
        ("benchmark text.onnx --scenario batch", "--scenario"),
        ("benchmark text.onnx --streams 2", "--streams: single-stream has one; for 2 give --scenario multi-stream"),
        ("benchmark text.onnx --scenario multi-stream", "--streams: multi-stream needs at least 2"),
        ("benchmark text.onnx --rate 5", "--rate: only --scenario server has arrivals"),
        ("benchmark text.onnx --scenario server", "--scenario server: needs --rate (requests a second) or"),
        ("benchmark text.onnx --scenario server --rate 5,x", "--rate: '5,x' is not a list of requests a second"),
        ("benchmark text.onnx --scenario server --rate nan", "--rate: 'nan' is not a list of requests a second"),
        ("benchmark text.onnx --scenario server --latency-bound nan", "--latency-bound: needs a number of millisec"),
        ("benchmark text.onnx --scenario server --rate 5 --batch 1,2", "--batch: the server scenario takes one number"),
        ("benchmark text.onnx --scenario server --rate 5 --scope compute", "--scope: the server scenario takes one"),
        ("benchmark text.onnx --tolerance 2", "--tolerance: needs --compare, or several files"),
        ("benchmark text.onnx --tolerance nan", "--tolerance"),
        ("benchmark --compare none.json none.json", "none.json: no such file"),
        ("benchmark --compare text.onnx text.onnx", "text.onnx: not a JSON file"),
        ("benchmark text.onnx --compare a.json b.json", "--compare: takes two results and nothing else"),
        ("report none", "none"),
        ("report void", "void"),
        ("report empty_report", "empty_report/report.json: name: is missing"),
        ("report folder_report", "folder_report/report.html: Is a directory"),
    ],
)
def test_a_mistake_is_one_line(run: Run, tmp_path: Path, line: str, says: str) -> None:
    before = contents(tmp_path)
    code, out, err = run(line)
    (message,) = err.splitlines()
    assert message.startswith("error: ") and says in message
    assert code == 2
    assert out == ""
    assert contents(tmp_path) == before  # nothing new, nothing changed


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() if file.is_file() else b"" for file in sorted(folder.rglob("*"))}


def test_several_problems_of_a_recipe_are_listed(run: Run) -> None:
    code, _, err = run("train typo.yaml --set train.batch_size=0 --set seed=x")
    assert code == 2
    assert [line.split(":")[0] for line in err.splitlines()] == ["error"] * 3


def test_a_real_process_has_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "compress", "run", "none.yaml"]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert outcome.stderr == "error: none.yaml: no such recipe file\n"


# ------------------------------------------------------------------------------------------- what goes right


def test_help_and_version(run: Run) -> None:
    code, out, err = run("--help")
    assert code == 0 and err == ""
    for command in (
        "quickstart",
        "run",
        "distill",
        "train",
        "export",
        "validate",
        "benchmark",
        "report",
        "doctor",
    ):
        assert f"\n  {command}  " in out
    assert run("")[:2] == (0, out)
    assert run("data")[0] == 0
    assert run("--version") == (0, f"{__version__}\n", "")


def test_data_commands(run: Run) -> None:
    code, out, _ = run("data synthetic made --train 3 --val 2 --size 64 --classes 3")
    assert code == 0
    assert out.splitlines()[-1] == "next: compress data check made/train.json --images made/images"
    code, out, _ = run("data check made/train.json --images made/images")
    assert code == 0 and out.splitlines()[-1] == "next: compress run --help"


def test_report_names_a_next_step_that_exists(run: Run) -> None:
    shutil.rmtree("folder_report/report.html")
    assert run("report folder_report") == (0, "report: folder_report/report.html\n", "")
    Path("folder_report/student.safetensors").touch()
    assert run("report folder_report")[1].endswith("next: compress export folder_report/student.safetensors\n")
    Path("folder_report/student.onnx").touch()
    assert run("report folder_report")[1].endswith("next: compress benchmark folder_report/student.onnx\n")


def test_wrong_data_fails_the_check(run: Run) -> None:
    document = json.loads(Path("good.json").read_text())
    document["annotations"][0]["bbox"] = [50, 4, 40, 20]
    Path("bad.json").write_text(json.dumps(document))
    code, out, err = run("data check bad.json --images images")
    assert code == 1
    assert out.startswith("bad.json: annotation 1: ")
    assert err == "failed: bad.json: 1 problem\n"


def test_class_names_are_words_whatever_they_look_like(run: Run) -> None:
    Path("words.yaml").write_text("names: [no, 2020-99-99, 7]\n")
    assert run("data convert yolo images made.json --names words.yaml")[0] == 0
    categories = json.loads(Path("made.json").read_text())["categories"]
    assert [category["name"] for category in categories] == ["no", "2020-99-99", "7"]


@pytest.mark.parametrize("names", ["cat,dog", "names.yaml", "numbered.yaml"])
def test_yolo_labels_are_converted(run: Run, names: str) -> None:
    Path("names.yaml").write_text("names: [cat, dog]\n")
    Path("numbered.yaml").write_text("names: {0: cat, 1: dog}\n")
    Path("images/a.txt").write_text("1 0.5 0.5 0.25 0.5\n")
    code, out, _ = run(f"data convert yolo images made.json --names {names}")
    assert code == 0 and "1 images, 1 boxes" in out
    made = json.loads(Path("made.json").read_text())
    assert [category["name"] for category in made["categories"]] == ["cat", "dog"]
    assert made["annotations"][0]["bbox"] == [24.0, 16.0, 16.0, 32.0]


# ------------------------------------------------------------------------------------ what commands pass on


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Stands in for the training pipeline and records what it was asked to do."""
    module = types.ModuleType("compress.run.pipeline")
    module.calls = []  # type: ignore[attr-defined]
    module.gate = "pass"  # type: ignore[attr-defined]

    def distill(recipe, **options):  # type: ignore[no-untyped-def]
        module.calls.append((recipe, options))  # type: ignore[attr-defined]
        return recipe.run_dir

    def run(recipe, **options):  # type: ignore[no-untyped-def]
        distill(recipe, **options)
        if not options["dry_run"]:
            recipe.run_dir.mkdir(parents=True)
            artifact = {"file": "student.onnx", "gate": module.gate}  # type: ignore[attr-defined]
            (recipe.run_dir / "report.json").write_text(json.dumps({"artifacts": [artifact]}))
        return recipe.run_dir

    module.distill, module.run = distill, run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "compress.run.pipeline", module)
    monkeypatch.setattr("compress.run.pipeline", module, raising=False)
    return module


def test_options_reach_the_pipeline(run: Run, pipeline: types.ModuleType) -> None:
    code, out, err = run("train good.yaml --set train.batch_size=6 --devices 3 --resume")
    assert (code, err) == (0, "")
    recipe, options = pipeline.calls[0]
    assert (recipe.train.batch_size, recipe.train.devices) == (6, 3)
    assert options == {"resume": True, "dry_run": False, "distillation": False}
    assert out.splitlines()[-1] == "next: compress export runs/example/student.safetensors"


def test_after_distillation_the_trained_scales_are_what_to_export(run: Run, pipeline: types.ModuleType) -> None:
    from tests.helpers.tiny_recipe import TEXT

    Path("tiny.yaml").write_text(TEXT.format(runs="runs"))
    following = "next: compress export runs/tiny/student"
    assert run("distill tiny.yaml --set 'deploy.int8.qad={}'")[1] == f"{following}.qad.safetensors --precision int8\n"
    assert run("train tiny.yaml --set 'deploy.int8.qad={}'")[1] == f"{following}.safetensors\n"
    assert run("distill tiny.yaml")[1] == f"{following}.safetensors\n"


def test_nothing_leads_from_faster_rcnn_to_an_export(run: Run, pipeline: types.ModuleType) -> None:
    """No report is read, not even one of an earlier student, and nothing is recommended that would be refused."""
    from tests.helpers.tiny_recipe import TEXT

    Path("tiny.yaml").write_text(TEXT.format(runs="runs"))
    family = "--set student.detector=faster_rcnn --set methods={} --set baseline=false"
    pipeline.gate = "fail"  # type: ignore[attr-defined]
    assert run(f"run tiny.yaml {family}") == (0, "", "")
    said = "weights: runs/tiny/student.safetensors; a faster_rcnn cannot be exported\n"
    assert run(f"train tiny.yaml {family}") == (0, said, "")
    family = family.replace("methods={}", "'methods={fgd: {}}'")
    assert run(f"distill tiny.yaml {family}") == (0, said, "")


def test_who_uses_pseudo_labels(run: Run, pipeline: types.ModuleType) -> None:
    """`distill` needs no method beside them, `train` says that it leaves them out."""
    from tests.helpers.tiny_recipe import TEXT

    Path("tiny.yaml").write_text(TEXT.format(runs="runs"))
    alone = "tiny.yaml --set methods={}"
    labels = f"{alone} --set labels.fraction=0.5 --set 'pseudo_labels={{}}'"
    assert run(f"distill {labels}") == (0, "next: compress export runs/tiny/student.safetensors\n", "")
    assert pipeline.calls[-1][1]["distillation"] is True
    code, out, err = run(f"train {labels}")
    assert (code, err) == (0, "") and out.startswith("tiny.yaml: pseudo_labels is not used here")
    assert "pseudo_labels" not in run(f"train {alone}")[1]
    code, _, err = run(f"distill {alone}")
    assert code == 2 and err.startswith("error: tiny.yaml: nothing to distill with; add a method under methods, or ps")


def test_quickstart_runs_the_packaged_recipe(run: Run, pipeline: types.ModuleType) -> None:
    code, out, _ = run("quickstart --set seed=3")
    recipe, options = pipeline.calls[0]
    assert (code, recipe.name, recipe.seed) == (0, "quickstart", 3)
    assert options == {"resume": True, "dry_run": False}
    assert out.splitlines()[-1] == "next: compress benchmark runs/quickstart/student.onnx --batch 1,8"


def test_a_dry_run_names_the_real_one(run: Run, pipeline: types.ModuleType) -> None:
    assert run("run good.yaml --dry-run")[1] == "next: compress run good.yaml\n"
    assert pipeline.calls[0][1]["dry_run"] is True


def test_a_failed_gate_is_exit_code_1(run: Run, pipeline: types.ModuleType) -> None:
    pipeline.gate = "fail"  # type: ignore[attr-defined]
    code, out, err = run("run good.yaml")
    assert code == 1
    assert err == "failed: student.onnx lost more than 0.5 mAP\n"
    assert "report.html" in out


def test_other_processes_are_silent(run: Run, pipeline: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run("run good.yaml") == (0, "", "")


# ------------------------------------------------------------------------------------------------- the edges


@pytest.mark.parametrize(
    ("line", "max_batch"),
    [
        ("validate text.onnx text.engine --data good.json --images images --batch-size 5", 5),
        ("benchmark text.onnx text.engine --images images --batch 1,7,3", 7),
        ("serve onnx=text.onnx engine=text.engine --max-batch 4", 4),
    ],
)
def test_options_for_gpus_reach_the_runners(
    run: Run, monkeypatch: pytest.MonkeyPatch, line: str, max_batch: int
) -> None:
    from deploy.runtimes import open as files
    from deploy.runtimes.onnx import TensorRTProvider
    from deploy.serve import server

    opened: dict[str, dict[str, Any]] = {}

    def open_runner(path: Path, providers: Any, **options: Any) -> None:
        opened[path.name] = options
        if path.suffix == ".engine":
            raise UserError("seen enough")

    def serve(files: dict[str, Path], open_file: Callable[[Path], None], *_: Any, **__: Any) -> None:
        for path in files.values():
            open_file(path)

    monkeypatch.setattr(files, "open_runner", open_runner)
    monkeypatch.setattr(server, "serve", serve)
    shutil.copy("text.onnx", "text.engine")
    usual = {"allow_fallback": False, "threads": None}
    assert run(f"{line} --provider tensorrt")[::2] == (2, "error: seen enough\n")
    assert opened == {"text.onnx": usual, "text.engine": usual}
    assert run(f"{line} --provider tensorrt --ep-context --trt-cache void --cuda-graph")[0] == 2
    provider = TensorRTProvider(Path("void"), ep_context=True, max_batch=max_batch)
    assert opened["text.onnx"] == opened["text.engine"] == {**usual, "cuda_graph": True, "tensorrt": provider}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("run good.yaml", "interrupted; continue with: compress run good.yaml --resume"),
        ("train good.yaml --resume", "interrupted; continue with: compress train good.yaml --resume"),
    ],
)
def test_control_c_says_how_to_go_on(
    run: Run, pipeline: types.ModuleType, monkeypatch: pytest.MonkeyPatch, line: str, says: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    monkeypatch.setattr(pipeline, "distill", interrupted)
    assert run(line) == (130, "", says + "\n")


def test_a_missing_extra_is_named(run: Run, tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from compress.cli import main; main(['train', 'good.yaml'])"
    outcome = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    wanted = "error: torch is not installed; this command needs: pip install 'compress-detectors[train]'\n"
    assert (outcome.returncode, outcome.stderr) == (2, wanted)


def test_tensorrt_is_missed_before_the_export(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    code, out, err = run("export text.safetensors --images images --input-size 64x64 --trt")
    assert (code, out) == (2, "") and err == "error: tensorrt is not installed: pip install 'compress-detectors[trt]'\n"


def test_our_own_mistakes_keep_their_traceback(
    run: Run, pipeline: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(pipeline, "run", wrong)
    with pytest.raises(KeyError):
        cli.main(["run", "good.yaml"])


def test_an_error_of_the_system_is_one_line(
    run: Run, pipeline: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline, "run", full)
    assert run("run good.yaml") == (2, "", "error: No space left on device\n")
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: Path("good.json/student").mkdir(parents=True))
    assert run("run good.yaml") == (2, "", "error: good.json/student: Not a directory\n")


def test_the_first_of_several_processes_tells_the_mistake(
    run: Run, pipeline: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They all meet the same one; what one of them meets alone, it tells itself."""
    monkeypatch.setenv("RANK", "0")
    assert run("run none.yaml") == (2, "", "error: none.yaml: no such recipe file\n")
    monkeypatch.setenv("RANK", "1")
    assert run("run none.yaml") == (2, "", "")

    def alone(*_: object, **__: object) -> None:
        raise LocalUserError("a.png: cannot be read as an image")

    monkeypatch.setattr(pipeline, "run", alone)
    assert run("run good.yaml") == (2, "", "error: a.png: cannot be read as an image\n")


def test_messages_of_errors_are_printed_line_by_line(
    run: Run, pipeline: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UserError("first\nsecond")

    monkeypatch.setattr(pipeline, "run", refuse)
    assert run("run good.yaml") == (2, "", "error: first\nerror: second\n")


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    """End quietly, as in `compress --help | true`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "compress", "--help"]
    outcome = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(write)
    assert (outcome.returncode, outcome.stderr) == (141, "")


# ------------------------------------------------------------------------------------- commands on real files


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a deployable file of the tiny detector, images and labels that fit it."""
    from tests.helpers.tiny_onnx import CARD, export_tiny

    folder = tmp_path_factory.mktemp("exported")
    export_tiny(folder / "tiny.onnx")
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
    (folder / "labels.json").write_text(json.dumps(document))
    return folder


def test_validate(run: Run, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported)
    line = "validate copy.onnx --data labels.json --images images --reference tiny.onnx --json out.json"
    code, out, err = run(line)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "next: compress benchmark copy.onnx tiny.onnx --images images"
    assert [row["gate"] for row in json.loads(Path("out.json").read_text())] == ["pass", "pass"]


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


def test_export_takes_its_settings_from_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe beside the checkpoint says the thresholds, the input size and where images are."""
    import torch

    from compress.config.model import Model
    from compress.detectors.backbones import build_backbone
    from compress.detectors.checkpoints import ModelRecord, save_detector
    from compress.detectors.gfl import GFL
    from deploy.runtimes.onnx import OnnxRunner

    torch.manual_seed(0)
    backbone = build_backbone("nano", weights="none", frozen_stages=-1, norm_eval=False)
    detector = GFL(3, backbone, neck_channels=32, head_depth=1)
    record = ModelRecord(
        model=Model(backbone="nano", neck_channels=32, head_depth=1),
        num_classes=3,
        class_names=("a", "b", "c"),
        category_ids=(1, 2, 3),
    )
    folder = Path("runs/example")
    folder.mkdir(parents=True)
    save_detector(folder / "student.safetensors", detector, metadata=record)
    text = RECIPE.replace("size: 64}", "size: 64, classes: 3}")
    (folder / "recipe.yaml").write_text(text + "deploy: {max_detections: 7, candidates: 50, max_batch: 2}\n")
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
    code, out, err = run("export runs/example/student.safetensors --images images --input-size 32x64 --out other.onnx")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "next: compress benchmark other.onnx --images images"
    card = OnnxRunner(Path("other.onnx")).card
    assert (card.input_size, card.max_detections, card.short, card.long) == ((32, 64), 7, 64, 64)


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
    from deploy.core.image import letterbox, load_image
    from deploy.runtimes.onnx import OnnxRunner
    from tests.helpers.tiny_onnx import export_tiny

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
    export_tiny(Path("other.onnx"), seed=1)
    code, _, err = run(
        "validate other.onnx --data detected.json --images images --reference tiny.onnx --json lost.json"
    )
    assert code == 1
    assert err == "failed: gate of 0.5 mAP points: other.onnx\n"
    assert [row["gate"] for row in json.loads(Path("lost.json").read_text())] == ["fail", "pass"]
