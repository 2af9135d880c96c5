"""Recipes with pseudo labels: who labels what, the two trainings, interruption, what a run says about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compress.config.pseudo import FineTune
from compress.config.recipe import Recipe
from compress.data.concat import ConcatDataset
from compress.data.synthetic import class_names
from compress.detectors.checkpoints import load_detector
from compress.manifest import STUDENT_ON_PSEUDO_LABELS, RunFolder
from compress.pseudo import parts
from compress.pseudo.images import images_in
from compress.pseudo.label import Settings as Labelling
from compress.pseudo.label import pseudo_label
from compress.run import pipeline, plans
from compress.run import pseudo_labels as stage
from compress.run.data import Datasets, open_data, splits
from compress.run.pseudo_labels import PseudoLabelled, fine_tuning
from compress.run.trainings import TrainingPlan
from compress.teachers.load import open_teacher
from deploy.core.card import OperatingPoint
from deploy.core.errors import UserError
from deploy.core.files import sha256_of
from tests.helpers import tiny_recipe
from tests.helpers.cheap_exports import rounds
from tests.helpers.random_teacher import teacher

NAMES = class_names(3)
PSEUDO = (
    "{{teachers: [{{checkpoint: {a}}}, {{checkpoint: {b}}}], tau: 0.6, tau_ignore: 0.5, class_map: {{kitten: '{c}'}}, "
    "{more}}}"
)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def stages(run_dir: Path) -> Any:
    return read(run_dir / "manifest.json")["stages"]


def recipe(folder: Path, *overrides: str, more: str = "fine_tune: {steps: 2}") -> Recipe:
    """A quarter of the labels; one teacher knows two classes, the other one the third."""
    a = teacher(folder / "a.safetensors", tuple(NAMES[:2]), 1)
    b = teacher(folder / "b.safetensors", ("kitten",), 2)
    pseudo = PSEUDO.format(a=a, b=b, c=NAMES[2], more=more)
    return tiny_recipe.recipe(
        folder, "teacher=null", "methods={}", "labels={fraction: 0.25}", f"pseudo_labels={pseudo}", "train.steps=3",
        *overrides,
    )  # fmt: skip


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[PseudoLabelled]:
    """What the pipeline's labelling returned."""
    found: list[PseudoLabelled] = []
    original = pipeline.label_images

    def label_images(*arguments: Any, **named: Any) -> PseudoLabelled:
        found.append(original(*arguments, **named))
        return found[-1]

    monkeypatch.setattr(pipeline, "label_images", label_images)
    return found


