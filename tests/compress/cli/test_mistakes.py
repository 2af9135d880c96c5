"""Every mistake on the command line is one line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.command_line import Run


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
        (f"train good.yaml --set seed={'9' * 5000}", "good.yaml: not a recipe: Exceeds the limit (4300 digits)"),
        ("train good.yaml --set seed=4294967296", "--set seed: must be at most 4294967295"),
        ("train good.yaml --set train.steps=9", "--set train.steps: excludes epochs"),
        ("train good.yaml --devices 3", "2 is not a multiple of devices x accumulate = 3"),
        ("distill good.yaml", "good.yaml: nothing to distill with"),
        ("quickstart --set student.backbone=vgg", "'vgg' is not one of resnet18"),
        # data
        ("data synthetic out --classes 99", "classes is 99, must be from 2 to 24"),
        ("data synthetic out --train few", "--train"),
        ("data synthetic images", "images: exists and is not a synthetic dataset"),
        ("data convert csv images out.json", "'csv' is not one of 'yolo', 'voc', 'coco'"),
        ("data convert coco images out.json", "images: no COCO file in it"),
        ("data convert coco none.json out.json", "none.json: no such file or folder"),
        ("data convert coco good.json out", "out: . is not divided into train and val"),
        (
            "data convert coco good.json out.json --images void",
            "1 of its 1 images are not in void, the first is 'a.png'",
        ),
        ("data convert coco good.json out.json --names a", "--names: is for yolo, not for coco"),
        ("data convert yolo images out.json --names a --first-pixel 0", "--first-pixel: is for voc, not for yolo"),
        ("data convert voc images out.json --first-pixel 2", "Invalid value for '--first-pixel'"),
        ("data convert yolo images out.json --names a", "out.json: 1 images, and not one box in all of them"),
        ("data convert yolo images out.json --names void/classes.txt", "--names: void/classes.txt: No such file"),
        ("data convert yolo images out.json --names a --split val", "--split: images has no set 'val'; it has none"),
        ("data convert yolo images out.json", "--names: yolo files only have class numbers"),
        ("data convert yolo none out.json --names a,b", "none"),
        ("data convert yolo void out.json --names a,b", "void: no images in it"),
        ("data convert yolo images out.json --names a,,b", "none empty"),
        ("data convert yolo images out.json --names none.yaml", "--names: none.yaml: No such file"),
        ("data convert yolo images out.json --names good.yaml", "--names: good.yaml: no key 'names'"),
        ("data convert yolo images out.txt --names a", "out.txt: OUT is a JSON file"),
        ("data convert voc images out.json --names a", "--names: voc files hold the class names themselves"),
        ("data convert voc images out.json", "images: no .xml files in it"),
        ("data convert voc folder_xml out.json", "folder_xml: no .xml files in it"),
        ("data convert yolo images out.json --names date.yaml", "needs names numbered from 0"),
        ("data convert yolo images out.json --names deep.yaml", "--names: deep.yaml: not a YAML file"),
        ("data convert yolo images out.json --names latin.yaml", "--names: latin.yaml: not a YAML file"),
        ("data convert yolo images /proc/x.json --names a", "/proc/x.json: cannot be written: "),
        ("data convert yolo images images/a.png/x.json --names a", "images/a.png/x.json: cannot be written: Not a dir"),
        ("data convert yolo images folder.json --names a", "folder.json: is a folder"),
        ("data synthetic /proc/x", "/proc/x/train.json: cannot be written: "),
        ("data synthetic images/a.png/x", "images/a.png/x/train.json: cannot be written: Not a directory"),
        ("data split none.json", "none.json"),
        ("data split good.json --val 1", "--val: needs a share above 0 and below 1, got 1"),
        ("data split good.json --val half", "--val"),
        ("data split good.json", "good.json: 1 images in 1 groups cannot be divided into 2 sets"),
        ("data split good.json --images none", "--images: none: no such folder"),
        ("data split good.json --group-by '('", "--group-by: '(' is no regular expression"),
        ("data split good.json --out images/a.png", "images/a.png/train.json: cannot be written"),
        ("data merge good.json out.json", "out.json: merging takes at least two files"),
        ("data merge good.json good.json out.json", "good.json: images: 'a.png' is "),
        ("data merge good.json none.json out.json", "none.json"),
        ("data merge good.json good.json images", "images: the last name is that of the file to write"),
        ("data merge good.json good.json out.json --images none", "--images: none: no such folder"),
        ("data check none.json --images images", "none.json"),
        ("data check broken.json --images images", "broken.json"),
        ("data check list.json --images images", "list.json"),
        ("data check good.json --images none", "--images: none: no such folder"),
        ("data check good.json --images images --against none.json", "none.json"),
        ("data check good.json --images images --against-images images", "--against-images: belongs to --against"),
        ("data convert yolo images x.json --names a b c", "several values of --names are one word with commas"),
        ("data check good.json --images images --json none/x.json", "--json: none/x.json: its folder does not exist"),
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
        ("export good.yaml", "good.yaml: is no checkpoint; give a student.safetensors"),
        ("quantize good.yaml", "good.yaml: is no checkpoint; give a student.safetensors"),
        ("export text.safetensors --images images --precision ''", "--precision: '' is none of fp32, fp16, bf16, int8"),
        ("export text.safetensors --target cpu", "--target: is about int8 files; add --precision fp32,int8"),
        ("export text.safetensors --full-range", "--full-range: is about int8 files; add --precision fp32,int8"),
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
        ("validate model.pt --data good.json --images images", "model.pt: ends in none of .onnx, .xml, .engine"),
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
