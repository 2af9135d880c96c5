"""What commands pass on, print and return; interruptions, missing extras, closed pipes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from compress import __version__, cli
from deploy.core.errors import LocalUserError, UserError
from tests.helpers.command_line import Run

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
    against = "next: compress data check made/train.json --images made/images --against made/val.json"
    for name in ("train", "val"):
        code, out, _ = run(f"data check made/{name}.json --images made/images")
        assert code == 0 and out.splitlines()[-1] == against
    code, out, _ = run(against.removeprefix("next: compress "))
    assert (
        code == 0 and out.splitlines()[-1] == "next: compress init made/train.json made/val.json --images made/images"
    )
    shutil.move("made/train.json", "made/all.json")
    code, out, _ = run("data check made/all.json --images made/images")
    assert code == 0 and out.splitlines()[-1] == "next: compress data split made/all.json --images made/images"


def test_report_names_a_next_step_that_exists(run: Run) -> None:
    shutil.rmtree("folder_report/report.html")
    assert run("report folder_report") == (0, "report: folder_report/report.html\n", "")
    Path("folder_report/student.safetensors").touch()
    assert run("report folder_report")[1].endswith("next: compress export folder_report/student.safetensors\n")
    Path("folder_report/student.onnx").touch()
    assert run("report folder_report")[1].endswith("next: compress serve folder_report/student.onnx\n")


def test_wrong_data_fails_the_check(run: Run) -> None:
    document = json.loads(Path("good.json").read_text())
    document["annotations"][0]["bbox"] = [50, 4, 40, 20]
    Path("bad.json").write_text(json.dumps(document))
    code, out, err = run("data check bad.json --images images")
    assert code == 1
    assert out.startswith("error: bad.json: annotation 1: ")
    assert err.startswith("failed: bad.json: 1 error, ")


def test_the_check_writes_what_it_found(run: Run) -> None:
    code, out, _ = run("data check good.json --images images --json found.json")
    found = json.loads(Path("found.json").read_text())
    assert (code, found["fit"], found["errors"], found["boxes"]) == (0, True, 0, {"thing": 1})
    assert f"{found['notes']} note" in out.splitlines()[-2] or found["notes"] == 0
    assert "good.json: 1 image, 1 box of 1 class: thing 1" in out.splitlines()
    share = found["object_share"]
    assert (
        f"good.json: pictures of 64x64; a quarter of the objects are smaller than {share:.1%} of the long side" in out
    )
    code, out, err = run("data check good.json --images images --against good.json")
    assert code == 1 and "images/a.png: image 1: is also in good.json" in out and "1 error" in err


def test_labels_that_change_map_are_named_where_it_is_measured(run: Run) -> None:
    document = json.loads(Path("good.json").read_text())
    document["annotations"].append({**document["annotations"][0], "id": 2})
    Path("twice.json").write_text(json.dumps(document))
    said = "note: twice.json: annotation 2: is annotation 1 once more: same image, category and box\n"
    code, out, err = run("validate text.onnx --data twice.json --images images")
    assert (code, out) == (2, said) and "text.onnx" in err
    code, out, _ = run("pseudo-label none.onnx --images images --out new.json --thresholds-from twice.json")
    assert (code, out) == (2, said)


def test_odd_pixels_are_named_where_pictures_are_used(run: Run) -> None:
    Image.new("RGB", (64, 64)).save("images/a.png")
    said = "1 of 1 images that were looked at have odd pixels, the first is images/a.png: nearly one colour"
    for command in ("validate text.onnx --data good.json", "pseudo-label none.onnx --out new.json"):
        code, out, _ = run(f"{command} --images images")
        assert code == 2 and said in out and out.startswith("note: ")


def test_one_file_becomes_two(run: Run) -> None:
    document = json.loads(Path("good.json").read_text())
    rows = [{**document["images"][0], "id": n, "file_name": f"{n}.png"} for n in range(5)]
    Path("all.json").write_text(json.dumps({**document, "images": rows}))
    code, out, _ = run("data split all.json --val 0.4 --out divided")
    assert code == 0 and "divided/train.json: 3 images" in out and "divided/val.json: 2 images" in out
    assert "note: without --images, copies of one picture may have come to both sides" in out
    assert out.endswith("next: compress data check divided/train.json --images DIR --against divided/val.json\n")
    code, _, err = run("data split all.json --val 0.4 --out divided")
    assert (code, err) == (2, "error: divided/train.json: is there already; --force replaces it\n")


def test_two_files_become_one(run: Run) -> None:
    Path("pseudo").mkdir()
    Image.linear_gradient("L").resize((64, 64)).save("pseudo/a.png")
    code, out, _ = run("data merge good.json good.json all.json --images images --images pseudo")
    assert code == 0 and out.splitlines() == [
        "all.json: 2 images, 2 boxes; file names are relative to .",
        "next: compress data check all.json --images .",
    ]
    assert [row["file_name"] for row in json.loads(Path("all.json").read_text())["images"]] == [
        "images/a.png",
        "pseudo/a.png",
    ]


def test_class_names_are_words_whatever_they_look_like(run: Run) -> None:
    Path("words.yaml").write_text("names: [no, 2020-99-99, 7]\n")
    Path("images/a.txt").write_text("1 0.5 0.5 0.25 0.5\n")
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


def test_options_reach_the_pipeline(run: Run, pipeline: types.ModuleType) -> None:
    code, out, err = run("train good.yaml --set train.batch_size=6 --devices 3 --resume")
    assert (code, err) == (0, "")
    recipe, options = pipeline.calls[0]
    assert (recipe.train.batch_size, recipe.train.devices) == (6, 3)
    assert options == {"resume": True, "dry_run": False, "without_data": False, "distillation": False}
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
    assert options == {"resume": True, "dry_run": False, "without_data": False}
    assert out.splitlines()[-2].startswith("next: compress predict runs/quickstart/student.onnx runs/data/")
    assert out.splitlines()[-1] == "or:   compress serve runs/quickstart/student.onnx"


def test_a_dry_run_names_the_real_one(run: Run, pipeline: types.ModuleType) -> None:
    assert run("run good.yaml --dry-run")[1] == "next: compress run good.yaml\n"
    assert pipeline.calls[0][1]["dry_run"] is True and pipeline.calls[0][1]["without_data"] is False
    assert run("run good.yaml --dry-run --without-data")[0] == 0 and pipeline.calls[1][1]["without_data"] is True
    assert (
        run("run good.yaml --without-data")[2] == "error: --without-data: belongs to --dry-run; a run needs its data\n"
    )


def test_a_training_on_ray_does_all_itself(run: Run) -> None:
    pytest.importorskip("ray")
    said = run("run good.yaml --engine ray --set ray.actors=1")[2]
    assert said.startswith("error: --engine ray: the recipe's section ray would wait for what the training's own")


def test_a_failed_gate_is_exit_code_1(run: Run, pipeline: types.ModuleType) -> None:
    pipeline.gate = "fail"  # type: ignore[attr-defined]
    code, out, err = run("run good.yaml")
    assert code == 1
    assert err == "failed: gate of 0.5 mAP points: student.onnx\n"
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


@pytest.mark.parametrize(
    ("words", "found"),
    [("compress pred", ["predict"]), ("compress data conv", ["convert"]), ("compress predict --sco", ["--score"])],
)
def test_the_shell_completes_words(words: str, found: list[str]) -> None:
    asked = {"_COMPRESS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    command = [sys.executable, "-m", "compress"]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout.split()) == (0, found)