def test_two_stages(tmp_path: Path, seen: list[PseudoLabelled], capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = pipeline.distill(recipe(tmp_path))
    said = capsys.readouterr().out
    document = read(RunFolder(run_dir).pseudo_labels / "training-images.json")
    assert [row["name"] for row in document["categories"]] == list(NAMES)
    assert document["info"]["coverage"] == [1, 2, 3]
    assert document["images"] == read(run_dir / "unlabelled.json")["images"] and len(document["images"]) == 18
    assert {row["category_id"] for row in document["annotations"]} == {1, 2, 3}
    counts = stages(run_dir)["pseudo labels: training images"]["result"]
    regions = sum(row["iscrowd"] for row in document["annotations"])
    assert (counts["labels"], counts["regions"]) == (len(document["annotations"]) - regions, regions)
    assert f"{counts['labels']} labels and {regions} uncertain regions in 18 images" in said

    (pseudo,) = seen
    people, teachers = pseudo.images.parts
    assert set(people.image_ids) == {row["id"] for row in read(run_dir / "labelled.json")["images"]}
    assert set(teachers.image_ids) <= {row["id"] for row in document["images"]}
    assert people.transform is teachers.transform
    first, second = stages(run_dir)[STUDENT_ON_PSEUDO_LABELS]["result"], stages(run_dir)["student"]["result"]
    assert (first["steps"], second["steps"]) == (3, 2)

    before = read(run_dir / "manifest.json")
    pipeline.distill(recipe(tmp_path))
    assert read(run_dir / "manifest.json") == before


def test_fine_tuning_goes_on_from_the_first_stage(tmp_path: Path) -> None:
    run_dir = pipeline.distill(recipe(tmp_path, "train.ema=null", more="fine_tune: {steps: 1, lr: 1.0e-30}"))
    first, last = (load_detector(run_dir / f"{name}.safetensors")[0] for name in (STUDENT_ON_PSEUDO_LABELS, "student"))
    for (name, one), other in zip(first.named_parameters(), last.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_schedule_of_fine_tuning(tmp_path: Path) -> None:
    made = recipe(tmp_path, more="fine_tune: {epochs: 2}")
    assert made.pseudo_labels is not None and made.pseudo_labels.fine_tune is not None
    train = fine_tuning(made.train, made.pseudo_labels.fine_tune)
    assert (train.epochs, train.steps, train.batch_size, train.ema) == (2, None, 4, 0.9)
    assert fine_tuning(made.train, FineTune(steps=1, batch_size=2)).batch_size == 2
    assert train.optimizer.lr == pytest.approx(0.001) and train.optimizer.name == "sgd"
    assert (train.schedule.name, train.schedule.warmup_steps) == ("cosine", 0)


def more_images(folder: Path, run_dir: Path, data: Datasets) -> None:
    """Six new images and copies of one of each set, in folders below."""
    rng = np.random.default_rng(5)
    (folder / "deep").mkdir(parents=True)
    for index in range(6):
        picture = Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).resize((64, 56))
        picture.save(folder / ("deep" if index % 2 else "") / f"{index}.png")
    for name, split in (("labelled", data.train_split), ("rest", data.unlabelled), ("val", data.val_split)):
        assert split is not None
        image = read(split.annotations)["images"][0]["file_name"]
        shutil.copy(split.images / image, folder / "deep" / f"{name}.png")


def test_folders_of_images(tmp_path: Path, seen: list[PseudoLabelled], capsys: pytest.CaptureFixture[str]) -> None:
    from tests.helpers.training_runs import fabric

    plain = recipe(tmp_path)
    more_images(tmp_path / "more", plain.run_dir, open_data(plans.data_plan(plain), fabric()))
    run_dir = pipeline.distill(recipe(tmp_path, f"pseudo_labels.unlabeled=[{tmp_path / 'more'}]"))
    assert f"{tmp_path / 'more'}: 3 images of the training or validation set are left out" in capsys.readouterr().out
    document = read(RunFolder(run_dir).pseudo_labels / "folder-1.json")
    assert [row["file_name"] for row in document["images"]] == [
        "0.png", "2.png", "4.png", "deep/1.png", "deep/3.png", "deep/5.png",
    ]  # fmt: skip
    assert len(seen[0].images.parts) == 3
    shutil.rmtree(tmp_path / "more")
    (tmp_path / "more").mkdir()
    split = open_data(plans.data_plan(plain), fabric()).val_split
    shutil.copy(split.images / read(split.annotations)["images"][0]["file_name"], tmp_path / "more" / "again.png")
    with pytest.raises(UserError, match="all its images are training or validation images"):
        pipeline.distill(recipe(tmp_path, f"pseudo_labels.unlabeled=[{tmp_path / 'more'}]"))
    with pytest.raises(UserError, match="nowhere: neither a folder of images nor"):
        pipeline.distill(recipe(tmp_path, f"pseudo_labels.unlabeled=[{tmp_path / 'nowhere'}]"))


def test_validation_images_in_the_training_list_are_not_labelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipe(tmp_path)
    train, val = splits(made.data, made.runs)
    document, others = read(train.annotations), read(val.annotations)["images"]
    document["images"] += [row | {"id": 1000 + row["id"]} for row in others]
    (tmp_path / "train.json").write_text(json.dumps(document))
    files = [
        "data.synthetic=null",
        f"data.train={{annotations: {tmp_path / 'train.json'}, images: {train.images}}}",
        f"data.val={{annotations: {val.annotations}, images: {val.images}}}",
    ]
    run_dir = pipeline.distill(recipe(tmp_path, *files, more="fine_tune: null"))
    listed = {row["file_name"] for row in read(run_dir / "unlabelled.json")["images"]}
    theirs = {row["file_name"] for row in others}
    assert listed & theirs
    assert (
        f"training images: {len(listed & theirs)} images of the validation set are left out" in capsys.readouterr().out
    )
    labelled = read(RunFolder(run_dir).pseudo_labels / "training-images.json")
    assert {row["file_name"] for row in labelled["images"]} == listed - theirs


def test_other_images_of_the_same_names_are_labelled_anew(tmp_path: Path) -> None:
    """A copy of the same images at another place is not."""
    rng = np.random.default_rng(5)
    folder, copied = tmp_path / "more", tmp_path / "copied"

    def labelled(folder: Path) -> Any:
        run_dir = pipeline.distill(recipe(tmp_path, f"pseudo_labels.unlabeled=[{folder}]", more="fine_tune: null"))
        return stages(run_dir)["pseudo labels: folder 1"], stages(run_dir)["student"]

    def draw(quality: int) -> None:
        folder.mkdir(exist_ok=True)
        for index in range(2):
            picture = Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).resize((64, 56))
            picture.save(folder / f"{index}.jpg", quality=quality)

    draw(90)
    first = labelled(folder)
    shutil.copytree(folder, copied, copy_function=shutil.copyfile)
    assert labelled(copied) == first == labelled(folder)
    draw(80)
    again = labelled(folder)
    assert again[0]["inputs"] != first[0]["inputs"] and again[1]["inputs"] != first[1]["inputs"]


