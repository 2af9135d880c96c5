"""The COCO recipes: settings of the published rows, and a rehearsal of each with a real ResNet-101 teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.fabric import Fabric

from compress.config.model import Model
from compress.config.recipe import Recipe, load_recipe
from compress.detectors.base import freeze
from compress.detectors.build import build_detector
from compress.detectors.checkpoints import ModelRecord
from compress.detectors.gfl import GFL
from compress.run import dry_run
from compress.run.parts import Parts
from tests.helpers import tiny_vision

FOLDER = Path(__file__).parents[3] / "recipes" / "coco"
PATHS = {path.stem.removeprefix("gfl_r101_gfl_"): path for path in sorted(FOLDER.glob("gfl_r101_*.yaml"))}
OTHERS = {path.stem: path for path in sorted(FOLDER.glob("*.yaml")) if path not in PATHS.values()}

# Published: methods, learning rate, batch, images of a process, student starts from the teacher's head, clipping
ROWS = {
    "r50_bckd": (["bckd"], 0.01, 16, None, False, None),
    "r34_bckd": (["bckd"], 0.01, 16, None, False, None),
    "r18_bckd": (["bckd"], 0.01, 16, None, False, None),
    "r50_ld_main": (["ld"], 0.01, 16, 2, False, None),
    "r34_ld_main": (["ld"], 0.01, 16, 2, False, None),
    "r18_ld_main": (["ld"], 0.01, 16, 2, False, None),
    "r50_ld": (["ld"], 0.0025, 4, 2, False, None),
    "r50_cwd": (["cwd"], 0.01, 16, None, False, None),
    "r50_tid": (["tid"], 0.01, 16, None, False, None),
    "r50_fgd": (["fgd"], 0.01, 16, None, True, 35),
    "r50_uet_fgd": (["fgd"], 0.01, 16, None, True, 35),
    "r50_crosskd": (["crosskd"], 0.01, 16, None, False, None),
    "r50_crosskd_pkd": (["pkd", "crosskd"], 0.01, 16, None, False, None),
}

# Real-time DETRs and alignment with a vision model, in the schedule of the student's authors: epochs, batch, learning
# rate, factor of the backbone, steps of warm-up, moving average; and the methods
SCHEDULES = {
    "d_fine_x_d_fine_s_fgd_ddf": (132, 32, 2e-4, 0.5, 500, 0.9999, ["fgd", "ddf"]),
    "dinov2_gfl_r18_vfm": (12, 16, 0.01, 1.0, 500, None, ["vfm"]),
    "rf_detr_n": (100, 16, 1e-4, 1.5, 0, 0.993, []),
    "dinov2_rt_detr_v2_r18_vfm": (120, 16, 1e-4, 1.0, 2000, 0.9999, ["vfm"]),
}


def recipe_of(row: str) -> Recipe:
    return load_recipe(PATHS[row])


def test_every_recipe_has_its_row() -> None:
    assert (PATHS.keys(), OTHERS.keys()) == (ROWS.keys(), SCHEDULES.keys())


@pytest.mark.parametrize("row", ROWS)
def test_the_published_setting(row: str) -> None:
    """mmdet's GFL 1x schedule (12 epochs, steps after 8 and 11, 800 x 1333), with what the method's authors changed."""
    recipe = recipe_of(row)
    methods, lr, batch, images, inherit, clip_norm = ROWS[row]
    train, data, student, teacher = recipe.train, recipe.data, recipe.student, recipe.teacher
    assert list(recipe.methods.enabled()) == methods
    assert (train.optimizer.lr, train.batch_size, train.clip_norm) == (lr, batch, clip_norm)
    assert (train.optimizer.name, train.optimizer.momentum, train.optimizer.weight_decay) == ("sgd", 0.9, 1e-4)
    assert images is None or train.batch_size // (train.devices * train.accumulate) == images
    assert (train.epochs, train.schedule.milestones, train.schedule.gamma) == (12, (8, 11), 0.1)
    assert (train.schedule.warmup_steps, train.schedule.warmup_factor) == (500, 0.001)
    assert (data.short, data.long, data.flip, data.drop_empty) == (800, 1333, 0.5, True)
    assert (student.backbone, student.weights) == (f"resnet{row[1:3]}", "imagenet")
    assert (student.frozen_stages, student.norm_eval, student.neck_channels, student.head_depth) == (1, True, 256, 4)
    assert teacher is not None
    assert (teacher.checkpoint, teacher.inherit) == ("zoo:gfl_r101_fpn_mstrain_2x_coco", inherit)
    assert all(term.weight == 1.0 for term in recipe.methods.enabled().values())


def test_the_published_constants() -> None:
    for row in ("r50_fgd", "r50_uet_fgd"):
        fgd = recipe_of(row).methods.fgd
        assert fgd is not None
        assert (fgd.temperature, fgd.alpha, fgd.beta) == (0.5, 1e-3, 5e-4)
        assert (fgd.gamma, fgd.relation, fgd.box_norm) == (5e-4, 5e-6, "img")
    uet = recipe_of("r50_uet_fgd").methods.uet
    assert uet is not None and uet.base_methods == ("fgd",) and uet.combine == "sum"
    assert uet.rates == pytest.approx((0.15, 0.20, 0.25, 0.30, 0.35))
    for row in ("r50_ld_main", "r34_ld_main", "r18_ld_main", "r50_ld"):
        ld = recipe_of(row).methods.ld
        whole = row == "r50_ld"
        assert ld is not None
        assert (ld.main, ld.vlr, ld.classification) == ((0.25, 0.25, 10.0) if whole else (0.25, 0.0, 0.0))
        assert (ld.temperature, ld.classification_temperature, ld.normalise) == (10.0, 2.0, "official")
        assert (ld.vlr_overlap, ld.vlr_floor) == ("iof", 0.25)
    cwd = recipe_of("r50_cwd").methods.cwd
    assert cwd is not None and (cwd.on, cwd.temperature, cwd.loss_weight) == ("logits", 1.0, 5.0)
    for row in ("r50_crosskd", "r50_crosskd_pkd"):
        crosskd = recipe_of(row).methods.crosskd
        assert crosskd is not None
        assert (crosskd.cls_weight, crosskd.reg_weight, crosskd.giou_weight) == (1.0, 4.0, 0.0)
    pkd = recipe_of("r50_crosskd_pkd").methods.pkd
    assert pkd is not None and pkd.loss_weight == 6.0
    for row in ("r50_bckd", "r34_bckd", "r18_bckd"):
        bckd = recipe_of(row).methods.bckd
        assert bckd is not None and (bckd.cls_weight, bckd.loc_weight, bckd.beta) == (1.0, 4.0, 1.0)


@pytest.fixture(scope="module")
def teacher() -> GFL:
    """What a dry run has in place of the zoo's file; made once here."""
    return freeze(ModelRecord(model=Model(backbone="resnet101"), num_classes=80).build())


