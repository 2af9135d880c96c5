"""`compress prune`: a checkpoint becomes a smaller one, which every other command takes."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compress import cli
from compress import open as open_file
from compress.config.data import Split
from compress.config.model import Model
from compress.config.prune import read_cut
from compress.config.teacher import Source
from compress.data.synthetic import generate
from compress.detectors.build import build_detector, model_size
from compress.detectors.checkpoints import ModelRecord, load_detector, save_detector
from compress.run import prune_checkpoint
from compress.run.prune import Images
from compress.run.prune_checkpoint import beside
from compress.teachers.load import open_teacher
from deploy.core.card import card_from_file
from deploy.core.files import write_json, write_text
from deploy.quantize.grids import Grids
from tests.helpers import tiny_recipe

pytestmark = pytest.mark.usefixtures("few_rounds")

SIZE = "--input-size 64x64"
CUT = f"--gflops 0.5 {SIZE}"
DATA = "--data shapes/train.json --images shapes/images"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of right and wrong checkpoints, `small` a pruned one of `whole`, and images of their classes."""
    folder = tmp_path_factory.mktemp("prune")
    generate(folder / "shapes", train=8, val=2, size=64, classes=3, seed=0)
    labels = json.loads((folder / "shapes" / "train.json").read_text())
    names = tuple(row["name"] for row in labels["categories"])
    model = Model(backbone="nano", neck_channels=32, head_depth=1)
    record = ModelRecord(
        model=model, num_classes=3, class_names=names, category_ids=(1, 2, 3), val_map=50.0, recipe_sha256="0" * 64,
        resize_short_long=(48, 64),
    )  # fmt: skip
    detector = build_detector(model, 3, 0)
    for name in ("whole", "student.qad", "beside_notes"):
        save_detector(folder / f"{name}.safetensors", detector, metadata=record)
    grids = Grids(target="cpu", weight_bits=7, float_layers=(), activations=())
    write_text(folder / "student.qad.json", grids.model_dump_json())
    write_json(folder / "beside_notes.json", {"notes": "no grids"})
    for name in ("text.safetensors", "text.pth", "text.onnx", "good.yaml"):
        write_text(folder / name, "no checkpoint")
    labels["categories"][1]["name"] = "crate"
    write_json(folder / "renamed.json", labels)
    write_json(folder / "fewer.json", {**labels, "categories": labels["categories"][:2], "annotations": []})
    (folder / "void").mkdir()
    return folder


@pytest.fixture(scope="module")
def small(world: Path) -> Path:
    with pytest.MonkeyPatch.context() as here:
        here.chdir(world)
        assert code_of(f"prune whole.safetensors --out small.safetensors {CUT}") == 0
    return world / "small.safetensors"


@pytest.fixture(autouse=True)
def _there(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)