def test_a_folder_that_is_no_longer_in_the_recipe(tmp_path: Path) -> None:
    """Neither what is left of its labelling nor its row of the manifest counts."""
    made = recipe(tmp_path, f"pseudo_labels.unlabeled=[{tmp_path / 'more'}]")
    parts.parts_folder(RunFolder(made.run_dir).pseudo_labels / "folder-1.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"the labelling is unfinished"):
        pipeline.distill(made)
    without = recipe(tmp_path, more="fine_tune: null")
    found = stages(pipeline.distill(without))
    found["pseudo labels: folder 1"] = found["pseudo labels: training images"]
    plans = [pipeline.labelling_of(each) for each in (without, made)]
    assert [None if plan is None else plan.stages(found) for plan in plans] == [
        ["pseudo labels: training images"],
        ["pseudo labels: training images", "pseudo labels: folder 1"],
    ]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.batch_size=8"], "fine_tune: batches of 8 images, and only 6 have labels; set its batch_size to 6"),
        (["train.batch_size=8", "baseline=true"], r"train\.batch_size 8 is more than the 6 images of the baseline"),
        (
            ["pseudo_labels.fine_tune={epochs: 2, batch_size: 3, warmup_steps: 4}"],
            "fine_tune.warmup_steps: 4 warm-up steps leave nothing of 4 steps; set it to 0",
        ),
    ],
)
def test_mistakes_are_told_before_anybody_labels(
    tmp_path: Path, overrides: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "pseudo_label", lambda *arguments, **named: pytest.fail("labelled"))
    with pytest.raises(UserError, match=says):
        pipeline.distill(recipe(tmp_path, *overrides))


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_two_stage_student_needs_teachers_of_all_classes(tmp_path: Path, dry_run: bool) -> None:
    a = teacher(tmp_path / "a.safetensors", tuple(NAMES[:2]), 1)
    settings = f"pseudo_labels={{teachers: [{{checkpoint: {a}}}], tau: 0.6, tau_ignore: 0.6, fine_tune: null}}"
    with pytest.raises(UserError, match=f"no teacher looks for {NAMES[2]}, and a faster_rcnn student cannot learn"):
        pipeline.distill(recipe(tmp_path, settings, "student.detector=faster_rcnn"), dry_run=dry_run)


