"""The recipe loader: what is accepted, and one exact line for everything that is not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from compress.config.deploy import Deploy
from compress.config.messages import models_in
from compress.config.methods import Methods
from compress.config.model import Backbone
from compress.config.recipe import Recipe, dump_recipe, load_recipe, recipe_sha256
from deploy.core.errors import UserError
from tests.helpers.recipes import TEXT, Load, problems

RECIPES = Path(__file__).parents[3] / "recipes"


def test_values_and_defaults(load: Load) -> None:
    recipe = load()
    assert recipe.train.optimizer.lr == 1e-3  # a number, although YAML 1.1 reads the text "1e-3"
    assert recipe.train.schedule.milestones == (8, 11)
    assert list(recipe.methods.enabled()) == ["bckd"]
    assert recipe.run_dir == Path("runs/example")
    assert (recipe.student.frozen_stages, recipe.student.norm_eval) == (-1, False)  # random weights
    pretrained = load(TEXT, "student.backbone=resnet18", "student.weights=imagenet").student
    assert (pretrained.frozen_stages, pretrained.norm_eval) == (1, True)
    assert load(TEXT, "student.weights=w/nano.pth").student.weights == Path("w/nano.pth")


def test_words_stay_words(load: Load) -> None:
    """YAML 1.2 scalars: only true and false are booleans."""
    assert load(TEXT, "name=no").name == "no"
    assert load(TEXT, "baseline=true").baseline is True
    assert problems(load, TEXT, "baseline=yes") == ["--set baseline: needs true or false, got 'yes'"]


def test_precision_may_be_written_as_a_number(load: Load) -> None:
    assert load(TEXT, "train.precision=32").train.precision == "32"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        # typing errors
        ("  epochs: 3", "  epoch: 3", "r.yaml:18: train.epoch: unknown key; did you mean epochs?"),
        ("    lr: 1e-3", "    rl: 1e-3", "r.yaml:21: train.optimizer.rl: unknown key; did you mean lr?"),
        ("name: example", "nmae: example", "r.yaml:1: nmae: unknown key; did you mean name?"),
        (
            "    weight: 1.5",
            "    colour: 1.5",
            "r.yaml:16: methods.bckd.colour: unknown key; known here: weight, ratio, stop_epoch, decay, cls_weight, "
            "loc_weight, beta",
        ),
        (
            "backbone: nano",
            "backbone: resnet19",
            f"r.yaml:7: student.backbone: 'resnet19' is not one of {', '.join(get_args(Backbone))}; "
            "did you mean resnet18?",
        ),
        (
            "  backbone: nano",
            "  backbone: nano\n  weights: imagnet",
            "r.yaml:8: student.weights: unknown weights 'imagnet'; did you mean imagenet?",
        ),
        # types
        ("epochs: 3", "epochs: three", "r.yaml:18: train.epochs: needs a whole number, got 'three'"),
        ("epochs: 3", "epochs: '3'", "r.yaml:18: train.epochs: needs a whole number, got '3'"),
        ("epochs: 3", "epochs: true", "r.yaml:18: train.epochs: needs a whole number, got True"),
        ("epochs: 3", "epochs: 3.0", "r.yaml:18: train.epochs: needs a whole number, got 3.0"),
        ("lr: 1e-3", "lr: .nan", "r.yaml:21: train.optimizer.lr: needs a finite number, got nan"),
        ("lr: 1e-3", "lr: fast", "r.yaml:21: train.optimizer.lr: needs a number, got 'fast'"),
        ("short: 64", "short: big", "r.yaml:4: data.short: needs a whole number or a list, got 'big'"),
        ("short: 64", "short: [64, x]", "r.yaml:4: data.short.1: needs a whole number, got 'x'"),
        ("short: 64", "short: [64]", "r.yaml:4: data.short: needs 2 numbers"),
        ("name: example", "name: 5", "r.yaml:1: name: needs text, got 5"),
        (
            "name: example",
            "name: ../x",
            "r.yaml:1: name: '../x' is not a plain name (letters, digits, . _ -)",
        ),
        # ranges
        ("epochs: 3", "epochs: 0", "r.yaml:18: train.epochs: must be at least 1, got 0"),
        ("weight: 1.5", "weight: -1", "r.yaml:16: methods.bckd.weight: must be at least 0, got -1"),
        ("lr: 1e-3", "lr: 0", "r.yaml:21: train.optimizer.lr: must be more than 0, got 0"),
        # rules between fields
        (
            "epochs: 3",
            "epochs: 3\n  steps: 9",
            "r.yaml:19: train.steps: excludes epochs; keep one of the two",
        ),
        ("  epochs: 3\n", "", "r.yaml:17: train: no length; give epochs or steps"),
        (
            "epochs: 3",
            "steps: 300",
            "r.yaml:17: train.schedule.warmup_steps: 500 warm-up steps leave nothing of 300 steps; set it to 30",
        ),
        (
            "  epochs: 3\n  batch_size: 4",
            "  epochs: 3\n  batch_size: 6\n  accumulate: 4",
            "r.yaml:19: train.batch_size: 6 is not a multiple of devices x accumulate = 4",
        ),
        (
            "  epochs: 3",
            "  epochs: 3\n  precision: fp16\n  accelerator: cpu",
            "r.yaml:19: train.precision: fp16 needs accelerator cuda; on the CPU use bf16 or 32",
        ),
        (
            "  synthetic: {train: 8, val: 4, size: 64}",
            "  train: {annotations: a.json, images: a}",
            "r.yaml:2: data: needs train and val, or synthetic; there is no val",
        ),
        (
            "  short: 64",
            "  short: 64\n  val: {annotations: a.json, images: a}",
            "r.yaml:3: data.synthetic: excludes data.train and data.val; keep one of the two",
        ),
        ("short: 64", "short: 65", "r.yaml:4: data.short: 65 is more than data.long, 64"),
        ("short: 64", "short: [64, 32]", "r.yaml:4: data.short: the smaller number comes first"),
        (
            "teacher:\n",
            "teacher:\n  checkpoint: t.safetensors\n",
            "r.yaml:12: teacher.train: excludes teacher.checkpoint; keep one of the two",
        ),
        (
            "  train:\n    epochs: 2\n    batch_size: 4\n",
            "",
            "r.yaml:8: teacher: no source; "
            "give one of checkpoint, torchvision, mmdet, transformers, onnx, results, custom, or model and train",
        ),
        (
            "  model:\n    backbone: resnet18\n",
            "",
            "r.yaml:9: teacher.train: needs teacher.model, the detector to train",
        ),
        (
            "backbone: nano",
            "backbone: nano\n  frozen_stages: 1",
            "r.yaml:8: student.frozen_stages: would freeze random weights; set it to -1",
        ),
        (
            "    backbone: resnet18",
            "    backbone: resnet18\n    norm_eval: true",
            "r.yaml:11: teacher.model.norm_eval: would freeze unset statistics; set it to false",
        ),
        (
            "backbone: nano",
            "backbone: nano\n  weights: imagenet",
            "r.yaml:8: student.weights: nano has no ImageNet weights; use none or a file",
        ),
        # YAML itself
        ("name: example", "name: a\nname: b", "r.yaml:2: name: given twice (line 1)"),
        (
            "    batch_size: 4\nmethods",
            "    batch_size: 4\n    batch_size: 8\nmethods",
            "r.yaml:14: teacher.train.batch_size: given twice (line 13)",
        ),
        (
            "  bckd:\n    weight: 1.5",
            "  bckd:",
            "r.yaml:15: methods.bckd: no value; write {} for a section of defaults, null for none",
        ),
        ("name: example", "name: !env HOME", "r.yaml:1: name: the tag !env has no meaning here"),
        ("student:", "student: &s\n  again: *s", "r.yaml:7: student.again: an alias may not contain itself"),
        (
            "name: example",
            f"name: example\nseed: {'9' * 30}",
            f"r.yaml:2: seed: must be at most 4294967295, got {'9' * 30}",
        ),
        ("name: example", "? [a, b]\n: c\nname: example", "r.yaml:1: a key must be a word"),
    ],
)
def test_one_problem_is_one_line(load: Load, old: str, new: str, line: str) -> None:
    assert old in TEXT
    assert problems(load, TEXT.replace(old, new, 1)) == [line]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "r.yaml: the recipe is empty"),
        ("- a\n- b\n", "r.yaml:1: a recipe is a list of `key: value`"),
        ("name: [1, 2\n", r"r.yaml:2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("name: a\n--- \nname: b\n", "r.yaml:2: not valid YAML: but found another document"),
        ("name: a\x00b\n", "r.yaml: not valid YAML: "),
        ("name: *nothing\n", "r.yaml:1: not valid YAML: found undefined alias 'nothing'"),
        ('name: "\\UFFFFFFFF"\n', "r.yaml: not valid YAML: "),  # PyYAML raises a bare OverflowError
        ('name: "\\uD800"\n', "r.yaml:1: not a recipe: nested too deeply, or text that is not Unicode"),
        ("name: " + "[" * 3000 + "]" * 3000, "r.yaml: not a recipe: nested too deeply"),
        ("name: " + "[" * 300 + "]" * 300, "r.yaml:1: not a recipe: nested too deeply"),
    ],
)
def test_not_a_recipe(load: Load, text: str, line: str) -> None:
    (only,) = problems(load, text)
    assert only.startswith(line)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: no such recipe file$"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"cannot read the recipe: Is a directory$"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(UserError, match=r"latin\.yaml: cannot read the recipe: not UTF-8 text$"):
        load_recipe(tmp_path / "latin.yaml")


def test_all_problems_are_listed(load: Load) -> None:
    text = TEXT.replace("  epochs: 3", "  epochs: 0").replace("nano", "nanno").replace("short: 64", "shrt: 64")
    lines = problems(load, text, "train.ema=2")
    assert [line.split(":")[:3] for line in lines] == [
        ["r.yaml", "4", " data.shrt"],
        ["r.yaml", "7", " student.backbone"],
        ["r.yaml", "18", " train.epochs"],
        ["--set train.ema", " must be less than 1, got 2"],
    ]


def test_missing_sections(load: Load) -> None:
    lines = problems(load, "name: a\n")
    assert lines == ["r.yaml:1: data: missing", "r.yaml:1: student: missing", "r.yaml:1: train: missing"]


# -------------------------------------------------------------------------------------------------- overrides


def test_overrides(load: Load) -> None:
    recipe = load(TEXT, "train.schedule.milestones=[1, 2]", "train.ema=0.99", "methods.bckd={}", "seed=7")
    assert recipe.train.schedule.milestones == (1, 2)
    assert recipe.train.ema == 0.99
    assert recipe.methods.bckd is not None and recipe.methods.bckd.weight == 1.0  # the section was replaced
    assert recipe.seed == 7
    assert load(TEXT, "seed=1", "seed=2").seed == 2  # the last one wins, as in a shell
    without = load(TEXT, "methods.bckd=null", "teacher=null")
    assert without.methods == Methods() and without.teacher is None


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.epoch=3", "--set train.epoch: unknown key; did you mean epochs?"),
        ("trian.epochs=3", "--set trian.epochs: trian: unknown key; did you mean train?"),
        ("train.epochs=x", "--set train.epochs: needs a whole number, got 'x'"),
        ("train.epochs", "--set train.epochs: write it as key=value, for example train.epochs=3"),
        ("=3", "--set =3: write it as key=value, for example train.epochs=3"),
        ("train..epochs=3", "--set train..epochs=3: write it as key=value, for example train.epochs=3"),
        ("train.epochs=", "--set train.epochs: no value; write null to unset it"),
        ("train.epochs=[1", "--set train.epochs: '[1' is not valid YAML"),
        ("train.epochs=" + "[" * 3000, "r.yaml: not a recipe: nested too deeply"),
        ("a" + ".a" * 3000 + "=3", "r.yaml: not a recipe: nested too deeply"),
        ("seed=" + "9" * 30, f"--set seed: must be at most 4294967295, got {'9' * 30}"),
        (
            "seed=" + "9" * 5000,
            "r.yaml: not a recipe: Exceeds the limit (4300 digits) for integer string conversion: value "
            "has 5000 digits; use sys.set_int_max_str_digits() to increase the limit",
        ),
        ("methods.bckd.stop_epoch=4", "--set methods.bckd.stop_epoch: 4 is more than train.epochs, 3"),
        (
            "teacher.train.devices=2",
            "--set teacher.train.devices: 2 is not train.devices, 1; one run trains both alike",
        ),
        ("seed=4294967296", "--set seed: must be at most 4294967295, got 4294967296"),
        ("deploy.candidates=5000", "--set deploy.candidates: must be at most 3840, got 5000"),
        (
            "deploy.input_size=[64, 99999968]",
            "--set deploy.input_size: deploy.input_size.1: must be at most 8192, got 99999968",
        ),
        ("name.x=3", "--set name.x: name is a value, not a section; set name as a whole"),
        (
            "data.short.0=3",
            "--set data.short.0: data.short is a value, not a section; set data.short as a whole",
        ),
        ("train={epochs: 3, foo: 1}", "--set train: train.foo: unknown key; known here: epochs, steps"),
        ("train={epochs: 3, epochs: 4}", "--set train: train.epochs: given twice"),
        (
            "data.synthetic=null",
            "r.yaml:2: data: needs train and val, or synthetic; there is no train and val",
        ),
        ("teacher=null", "r.yaml:15: methods.bckd: needs a teacher; add the section teacher"),
        (
            "teacher.cache=kept",
            "--set teacher.cache: needs train.views: without them no augmentation comes twice; set train.views: 8",
        ),
        ("teacher.cache_classes=8", "--set teacher.cache_classes: belongs to cache, which is not given"),
    ],
)
def test_a_wrong_override_is_one_line(load: Load, override: str, line: str) -> None:
    (only,) = problems(load, TEXT, override)
    assert only == line or (line.endswith("steps") and only.startswith(line))


def test_baseline_needs_a_method(load: Load) -> None:
    assert problems(load, TEXT, "methods=null") == ["--set methods: needs a section of keys, got None"]
    lines = problems(load, TEXT, "methods={}", "baseline=true")
    assert lines == ["--set baseline: needs something to compare with; add a method under methods"]


def test_a_cache_of_the_teacher_needs_a_method_that_reads_it(load: Load) -> None:
    cached = (TEXT, "teacher.cache=kept", "train.views=4")
    assert load(*cached).teacher.cache == Path("kept")
    assert "views:" not in dump_recipe(load())
    lines = problems(load, *cached, "methods={}")
    assert lines == ["--set teacher.cache: is not used: no method learns from the teacher; leave it out"]
    lines = problems(load, *cached, "methods.cwd={on: logits}", "teacher.cache_classes=2")
    assert lines == ["--set teacher.cache_classes: methods.cwd on logits compares all classes; leave it out"]


# ------------------------------------------------------------------------------------- dump, hash, repository


@given(
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,12}\Z"),
    lr=st.floats(min_value=1e-30, max_value=1e30),
    folder=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=8),
)
def test_dump_reads_back(tmp_path_factory: pytest.TempPathFactory, name: str, lr: float, folder: str) -> None:
    """Names such as `1e5`, `null` or `no`, and every number, survive."""
    data: dict[str, Any] = yaml.safe_load(TEXT)
    data["train"]["optimizer"]["lr"] = lr
    original = Recipe.model_validate_json(
        Recipe.model_construct(**{**data, "name": name, "runs": folder}).model_dump_json(warnings=False)
    )
    path = tmp_path_factory.getbasetemp() / "dump.yaml"
    path.write_text(dump_recipe(original), encoding="utf-8")
    assert load_recipe(path) == original


def test_hash_is_of_the_settings_not_of_the_text(load: Load) -> None:
    original = load()
    assert re.fullmatch(r"[0-9a-f]{64}", recipe_sha256(original))
    assert recipe_sha256(load("# a comment\n" + TEXT + "baseline: false\n")) == recipe_sha256(original)
    assert recipe_sha256(load(TEXT, "seed=1")) != recipe_sha256(original)


def test_settings_are_frozen(load: Load) -> None:
    with pytest.raises(ValidationError):
        load().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_repository(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("depth", [18, 50])
def test_coco_recipes_have_the_published_settings(depth: int) -> None:
    """mmdet's GFL 1x schedule with BCKD's released weights (8 x 2 images, lr 0.01)."""
    recipe = load_recipe(RECIPES / "coco" / f"gfl_r101_gfl_r{depth}_bckd.yaml")
    optimizer, schedule, bckd = recipe.train.optimizer, recipe.train.schedule, recipe.methods.bckd
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (
        "sgd",
        0.01,
        0.9,
        1e-4,
    )
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.clip_norm) == (12, 16, None)
    assert (schedule.name, schedule.milestones, schedule.gamma) == ("multistep", (8, 11), 0.1)
    assert (schedule.warmup_steps, schedule.warmup_factor) == (500, 0.001)
    assert (recipe.data.short, recipe.data.long, recipe.data.flip) == (800, 1333, 0.5)
    student = recipe.student
    assert (student.backbone, student.weights, student.frozen_stages) == (f"resnet{depth}", "imagenet", 1)
    assert (student.norm_eval, student.neck_channels, student.head_depth) == (True, 256, 4)
    assert recipe.teacher is not None and recipe.teacher.checkpoint == "zoo:gfl_r101_fpn_mstrain_2x_coco"
    assert bckd is not None
    assert (bckd.weight, bckd.cls_weight, bckd.loc_weight, bckd.beta) == (1.0, 1.0, 4.0, 1.0)
    assert recipe.deploy.nms_threshold == 0.6 and recipe.deploy.score_threshold == 0.05


def test_the_limit_of_candidates_is_that_of_the_suppression() -> None:
    from deploy.core.card import MAX_CANDIDATES

    Deploy(candidates=MAX_CANDIDATES)
    with pytest.raises(ValidationError):
        Deploy(candidates=MAX_CANDIDATES + 1)


def test_every_setting_is_explained() -> None:
    def below(model: type[BaseModel]) -> set[type[BaseModel]]:
        inner = {m for field in model.model_fields.values() for m in models_in(field.annotation)}
        return {model}.union(*map(below, inner))

    models = below(Recipe)
    assert len(models) > 30
    silent = [f"{m.__name__}.{n}" for m in models for n, f in m.model_fields.items() if not f.description]
    assert silent == []


def test_teachers_from_the_zoo_are_in_it() -> None:
    from compress.detectors.checkpoints import PACKAGED, ZOO

    for path in RECIPES.rglob("*.yaml"):
        teacher = load_recipe(path).teacher
        if teacher is not None and (teacher.checkpoint or "").startswith("zoo:"):
            assert str(teacher.checkpoint).removeprefix("zoo:") in {*PACKAGED, *ZOO}


# SHA-256 of the repository's recipes by version 0.1, before there were keys for users' own parts and engines.
HASHES = {
    "bccd": "086912889abc6f5be4e855b55083394bd30ee3ed5495a15aa4688f9301ae37d6",
    "gfl_r101_gfl_r18_bckd": "fd15550ae6ee44dea15ff806edcdb8244fd27d7a7fd35b0d1df7139c68508572",
    "gfl_r101_gfl_r18_ld_main": "189e5ae9dfe47373d328737ab2c44b6e4dc5871a60113a098bf712139fe372f8",
    "gfl_r101_gfl_r34_bckd": "0a48ea1e5a40dbed891afe16485f3fb4587403643a894ef5a058046d261459b3",
    "gfl_r101_gfl_r34_ld_main": "b5f519c6585092db7417f164285ebf1d00b41a24941beb52599c83f10214ecef",
    "gfl_r101_gfl_r50_bckd": "4b00d00869c9195ccfc17533936ddfccc25f180d1a4a4364cd58af2cce839e0a",
    "gfl_r101_gfl_r50_crosskd": "545df8f16625fe4ca2ed8c41f14155dfbd0e6a9d15ba672375d9d17b7c21bc3d",
    "gfl_r101_gfl_r50_crosskd_pkd": "cb96d1e753be5c79b522c97ded830f1c6aae85dafb16ddbf1c4e1c2a974839ae",
    "gfl_r101_gfl_r50_cwd": "2df6dfa9c1068bfcc2282312d4ff49216d18ced4ca4d5f2081fb25ea310728a8",
    "gfl_r101_gfl_r50_fgd": "eb64bc1fefb1102a7be5eefda75ea66be7f7ab7e5c22da27e50bd1a53bbcf2da",
    "gfl_r101_gfl_r50_ld": "ff7e37fb7ddc9938ba3a5caa593c2a9d07bc8fa9e2d78a08ddca8a356412c29e",
    "gfl_r101_gfl_r50_ld_main": "d62955ab1557df921d536e7dd6b1fbf6881a677cbf263638abaf06ddd5bc6e7e",
    "gfl_r101_gfl_r50_tid": "b8aba308c27dfff35f094d128fa3123acdf0ba8d3e1b37335b878e3dd3beaf35",
    "gfl_r101_gfl_r50_uet_fgd": "470806888beda842a518a11e899a1dfc0e9ec2b7d8c8aa5f7a49c2ceb20cabd4",
    "quickstart_nano": "4fd7f556cd0c4bfcdf22d9b117fa245be791d7399138fe8ba436ff490791eb9d",
    "quickstart_teacher": "2f44aa9bb21ef45086095dfee4baf7e5102395b7d83e448a2cf973ba80b851fd",
}
RENAMED = {"quickstart_nano": "quickstart"}
"""What recipes were called when their hash was taken."""


def test_recipes_without_later_keys_keep_their_hash() -> None:
    """quickstart_nano was called quickstart; the one of that name now is younger, as are those without a hash here."""
    old = [path for path in RECIPES.rglob("*.yaml") if path.stem in HASHES]
    found = {
        path.stem: load_recipe(path, [f"name={RENAMED[path.stem]}"] if path.stem in RENAMED else []) for path in old
    }
    assert {name: recipe_sha256(recipe) for name, recipe in found.items()} == HASHES


# ------------------------------------------------------------------------------------------- dictionaries


def test_a_dictionary_is_a_recipe(load: Load) -> None:
    data = yaml.safe_load(TEXT)
    data["train"]["optimizer"]["lr"] = 1e-3
    assert load_recipe(data) == load()
    assert load_recipe("r.yaml") == load_recipe(Path("r.yaml")) == load()
    assert load_recipe(data, ["seed=3"]).seed == 3 and "seed" not in data
    data |= {"runs": Path("a") / "b", "data": {**data["data"], "short": (32, 64)}}
    recipe = load_recipe(data)
    assert recipe.runs == Path("a/b") and recipe.data.short == (32, 64)


@pytest.mark.parametrize(
    ("changes", "overrides", "line"),
    [
        ({"train": {"epoch": 3}}, [], "train.epoch: unknown key; did you mean epochs?"),
        ({"train": {"epochs": 0}}, [], "train.epochs: must be at least 1, got 0"),
        ({"seed": "1"}, [], "seed: needs a whole number, got '1'"),
        ({"name": "a", "nmae": "b"}, [], "nmae: unknown key; did you mean name?"),
        ({"data": {}}, [], "data: needs train and val, or synthetic; there is no train and val"),
        ({"train": {"epochs": 3, 5: 1}}, [], "train: a key must be a word, got 5"),
        ({"seed": {1, 2}}, [], "seed: needs text, a number, a list or a section, got {1, 2}"),
        ({"seed": 10**5000}, [], "recipe: not a recipe: Exceeds the limit"),
        ({}, ["train.epochs=x"], "--set train.epochs: needs a whole number, got 'x'"),
    ],
)
def test_a_problem_of_a_dictionary_names_the_key(changes: dict[str, Any], overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe({**yaml.safe_load(TEXT.replace("1e-3", "0.001")), **changes}, overrides)
    assert str(caught.value) == line or (line.endswith("limit") and str(caught.value).startswith(line))


def test_a_dictionary_that_holds_itself_is_no_recipe() -> None:
    data: dict[str, Any] = {"name": "a"}
    data["data"] = data
    with pytest.raises(UserError, match=r"^recipe: not a recipe: nested too deeply$"):
        load_recipe(data)


def test_a_partial_recipe_leaves_methods_and_teacher_to_objects(load: Load) -> None:
    load()
    changes = ["teacher=null", "baseline=true", "methods={}"]
    with pytest.raises(UserError, match="baseline: needs something to compare with"):
        load_recipe("r.yaml", changes)
    assert load_recipe("r.yaml", changes, partial=True).teacher is None
    assert load_recipe("r.yaml", ["teacher=null"], partial=True).methods.bckd is not None