def code_of(line: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(shlex.split(line))
    return int(stop.value.code or 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def changes(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: another one, or the same written again, differs."""
    return {str(file): (file.stat().st_ino, file.stat().st_mtime_ns) for file in sorted(folder.rglob("*"))}


# ------------------------------------------------------------------------------------------------- what it writes


def test_the_file_is_a_checkpoint_of_fewer_channels(small: Path) -> None:
    whole, before = load_detector(small.with_name("whole.safetensors"))
    pruned, after = load_detector(small)
    assert after.class_names == before.class_names and after.category_ids == (1, 2, 3)
    assert (after.val_map, after.recipe_sha256, after.source) == (None, None, "pruned from whole.safetensors")
    card = open_file(small, input_size=(96, 96)).card
    assert after.resize_short_long == (48, 64) == (card.short, card.long), "nothing else says how large pictures are"
    assert after.model.widths and after.model.model_copy(update={"widths": None}) == before.model
    assert 0.3 < model_size(pruned, (64, 64))["gflops"] / model_size(whole, (64, 64))["gflops"] <= 0.5
    columns, left = (model.state_dict()["head.gfl_cls.weight"].transpose(0, 1) for model in (whole, pruned))
    assert len(left) < len(columns) and all(any(torch.equal(row, other) for other in columns) for row in left)


def test_it_says_what_left_and_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"prune whole.safetensors --out said.safetensors --params 0.6 --keep neck --keep maps {SIZE} {DATA}"
    assert code_of(line) == 0
    out = capsys.readouterr().out.splitlines()
    cells = {words[1]: words[2:-1] for words in (row.replace("│", " │ ").split() for row in out) if len(words) > 3}
    assert cells["backbone.stem.0"][1] == "16" and "neck.fpn_convs.0" not in cells
    assert any("mAP before training, 8 images" in row for row in out)
    assert any("GFLOPs, 64 x 64" in row for row in out) and any("parameters" in row for row in out)
    *_, option, student = shlex.split(out[-1])
    assert out[-1].startswith("next: compress distill RECIPE --set ") and option == "--set"
    section = yaml.safe_load(student.removeprefix("student="))["prune"]
    assert section.pop("of") == "whole.safetensors"
    assert read_cut(section) == read_cut({"params": 0.6, "keep": ["neck", "maps"]})


def test_a_file_that_is_there_stays_unless_forced(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(small.parent)
    assert code_of(f"prune whole.safetensors --out small.safetensors {CUT}") == 2
    assert "small.safetensors: is there already" in capsys.readouterr().err
    assert contents(small.parent) == before
    assert code_of(f"prune whole.safetensors --out small.safetensors {CUT} --force") == 0
    assert contents(small.parent) == before  # the same cut gives the same bytes
    assert code_of(f"prune whole.safetensors --out whole.safetensors {CUT} --force") == 2
    assert contents(small.parent) == before


def test_default_names() -> None:
    assert beside("runs/first/teacher.pth") == Path("runs/first/teacher.pruned.safetensors")
    assert beside("student.best.safetensors") == Path("student.best.pruned.safetensors")
    assert beside("zoo:quickstart") == Path("quickstart.pruned.safetensors")


def test_importance_from_images_and_widths_of_16(world: Path) -> None:
    line = (
        f"prune beside_notes.safetensors --gflops 0.6 --importance taylor --round-to 16 {SIZE} {DATA} --data-images 2"
    )
    assert code_of(line) == 0  # a JSON of somebody's own beside it is no matter
    widths = load_detector(world / "beside_notes.pruned.safetensors")[1].model.widths
    whole = load_detector(world / "whole.safetensors")[0].state_dict()
    assert widths
    for name, found in widths.items():
        for side, width in enumerate(found):
            assert width % 16 == 0 or width == whole[f"{name}.weight"].shape[side], name


def test_the_sensitivity_is_shown_and_kept(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"prune whole.safetensors --sensitivity --keep backbone --keep neck {SIZE} {DATA} --data-images 2"
    before = contents(world)
    monkeypatch.setattr(Images, "mean_ap", lambda *_: 61.25)  # a detector that was not trained has none
    assert code_of(line) == 0
    out = capsys.readouterr().out
    assert contents(world).keys() - before.keys() == {str(world / "whole.sensitivities.json")}
    (row,) = (row for row in out.splitlines() if "head.cls_convs.0.conv" in row)
    assert row.count("61.25") == 3 and "backbone" not in out.partition("next: ")[0]
    again = "next: compress prune whole.safetensors --gflops 0.5 --shares sensitivity --keep backbone --keep neck "
    assert out.splitlines()[-1].startswith(again)

    def measured(*_: object) -> float:
        raise AssertionError("measured again")

    monkeypatch.setattr(Images, "mean_ap", measured)
    assert code_of(line) == 0
    assert "head.cls_convs.0.conv" in capsys.readouterr().out


def test_latency_is_shown_with_what_is_uncertain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With times that are made up: how they are measured is tested elsewhere."""
    cut = prune_checkpoint.prune_detector

    def timed(detector: Any, record: Any, plan: Any, say: Any) -> Any:
        assert (plan.settings.latency_ms, plan.settings.precision) == (3.0, "fp16")
        assert plan.deploy.providers == ("cuda", "cpu")
        smaller, figures = cut(detector, record, replace(plan, settings=read_cut({"params": 0.9})), say)
        latency = {
            "asked": 3.0,
            "whole_ms": 4.0,
            "median_ms": 2.9,
            "interval_ms": [2.8, 2.95],
            "aa_ratio": [0.99, 1.02],
        }
        return smaller, figures | {"latency": latency | {"precision": "fp16", "note": "odd", "warnings": ["hot"]}}

    monkeypatch.setattr(prune_checkpoint, "prune_detector", timed)
    line = f"prune whole.safetensors --latency-ms 3 --precision fp16 --provider cuda,cpu {SIZE}"
    assert code_of(f"{line} --out {tmp_path}/fast.safetensors") == 0
    out = capsys.readouterr().out
    (row,) = (row.split() for row in out.splitlines() if "fp16 file, median latency" in row)
    assert row[-8:] == ["4.00", "ms", "│", "2.90", "ms", "│", "72%", "│"]
    assert "95 % interval 2.80 to 2.95 ms" in out and "0.990 to 1.020" in out
    assert "note: odd\nnote: hot\n" in out
    assert out.splitlines()[-1].endswith('latency_ms: 3.0, precision: "fp16"}}\'')


def test_a_run_says_size_and_images(tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is not given comes from the recipe.yaml beside the checkpoint; images that nothing needs may be absent."""
    from compress.config.recipe import dump_recipe

    recipe = tiny_recipe.recipe(tmp_path)
    file = recipe.run_dir / "teacher.safetensors"
    write_text(recipe.run_dir / "recipe.yaml", dump_recipe(recipe))
    file.write_bytes((world / "whole.safetensors").read_bytes())
    assert code_of(f"prune {file} --params 0.5 --max-map-drop 3") == 2  # two budgets
    assert code_of(f"prune {file} --params 0.5") == 0
    assert "GFLOPs, 64 x 64" in capsys.readouterr().out
    assert file.with_name("teacher.pruned.safetensors").is_file()
    val = Split(annotations=world / "shapes" / "val.json", images=world / "shapes" / "images")
    train = Split(annotations=world / "renamed.json", images=val.images)
    data = recipe.data.model_copy(update={"synthetic": None, "train": train, "val": val})
    write_text(recipe.run_dir / "recipe.yaml", dump_recipe(recipe.model_copy(update={"data": data})))
    assert code_of(f"prune {file} --params 0.5 --force") == 0
    out = capsys.readouterr().out
    assert f"note: mAP is not measured: {train.annotations}: its label 1 is 'crate'" in out and "mAP before" not in out
    assert code_of(f"prune {file} --params 0.5 --force --importance taylor") == 2


def test_the_sensitivity_of_a_detector_without_map(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"prune student.safetensors --sensitivity --keep backbone --keep neck {SIZE} {DATA} --data-images 1"
    (world / "student.safetensors").write_bytes((world / "whole.safetensors").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Images, "mean_ap", lambda *_: 0.0)
        assert code_of(line) == 2
    said = capsys.readouterr().err
    assert "error: --sensitivity: what a layer's channels are worth is a loss of mAP" in said and "--shares" not in said


def test_images_without_objects_are_told_before_anything_is_cut(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((world / "shapes" / "train.json").read_text())
    some, (first, *_, last) = content["annotations"][0], content["images"]
    crowd = some | {"id": 2, "image_id": first["id"], "iscrowd": 1}
    content["annotations"] = [some | {"id": 1, "image_id": last["id"]}, crowd]
    (world / "few.json").write_text(json.dumps(content))
    monkeypatch.setattr(prune_checkpoint, "prune_detector", lambda *_: pytest.fail("cut"))
    assert code_of(f"prune whole.safetensors {CUT} --data few.json --images shapes/images --data-images 1") == 2
    assert "1 of few.json are looked at, and no box is on them" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- what takes the file


def test_it_is_a_teacher(small: Path) -> None:
    teacher = open_teacher(Source(checkpoint="small.safetensors"), torch.device("cpu"))
    assert teacher.class_names == load_detector(small)[1].class_names


@pytest.mark.exhaustive
def test_every_command_takes_the_file(small: Path) -> None:
    export = f"export small.safetensors --images shapes/images {SIZE} --score-threshold 0.001 --candidates 100"
    assert code_of(export) == 0
    assert code_of("quantize small.onnx --calibration shapes/images --calibration-images 4") == 0
    files = [small.with_suffix(".onnx"), small.with_name("small.int8.onnx")]
    names = load_detector(small)[1].class_names
    assert all(tuple(card_from_file(file).class_names) == names for file in files)
    assert code_of("validate small.onnx small.int8.onnx --data shapes/val.json --images shapes/images") == 0


# -------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        # the budget
        (f"whole.safetensors {SIZE}", "needs exactly one of --gflops, --params, --latency-ms, --max-map-drop, or"),
        (f"whole.safetensors {CUT} --params 0.5", "; --gflops and --params are given"),
        (f"whole.safetensors --gflops 0 {SIZE}", "--gflops: must be more than 0, got 0"),
        (f"whole.safetensors --gflops 1 {SIZE}", "--gflops: must be less than 1, got 1"),
        (f"whole.safetensors --params nan {SIZE}", "--params: needs a finite number, got nan"),
        (f"whole.safetensors --latency-ms 0 {SIZE}", "--latency-ms: must be more than 0"),
        (f"whole.safetensors --gflops 0.01 {SIZE}", "--gflops: 0.01 asks for "),
        # what leaves
        (f"whole.safetensors {CUT} --round-to 7", "--round-to: 7 is not one of 8, 16, 32"),
        (f"whole.safetensors {CUT} --keep nek", "--keep: gfl has no layer 'nek'; did you mean neck?"),
        (f"whole.safetensors {CUT} --keep xyz", "a part (backbone, neck, head), or maps"),
        (f"whole.safetensors {CUT} --precision int8", "--precision: is about the file whose latency counts"),
        (f"whole.safetensors --max-map-drop 1 --schedule iterative {SIZE} {DATA}", "--schedule: iterative is for"),
        # images
        (
            f"whole.safetensors {CUT} --importance taylor",
            "--importance: looks at labelled training images; give",
        ),
        (
            f"whole.safetensors {CUT} --importance fisher",
            "--importance: looks at labelled training images; give",
        ),
        (f"whole.safetensors {CUT} --shares sensitivity", "--shares: looks at labelled training images"),
        (f"whole.safetensors --max-map-drop 1 {SIZE}", "--max-map-drop: looks at labelled training images"),
        (f"whole.safetensors --sensitivity {SIZE}", "--sensitivity: looks at labelled training images"),
        (f"whole.safetensors {CUT} --data-images 5", "--data-images: belongs to --data, which is not given"),
        (f"whole.safetensors {CUT} {DATA} --data-images 0", "--data-images: must be at least 1, got 0"),
        (f"whole.safetensors {CUT} --data shapes/train.json", "--data: needs --images beside it"),
        (f"whole.safetensors {CUT} --images shapes/images", "--images: needs --data beside it"),
        (f"whole.safetensors {CUT} --data none.json --images shapes/images", "none.json: no such file"),
        (f"whole.safetensors {CUT} --data shapes/train.json --images none", "--images: none: no such folder"),
        (f"whole.safetensors {CUT} --data shapes/train.json --images void", " (and 7 more of 8): the file is missing"),
        (f"whole.safetensors {CUT} --data text.onnx --images void", "text.onnx:1: not valid JSON"),
        (f"whole.safetensors {CUT} --data renamed.json --images shapes/images", "renamed.json: its label 1 is 'crate'"),
        (
            f"whole.safetensors {CUT} --data fewer.json --images shapes/images",
            "it has 2 classes, and the checkpoint kn",
        ),
        # sizes
        ("whole.safetensors --gflops 0.5", "--input-size: there is no recipe.yaml to take it from"),
        ("whole.safetensors --gflops 0.5 --input-size 64", "--input-size: '64' is not HEIGHTxWIDTH"),
        (f"whole.safetensors {CUT} --short 96 --long 64", "--short: 96 is more than --long, 64"),
        # the checkpoint
        (f"none.safetensors {CUT}", "none.safetensors: no such file"),
        (f"void {CUT}", "void: is a folder; name the file in it"),
        (f"text.safetensors {CUT}", "text.safetensors: "),
        (f"text.pth {CUT}", "text.pth: "),
        (f"text.onnx {CUT}", "text.onnx: is an exported file, whose layers cannot lose channels; give the checkpoint"),
        (f"good.yaml {CUT}", "good.yaml: is no checkpoint"),
        (f"zoo:quickstar {CUT}", "zoo:quickstar is unknown; use one of zoo:quickstart"),
        (
            f"small.safetensors {CUT}",
            "small.safetensors: was pruned before; prune the whole detector",
        ),
        (f"student.qad.safetensors {CUT}", "student.qad.safetensors: was trained on the grids of its int8 file"),
        # the file to write
        (f"whole.safetensors {CUT} --out x.onnx", "x.onnx: does not end in .safetensors"),
        (f"whole.safetensors {CUT} --out none/x.safetensors", "--out: none/x.safetensors: its folder does not exist"),
        (f"whole.safetensors {CUT} --out /proc/x.safetensors", "/proc/x.safetensors: cannot be written: "),
        (
            f"whole.safetensors --sensitivity {SIZE} {DATA} --out x.safetensors",
            "--out: is about a cut, and --sensitivity",
        ),
        (f"whole.safetensors --sensitivity {SIZE} {DATA} --gflops 0.5", "--gflops: is about a cut, and --sensitivity"),
        (
            f"whole.safetensors --sensitivity {SIZE} {DATA} --shares global",
            "--shares: is about a cut, and --sensitivity",
        ),
    ],
)
def test_mistakes_are_one_line(small: Path, words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = changes(small.parent)
    assert code_of(f"prune {words}") == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and says in line
    assert captured.out == "" and changes(small.parent) == before