def test_a_two_stage_student_learns_without_regions(tmp_path: Path) -> None:
    student = "student={detector: faster_rcnn, backbone: nano, neck_channels: 32, head_depth: 0, roi_samples: 16}"
    made = recipe(tmp_path, student, "pseudo_labels.tau_ignore=0.6", "pseudo_labels.thresholds=best_f1")
    run_dir = pipeline.distill(made)
    document = read(RunFolder(run_dir).pseudo_labels / "training-images.json")
    assert document["annotations"] and not any(row["iscrowd"] for row in document["annotations"])
    assert stages(run_dir)["student"]["result"]["steps"] == 2


def test_one_teacher_for_some_of_the_classes(tmp_path: Path, seen: list[PseudoLabelled]) -> None:
    a = teacher(tmp_path / "only.safetensors", (*NAMES[:2], "foreign"), 1)
    one = (
        f"{{teachers: [{{checkpoint: {a}}}], tau: 0.6, tau_ignore: 0.5, class_map: {{'*': null}}, fine_tune: null, "
        "weighting: score}"
    )
    pipeline.distill(recipe(tmp_path, f"pseudo_labels={one}"))
    people, teachers = seen[0].images.parts
    assert people[0][1].unlabeled_classes is None and people[0][1].scores is None
    for index in range(len(teachers)):
        target = teachers[index][1]
        assert target.unlabeled_classes is not None and target.unlabeled_classes.tolist() == [2]
        assert target.scores is not None and (~target.ignore).any()  # partly covered: an image without labels is none
        assert target.scores[~target.ignore].min() >= 0.59


def test_no_labels_at_all(tmp_path: Path, seen: list[PseudoLabelled]) -> None:
    run_dir = pipeline.distill(recipe(tmp_path, "labels.fraction=0", more="fine_tune: null"))
    (teachers,) = seen[0].images.parts
    assert teachers.annotations == RunFolder(run_dir).pseudo_labels / "training-images.json"
    assert len(read(teachers.annotations)["images"]) == 24
    assert stages(run_dir)["student"]["result"]["steps"] == 3
    with pytest.raises(UserError, match="without teachers there is nothing to train on"):
        pipeline.distill(recipe(tmp_path, "labels.fraction=0", more="fine_tune: null"), distillation=False)


def test_an_interrupted_labelling_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pipeline.distill(recipe(tmp_path / "whole", "pseudo_labels.batch_size=2"))
    done: list[int] = []
    original = parts.append

    def append(file: Any, row: Any) -> None:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(row["number"])
        original(file, row)

    made = recipe(tmp_path / "again", "pseudo_labels.batch_size=2")
    monkeypatch.setattr(parts, "append", append)
    with pytest.raises(KeyboardInterrupt):
        pipeline.distill(made)
    with pytest.raises(UserError, match=r"an interrupted run \(the labelling is unfinished\); add --resume"):
        pipeline.distill(made)
    monkeypatch.setattr(parts, "append", lambda file, row: (done.append(row["number"]), original(file, row)))
    again = pipeline.distill(made, resume=True)
    assert done == list(range(9))
    file = "pseudo/training-images.json"
    assert (again / file).read_bytes() == (whole / file).read_bytes()
    assert not list(RunFolder(again).pseudo_labels.glob("*.parts"))


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    made = recipe(tmp_path, "pseudo_labels.tau=1.0")
    with pytest.raises(UserError, match=r"found no label in 18 images; lower pseudo_labels\.tau \(1\)"):
        pipeline.distill(made)