REHEARSED = ("r18_bckd", "r50_uet_fgd", "r50_crosskd_pkd")  # by `make test`; each method has a test of its own


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[] if row in REHEARSED else pytest.mark.exhaustive) for row in ROWS]
)
def test_dry_run(row: str, teacher: GFL, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`--dry-run` on small images, two in a step: teacher and student in full width and depth, all methods, one
    optimizer step."""
    monkeypatch.setattr(dry_run, "_teacher", lambda *_: teacher)
    sizes = ["data.short=64", "data.long=96", "train.accumulate=1"]
    fabric = Fabric(accelerator="cpu", devices=1)
    dry_run.dry_run(load_recipe(PATHS[row], sizes), Parts(), fabric, distillation=True, without_data=True)
    shown = capsys.readouterr()
    assert "1 step on made-up images; everything fits together" in shown.out
    for term in {name.partition("_")[0] for name in ROWS[row][0]}:
        assert term in shown.out + shown.err, f"no loss term of {term} in the output"


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_authors_schedule(name: str) -> None:
    recipe = load_recipe(OTHERS[name])
    train, optimizer = recipe.train, recipe.train.optimizer
    epochs, batch, lr, factor, warmup, ema, methods = SCHEDULES[name]
    assert (train.epochs, train.batch_size, optimizer.lr, optimizer.backbone) == (epochs, batch, lr, factor)
    assert (train.schedule.warmup_steps, train.ema, list(recipe.methods.enabled())) == (warmup, ema, methods)
    if recipe.student.is_whole:
        assert (optimizer.name, optimizer.weight_decay, optimizer.decay_norms, train.clip_norm) == (
            "adamw",
            1e-4,
            False,
            0.1,
        )
        assert train.schedule.milestones[0] > epochs, "a constant rate"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive if "vfm" in name else []) for name in SCHEDULES]
)
def test_dry_run_of_the_others(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The student in full width; what teaches it is small."""
    pytest.importorskip("transformers")
    pytest.importorskip("scipy")
    settings = ["data.short=64", "data.long=96", "train.precision=32"]
    methods = SCHEDULES[name][-1]
    small = build_detector(Model(detector="d_fine", size="tiny"), 80, seed=0)
    monkeypatch.setattr(dry_run, "_teacher", lambda *_: freeze(small))
    if "vfm" in methods:
        settings.append(f"methods.vfm.model={tiny_vision.saved(tmp_path / 'vision')}")
    recipe = load_recipe(OTHERS[name], settings)
    fabric = Fabric(accelerator="cpu", devices=1)
    dry_run.dry_run(recipe, Parts(), fabric, distillation=True, without_data=True)
    shown = capsys.readouterr()
    assert "1 step on made-up images; everything fits together" in shown.out
    assert all(method in shown.out + shown.err for method in methods)