def test_thresholds_are_measured_on_the_labelled_images(tmp_path: Path) -> None:
    run_dir = pipeline.distill(recipe(tmp_path, "pseudo_labels.thresholds=best_f1", more="fine_tune: null"))
    provenance = read(RunFolder(run_dir).pseudo_labels / "training-images.json")["info"]["pseudo_labels"]
    assert provenance["thresholds_from"] == sha256_of(run_dir / "labelled.json")
    assert set(provenance["tau"]) == set(NAMES) and set(provenance["tau"].values()) != {0.6}


def test_labels_begin_where_the_teachers_f1_is_best(tmp_path: Path) -> None:
    """Unless tau is given; regions begin at half of it."""
    point = OperatingPoint(score=0.56, f1=0.7, precision=0.7, recall=0.7, class_scores=[None] * 3, images=9)
    file = teacher(tmp_path / "t.safetensors", tuple(NAMES), 1, operating_point=point)
    made = recipe(tmp_path, f"pseudo_labels={{teachers: [{{checkpoint: {file}}}], fine_tune: null}}")
    folder = RunFolder(pipeline.distill(made)).pseudo_labels
    provenance = read(folder / "training-images.json")["info"]["pseudo_labels"]
    assert provenance["tau"] == dict.fromkeys(NAMES, 0.56) and provenance["tau_ignore"] == dict.fromkeys(NAMES, 0.28)


def test_teachers_see_their_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teachers see them so in the check and when they label; the student's images stay as they are."""
    shown: list[tuple[tuple[int, ...], str]] = []
    original = stage.check_teacher

    def check(teacher: Any, labels: Any, val: Any, *arguments: Any, **named: Any) -> Any:
        shown.append((tuple(val[0][0].shape), named["shown"].size))
        return original(teacher, labels, val, *arguments, **named)

    monkeypatch.setattr(stage, "check_teacher", check)
    made = recipe(tmp_path, more="short: 96, long: 160, fine_tune: null")
    run_dir = pipeline.distill(made)
    assert shown == [((3, 96, 96), "short side 96, long side 160")] * 2 and made.data.short != 96
    document = read(RunFolder(run_dir).pseudo_labels / "training-images.json")
    assert (document["info"]["pseudo_labels"]["short"], document["info"]["pseudo_labels"]["long"]) == (96, 160)
    settings = made.pseudo_labels
    assert settings is not None and settings.teachers is not None
    alone = tmp_path / "alone.json"
    pseudo_label(
        [open_teacher(source, torch.device("cpu")) for source in settings.teachers],
        images_in(run_dir / "unlabelled.json", splits(made.data, made.runs)[0].images),
        alone,
        Labelling(tau=0.6, tau_ignore=0.5, short=96, long=160),
        categories=run_dir / "unlabelled.json",
        table=settings.class_map,
    )
    assert read(alone)["annotations"] == document["annotations"]


@rounds(4)
def test_the_recipes_teacher_labels(tmp_path: Path) -> None:
    """Trained in the run from the labelled images, it labels the others, teaches by its features and is compared."""
    made = tiny_recipe.recipe(
        tmp_path,
        "labels={fraction: 0.5}",
        "pseudo_labels={tau: 0.011, tau_ignore: 0.01, fine_tune: {steps: 1}}",
        "train.steps=3",
        "baseline=true",
    )
    run_dir = pipeline.run(made)
    counts = stages(run_dir)["pseudo labels: training images"]["result"]
    assert counts["teachers"] == ["teacher.safetensors"] and counts["images"] == 12
    report = read(run_dir / "report.json")
    assert set(report["models"]) == {"teacher", "baseline", "student"}
    shown = report["pseudo_labels"]
    assert (shown["labelled_images"], shown["images"], shown["labels"]) == (12, 12, counts["labels"])
    assert shown["first_stage_map"] == stages(run_dir)[STUDENT_ON_PSEUDO_LABELS]["result"]["metrics"]["map"]
    page = (run_dir / "report.html").read_text()
    assert "Pseudo labels" in page and "teacher.safetensors" in page and f"{counts['labels']:,}" in page


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe(tmp_path, f"pseudo_labels.unlabeled=[{tmp_path / 'not-there'}]")
    pipeline.distill(made, dry_run=True)
    said = capsys.readouterr().out
    assert "everything fits together" in said and "pseudo labels" in said
    assert f"{tmp_path / 'not-there'} is not there" in said
    assert not made.runs.exists()


def test_a_dry_run_finds_a_class_without_a_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'kitten' is not among the categories"):
        pipeline.distill(recipe(tmp_path, "pseudo_labels.class_map={}"), dry_run=True)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["pseudo_labels.teachers=null"], "pseudo_labels: no teacher is given; add pseudo_labels.teachers"),
        (["labels=null"], "pseudo_labels: all images have labels"),
        (["pseudo_labels.tau_ignore=0.7"], r"tau_ignore: 0.7 is more than tau, 0.6"),
        (["pseudo_labels.short=64"], r"pseudo_labels\.long: missing; short and long go together"),
        (["pseudo_labels.short=64", "pseudo_labels.long=32"], r"pseudo_labels\.short: 64 is more than long, 32"),
        (["pseudo_labels.class_map={'*': cat}"], r"class_map: the key"),
        (["pseudo_labels.fine_tune={epochs: 1, steps: 1}"], r"fine_tune\.steps: excludes epochs"),
        (["pseudo_labels.fine_tune={}"], r"fine_tune: no length"),
        (
            ["pseudo_labels.fine_tune={steps: 5, warmup_steps: 5}"],
            r"fine_tune\.warmup_steps: 5 .* of 5 steps; set it to 0",
        ),
        (
            ["pseudo_labels.fine_tune={steps: 5, batch_size: 3}", "train.devices=2"],
            r"fine_tune\.batch_size: 3 is not a",
        ),
        (["pseudo_labels.weighting=score", "student.detector=fcos"], r"weighting: score is for gfl students; a fcos"),
        (
            ["student.detector=faster_rcnn"],
            r"tau_ignore: a faster_rcnn student .* set tau and tau_ignore to one number, 0\.6, and there",
        ),
        (["pseudo_labels.tau=null"], r"tau_ignore: needs tau beside it; without tau, both are where"),
        (["pseudo_labels.unlabeled=[a, ./a]"], r"unlabeled: a is listed twice; name it once"),
        (["pseudo_labels.unlabeled=[a/b, a, ab]"], r"unlabeled: a/b lies in a, which is searched"),
        (["teacher={checkpoint: no.pth}"], r"--set teacher: is not used: pseudo_labels\.teachers label"),
        (["labels.fraction=0"], r"pseudo_labels\.fine_tune: needs labelled training images"),
        (["labels.fraction=0", "pseudo_labels=null"], r"labels\.fraction: is 0 .* nothing to train on"),
        (["labels.fraction=0", "pseudo_labels.fine_tune=null", "baseline=true"], "baseline: needs labelled"),
    ],
)
def test_mistakes_in_recipes(tmp_path: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(tmp_path, *overrides)


def test_a_joined_set_is_what_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained_on: dict[str, Any] = {}
    original = pipeline.train

    def train(fabric: Any, plan: TrainingPlan, *arguments: Any, **named: Any) -> Any:
        trained_on[plan.name] = plan.images
        return original(fabric, plan, *arguments, **named)

    monkeypatch.setattr(pipeline, "train", train)
    pipeline.distill(recipe(tmp_path, "baseline=true"))
    assert trained_on["baseline"] is None and trained_on["student"] is None
    assert (
        isinstance(trained_on[STUDENT_ON_PSEUDO_LABELS], ConcatDataset)
        and len(trained_on[STUDENT_ON_PSEUDO_LABELS]) > 6
    )
